"""Tiny real things for every test, and no third-party plugins unless a test asks for them."""

import json
from pathlib import Path

import pytest
from webdataset import TarWriter

import siglip2.registry
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.testing import TinySource, tiny_model


@pytest.fixture(autouse=True)
def third_party_plugins(monkeypatch):
    """Entry points that the catalogue sees: none, until a test appends some and clears `catalogue`."""
    points = []
    monkeypatch.setattr(siglip2.registry, "entry_points", lambda group: points)
    siglip2.registry.catalogue.cache_clear()
    yield points
    siglip2.registry.catalogue.cache_clear()


@pytest.fixture
def towers():
    """Two towers of size tiny/16 for pictures of 32 pixels."""
    return tiny_model()


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory):
    """A folder of two tar shards of eight samples, each with png, txt, cls and json."""
    folder, source = tmp_path_factory.mktemp("toy-shards"), TinySource()
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as file, TarWriter(file) as tar:
            for number in range(8 * shard, 8 * shard + 8):
                sample = source.read(number)
                meta = json.loads(sample.record["json"])
                parts = {"png": sample.record["png"], "txt": meta["caption"]["en"], "cls": meta["label"], "json": meta}
                tar.write({"__key__": sample.key, **parts})
    return folder


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory):
    """A tokenizer.json trained on the captions of the toy shards."""
    source = TinySource()
    texts = [text for i in range(len(source)) for texts in source.read(i).captions().values() for text in texts]
    return train_tokenizer(texts, vocab_size=320, out=tmp_path_factory.mktemp("toy-tokenizer") / "tokenizer.json")


@pytest.fixture
def tiny_recipe(toy_shards, toy_tokenizer, tmp_path):
    """Arguments of `siglip2 fit` for ten steps on the toy shards, into tmp_path."""
    return [
        *("--config", str(Path(__file__).parent / "tiny.yaml")),
        *("--data.train.path", str(toy_shards)),
        *("--data.tokenizer", str(toy_tokenizer)),
        *("--trainer.default_root_dir", str(tmp_path)),
    ]
