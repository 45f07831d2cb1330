"""A hub id is a tokenizer too: downloaded with the hub's client, and told from local paths, which touch no network."""

import socket

import huggingface_hub
import pytest

from siglip2.core.data.datamodule import read_tokenizer
from siglip2.core.data.hub import is_hub_id
from siglip2.core.data.settings import TextOptions
from siglip2.core.data.text import Tokenizer
from siglip2.testing import tiny_tokenizer

ID = "google/siglip2-base-patch16-224"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def released(here):
    """A folder as the hub's client leaves it, with a tokenizer."""
    folder = here / "cache" / "snapshot"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer().file, encoding="utf-8")
    return folder


@pytest.fixture
def hub(released, monkeypatch):
    """What was asked of a hub that has that folder under every name."""
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(released)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.fixture
def no_network(monkeypatch):
    """Every connection and every call of the hub's client fails the test."""

    def refuse(*arguments, **options):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_tokenizer_of_a_hub_id_is_that_of_its_folder_and_nothing_else_is_downloaded(hub, released, prefix):
    found = read_tokenizer(prefix + ID, TextOptions(length=12))
    assert found.differences(Tokenizer.load(released, length=12)) == []
    [(name, patterns)] = hub
    assert name == ID
    assert "tokenizer.json" in patterns
    assert not any(pattern.endswith((".safetensors", ".bin", ".npz")) for pattern in patterns)


@pytest.mark.parametrize("path", ["google/tokenizer.json", "google", "google/siglip2-base-patch16-224"])
def test_local_path_of_a_tokenizer_touches_no_network(here, released, no_network, path):
    place = here / path
    target = place if place.suffix else place / "tokenizer.json"
    target.parent.mkdir(parents=True)
    target.write_bytes((released / "tokenizer.json").read_bytes())
    assert Tokenizer.load(path).differences(Tokenizer.load(released)) == []


@pytest.mark.parametrize("path", ["gone/tokenizer.json", "gone/tokenizer.model", "gone/deeper/folder", "gone", "/x/y"])
def test_local_path_that_is_not_there_touches_no_network(here, no_network, path):
    with pytest.raises(FileNotFoundError, match="no tokenizer found"):
        Tokenizer.load(path)


def test_name_in_a_local_folder_is_no_hub_id(here, no_network):
    (here / "google").mkdir()
    assert not is_hub_id(ID)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Tokenizer.load(ID)


def test_hub_that_cannot_be_reached_and_repository_without_tokenizer_are_said(hub, released, monkeypatch):
    (released / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of tokenizer.json, .* in the folder .*snapshot"):
        Tokenizer.load(ID)

    def refuse(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=f"'{ID}' is no local path, and as a hub id .*no route to host.* give its folder"
    ):
        Tokenizer.load(ID)
