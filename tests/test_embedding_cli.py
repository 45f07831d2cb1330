"""`siglip2 embed`: a checkpoint and a data set in, files of embeddings and a table or JSON out."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from webdataset import TarWriter

import siglip2.registry
from siglip2 import Objective, hookimpl
from siglip2.api import load_module
from siglip2.cli.main import main
from siglip2.core.batch import Patches
from siglip2.core.data.embedding_file import EmbeddingFile
from siglip2.core.data.embeddings import CachedReference, EmbeddingStore
from siglip2.core.data.fields import Fields
from siglip2.core.data.mixture import JoinedSource
from siglip2.core.data.source import open_source
from siglip2.core.views import CAPTION, IMAGE
from siglip2.testing import tiny_model
from siglip2.testing.tiny import PATCHIFIER

SHORT = ["--trainer.max_steps", "2", "--report", "false", "--model.warmup", "1"]
FIELD = ["--field", "caption=json.caption"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoint lies that the tests of this file share."""
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture
def checkpoint(tiny_recipe, folder, capsys):
    """A checkpoint with all that trained it, written when the first test asks for it."""
    path = folder / "step=2.ckpt"
    if not path.exists():
        main(["fit", *tiny_recipe, *SHORT, "--trainer.default_root_dir", str(folder)])
        capsys.readouterr()
    return path


@pytest.fixture
def shards(toy_shards, tmp_path):
    """The toy shards in a folder of their own."""
    shutil.copytree(toy_shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def ran(capsys, monkeypatch):
    """Runs `siglip2 embed ... --json` without loader processes and returns what it printed."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        capsys.readouterr()
        main(["embed", *map(str, arguments), "--json", "--accelerator", "cpu", "--num-workers", "0"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs `siglip2 embed ...`, which is to end with status 2, and returns what it complained of."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["embed", *map(str, arguments), "--accelerator", "cpu", "--num-workers", "0"])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


class Follow(Objective):
    """Draws the model to cached embeddings, and remembers how far away it was.

    Args:
        cached: where they are, as FOLDER/NAME.
    """

    name = "follow"
    distances = []  # of pictures and of captions, in each call

    def __init__(self, cached: str = "", start: float = 0.0, stop: float = 1.0, weight: float = 1.0):
        super().__init__(weight=weight, start=start, stop=stop)
        self.reference = CachedReference(cached)

    @hookimpl
    def views(self):
        return [IMAGE, CAPTION, self.reference.view()]

    def loss(self, step):
        theirs = self.reference.split(step.view("cached"))
        ours = step.encode_image("image").embedding, step.encode_text("caption").embedding
        apart = torch.stack([(a - b).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)])
        self.distances.append(apart.detach())
        return apart.sum()


@pytest.fixture
def follow(third_party_plugins):
    """Installs a package with the plugin `follow`."""

    class Module:
        @hookimpl
        def register_plugins(self):
            return [Follow]

    dist = SimpleNamespace(name="follow-package", version="1.2")
    third_party_plugins.append(SimpleNamespace(name="follow", value="follow", dist=dist, load=Module))
    siglip2.registry.catalogue.cache_clear()
    Follow.distances.clear()


def test_training_run_from_the_same_weights_agrees_with_what_it_reads(ran, follow, tiny_recipe, checkpoint, shards):
    ran(checkpoint, shards, "--name", "tiny", *FIELD)
    options = ["--plugins.follow.cached", f"{shards}/tiny", "--plugins.sigmoid", "off", "--data.num_workers", "2"]
    start = ["--model.warm_start", str(checkpoint), "--model.surgery.schedule", "fresh"]
    main(["fit", *tiny_recipe, *SHORT, *options, *start, "--data.train.path", str(shards)])
    rehearsed, first, _ = torch.stack(Follow.distances)
    assert rehearsed.max() < 1e-6  # squared, of half precision
    assert first.max() < 1e-6


def towers_in(checkpoint):
    """The towers of a checkpoint, put together without the command."""
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    towers = tiny_model()
    towers.load_state_dict({n.removeprefix("model."): x for n, x in stored.items() if n.startswith("model.")})
    return towers.eval()


def test_embeddings_are_those_of_the_towers_in_the_checkpoint(ran, checkpoint, shards):
    summary = ran(checkpoint, shards, "--name", "tiny", *FIELD, "--precision", "fp32")
    assert (summary["embedded"], summary["images"], summary["texts"]) == (2, 16, 32)
    towers, tokenizer = towers_in(checkpoint), load_module(str(checkpoint)).tokenizer
    source = open_source(str(shards), fields=Fields(caption="json.caption"))
    for i in (0, 7, 8, 15):
        sample = source.read(i)
        file = EmbeddingFile(f"{sample.where}.tiny.safetensors")
        with torch.no_grad():
            image = towers.encode_image(PATCHIFIER(sample.image(), IMAGE, PATCHIFIER.eval_layout(1))).embedding[0]
            ids = tokenizer(sample.captions()["de"][0])
            text = towers.encode_text(ids[None]).embedding[0]
        torch.testing.assert_close(file.image(sample.key), image, rtol=0, atol=1e-6)
        torch.testing.assert_close(file.text(sample.key, ids), text, rtol=0, atol=1e-6)
    assert file.head.encoder.logit_bias == float(towers.logit_bias.detach())
    assert file.head.encoder.checkpoint == str(checkpoint)


def test_second_run_keeps_what_is_there_and_a_missing_shard_is_made_again(ran, checkpoint, shards):
    ran(checkpoint, shards, "--name", "tiny", *FIELD)
    os.unlink(f"{shards}/00000.tar.tiny.safetensors")
    summary = ran(checkpoint, shards, "--name", "tiny", *FIELD)
    assert (summary["shards"], summary["embedded"], summary["kept"], summary["images"]) == (2, 1, 1, 16)
    assert ran(checkpoint, shards, "--name", "tiny", *FIELD)["embedded"] == 0


def test_commands_that_the_check_prints_for_a_mixture_embed_what_each_source_lacks(ran, checkpoint, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "fine")
    (tmp_path / "table.text").write_text("filepath,title\na.png,a red disc\n")
    (tmp_path / "a.png").write_bytes(open_source(str(shards)).read(0).record["png"])
    fields = Fields(image="png", caption="json.caption", extra={"short": "txt"})
    sources = {
        "fine": open_source(str(tmp_path / "fine"), fields=Fields(caption="json.caption", extra={"short": "txt"})),
        "other": open_source(str(shards), fields=fields),
        "table": open_source(str(tmp_path / "table.text"), format="table"),
    }
    both = ["--field", "caption=json.caption", "--field", "short=txt", "--captions", "caption", "short"]
    for folder in (tmp_path / "fine", shards):
        ran(checkpoint, folder, "--name", "tiny", *both, "--precision", "fp32")
    tokenizer, joined = load_module(str(checkpoint)).tokenizer, JoinedSource(sources)
    with pytest.raises(ValueError, match="do not fit fine \\+ other \\+ table") as refused:
        EmbeddingStore("tiny").check(joined, tokenizer)
    commands = [shlex.split(line.split("`")[1]) for line in str(refused.value).splitlines() if "`" in line]
    assert [words[3] for words in commands] == [str(shards), str(tmp_path / "table.text")]
    assert [ran(*words[2:])["embedded"] for words in commands] == [2, 1]
    EmbeddingStore("tiny").check(joined, tokenizer)


def test_caption_file_that_cannot_be_read_is_a_failure_like_a_bad_picture(ran, checkpoint, toy_shards, tmp_path):
    picture = open_source(str(toy_shards)).read(0).record["png"]
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
        tar.write({"__key__": "good", "png": picture, "txt": b"a red disc"})
        tar.write({"__key__": "latin", "png": picture, "txt": b"caf\xe9"})
        tar.write({"__key__": "cut", "png": picture, "json": b'{"caption": "a bl'})
    summary = ran(checkpoint, tmp_path, "--name", "tiny")
    assert (summary["embedded"], summary["images"], summary["texts"]) == (1, 3, 1)
    reasons = {failure["key"]: failure["reason"] for failure in summary["failures"]}
    assert reasons.keys() == {"latin", "cut"}
    assert "'txt' is not UTF-8 text" in reasons["latin"]
    assert "'json' is not JSON" in reasons["cut"]


def test_parts_and_an_own_folder_and_captions_only(ran, checkpoint, shards, tmp_path):
    options = ["--name", "tiny", "--out", tmp_path / "out", "--only", "text"]
    first = ran(checkpoint, shards, *options, "--part", "1/2")
    assert (first["shards"], first["images"], first["texts"]) == (1, 0, 8)
    assert os.listdir(tmp_path / "out") == ["00000.tar.tiny.safetensors"]
    ran(checkpoint, shards, *options, "--part", "2/2")
    assert sorted(os.listdir(tmp_path / "out")) == ["00000.tar.tiny.safetensors", "00001.tar.tiny.safetensors"]
    assert not list(shards.glob("*.safetensors"))


def test_table_names_samples_that_could_not_be_embedded(checkpoint, toy_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    picture = open_source(str(toy_shards)).read(0).record["png"]
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "good", "png": picture, "txt": "a red disc"})
        tar.write({"__key__": "cut", "png": picture[:50], "txt": "a blue disc"})
    main(["embed", str(checkpoint), str(tmp_path), "--name", "tiny", "--accelerator", "cpu", "--num-workers", "0"])
    printed = capsys.readouterr().out
    assert "1: 1 embedded now, 0 kept" in printed
    line = next(line for line in printed.splitlines() if "│ cut " in line)
    assert "0.tar" in line
    assert "image" in line


def test_bf16_autocast_is_close_to_float32_and_not_equal(ran, checkpoint, shards):
    ran(checkpoint, shards, "--name", "full", "--precision", "fp32")
    ran(checkpoint, shards, "--name", "half", "--precision", "fp32", "--compute", "bf16")
    full, half = (EmbeddingFile(f"{shards}/00000.tar.{name}.safetensors") for name in ("full", "half"))
    difference = (full.all_rows("image") - half.all_rows("image")).abs().max()
    assert 0 < difference < 0.02
    assert half.head.encoder.compute == "bf16"


def test_another_checkpoint_under_the_name_is_refused_until_told(ran, refused, checkpoint, shards, folder, tmp_path):
    ran(checkpoint, shards, "--name", "tiny")
    stored = torch.load(checkpoint, weights_only=True)
    stored["state_dict"]["model.logit_bias"] += 1
    torch.save(stored, tmp_path / "other.ckpt")
    message = refused(tmp_path / "other.ckpt", shards, "--name", "tiny")
    assert f"of another checkpoint than {tmp_path}/other.ckpt" in message
    assert str(checkpoint) in message
    assert ran(tmp_path / "other.ckpt", shards, "--name", "tiny", "--overwrite")["embedded"] == 2


def test_shard_that_vanishes_is_reported_and_the_others_are_done(refused, checkpoint, shards, monkeypatch):
    read = type(open_source(str(shards))).read

    def vanished(self, i):
        if i == 3:
            raise OSError("disk fell off")
        return read(self, i)

    monkeypatch.setattr("siglip2.core.data.embed_shards.TarSource.read", lambda self, i: vanished(self, i))
    monkeypatch.setattr("siglip2.cli.embedding.check_source", lambda *_: None)
    monkeypatch.setattr("siglip2.cli.embedding.check_captions", lambda *_, **__: None)
    message = refused(checkpoint, shards, "--name", "tiny")
    assert "00000.tar could not be embedded: disk fell off" in message
    assert "1 of 2 shards could not be embedded" in message
    assert [path.name for path in shards.glob("*.safetensors")] == ["00001.tar.tiny.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ckpt}", "{data}", "--name", "a/b"], "--name is 'a/b', expected letters"),
        (["none.ckpt", "{data}", "--name", "a"], "no checkpoint at none.ckpt"),
        (["{ckpt}", "{data}/none", "--name", "a"], "nothing matches|no shard|not found|no folder"),
        (["{ckpt}", "{data}", "--name", "a", "--field", "caption=json.alt"], "--field NAME=SPEC"),
        (["{ckpt}", "{data}", "--name", "a", "--field", "caption"], "expected NAME=SPEC"),
        (["{ckpt}", "{data}", "--name", "a", "--captions", "synthetic"], "no field called 'synthetic'"),
        (["{ckpt}", "{data}", "--name", "a", "--part", "3/2"], "'3/2' is no part such as 1/8"),
        (["{ckpt}", "{data}", "--name", "a", "--batch-size", "0"], "'0' is no number of 1 or more"),
    ],
)
def test_what_cannot_be_done_is_said(refused, checkpoint, shards, arguments, message):
    complaint = refused(*(a.format(ckpt=checkpoint, data=shards) for a in arguments))
    assert any(part in complaint for part in message.split("|"))
    assert not list(shards.glob("*.safetensors"))


def test_patchifier_that_is_not_installed_is_named(refused, checkpoint, shards, tmp_path):
    stored = torch.load(checkpoint, weights_only=True)
    plugins = stored["siglip2"]["recipe"]["plugins"]
    plugins["hexagons"] = plugins.pop("fixed")
    torch.save(stored, tmp_path / "odd.ckpt")
    assert "with the plugins sigmoid, hexagons, of which 0 installed ones make patches" in refused(
        tmp_path / "odd.ckpt", shards, "--name", "a"
    )


@pytest.mark.dist
def test_two_processes_write_what_one_writes(ran, checkpoint, shards, tmp_path):
    ran(checkpoint, shards, "--name", "tiny", *FIELD)
    alone = {path.name: path.read_bytes() for path in shards.glob("*.safetensors")}
    for path in shards.glob("*.safetensors"):
        path.unlink()
    words = ["embed", checkpoint, shards, "--name", "tiny", *FIELD, "--accelerator", "cpu", "--devices", "2"]
    command = [sys.executable, "-m", "siglip2", *map(str, words), "--num-workers", "0", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["embedded"] == 2
    assert {path.name: path.read_bytes() for path in shards.glob("*.safetensors")} == alone


def test_module_of_a_checkpoint_has_no_scaffolding(checkpoint):
    module = load_module(str(checkpoint))
    assert list(module.plugins) == ["fixed"]
    batch = PATCHIFIER(torch.zeros(3, 40, 30, dtype=torch.uint8), IMAGE, PATCHIFIER.eval_layout(1))
    assert isinstance(batch, Patches)
    with torch.no_grad():
        assert torch.equal(
            module.model.eval().encode_image(batch).embedding, towers_in(checkpoint).encode_image(batch).embedding
        )
