"""A recipe's data: views merged, tokenizer and seed found, public layouts read as they are."""

import json
import logging
from dataclasses import dataclass

import lightning
import pytest
import torch
from toy_samples import picture
from webdataset import TarWriter

from siglip2 import Plugin, TextView, hookimpl
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.data.datamodule import SigLIP2Data, read_tokenizer
from siglip2.core.data.fields import Fields
from siglip2.core.data.settings import RetrievalSet, SourceSet, TextOptions, TrainSet, ZeroShotSet
from siglip2.core.data.text import Tokenizer
from siglip2.core.layout import phases
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import tiny_tokenizer


class German(Plugin):
    """Reads captions too, but other ones."""

    name = "german"

    @hookimpl
    def views(self):
        return [TextView("caption", language="de")]


class Again(German):
    """Reads the very captions that the objective reads."""

    name = "again"

    @hookimpl
    def views(self):
        return [TextView("caption")]


@dataclass(frozen=True)
class DarkView:
    """A view that takes no sample."""

    name: str = "dark"
    copies: int = 1

    def __call__(self, sample, context):
        raise sample.bad("too dark")


@pytest.fixture
def data(toy_tokenizer):
    """Makes the data of a recipe; `data(path, plugins, ...)`."""

    def make(path=None, plugins=(), **more):
        train = None if path is None else TrainSet(str(path))
        recipe = [Fixed(image_size=32, batch_size=4), Sigmoid(), *plugins]
        return SigLIP2Data(recipe, str(toy_tokenizer), TextOptions(length=16), train=train, seed=0, **more)

    return make


def test_one_view_described_twice_is_an_error_that_prints_both(data):
    recipe = data(plugins=[German()])
    with pytest.raises(ValueError) as error:
        recipe.views_of(phases(recipe.recipe_plugins)[0])
    for view in (CAPTION, TextView("caption", language="de")):
        assert repr(view) in str(error.value)


def test_one_view_described_alike_is_made_once(data):
    recipe = data(plugins=[Again()])
    assert recipe.views_of(phases(recipe.recipe_plugins)[0]) == (IMAGE, CAPTION)


def test_view_of_a_plugin_that_sleeps_is_not_made(data):
    recipe = data(plugins=[German(start=0.5)])
    assert recipe.views_of(phases(recipe.recipe_plugins)[0]) == (IMAGE, CAPTION)


def test_tokenizer_of_a_checkpoint_is_the_one_it_was_trained_with(tmp_path):
    trained = tiny_tokenizer(12)
    torch.save({"siglip2": {"text": trained.to_state()}}, tmp_path / "a.ckpt")
    found = read_tokenizer(str(tmp_path / "a.ckpt"), TextOptions(length=64, lowercase=False))
    assert found.differences(trained) == []
    assert found("A gold DISC").tolist() == trained("a gold disc").tolist()


def test_tokenizer_of_a_file_follows_the_recipes_text_options(toy_tokenizer):
    found = read_tokenizer(str(toy_tokenizer), TextOptions(length=7, canonicalize=True))
    assert found.differences(Tokenizer.load(toy_tokenizer, length=7, canonicalize=True)) == []


def test_seed_null_takes_that_of_seed_everything(toy_tokenizer, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that the one set below goes with this test
    with torch.random.fork_rng(devices=[]):
        lightning.seed_everything(11, verbose=False)
    recipe = [Fixed(image_size=32), Sigmoid()]
    assert SigLIP2Data(recipe, str(toy_tokenizer)).seed == 11
    assert SigLIP2Data(recipe, str(toy_tokenizer), seed=5).seed == 5


def test_command_line_seeds_the_data_whose_seed_is_null(tiny_recipe, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    cli = SigLIP2CLI([*tiny_recipe, "--seed_everything", "9", "--data.seed", "null"], command="fit")
    assert cli.datamodule.seed == 9


def test_zero_shot_and_retrieval_set_of_one_name_are_an_error(data):
    with pytest.raises(ValueError, match="'toys' names a zero-shot set and a retrieval set: rename one of them"):
        data(zero_shot={"toys": ZeroShotSet("a", "b")}, retrieval={"toys": RetrievalSet("a")})


def test_missing_training_data_is_an_error_that_names_the_option(data):
    with pytest.raises(ValueError, match=r"data\.train is not set: give at least data\.train\.path"):
        _ = data().train_source


@pytest.fixture
def datacomp(tmp_path):
    """Two shards of four samples as DataComp's download script leaves them, parquet and statistics beside each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with open(folder / f"{shard:08d}.tar", "wb") as file, TarWriter(file) as tar:
            for number in range(4):
                key = f"{shard:08d}{number:04d}"
                meta = {
                    "uid": f"{7919 * (4 * shard + number + 1):032x}",
                    "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
                    "bboxes": [],
                    "caption": f"text {shard} {number}",
                    "url": f"https://example.org/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 6,
                    "height": 4,
                    "original_width": 60,
                    "original_height": 40,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                tar.write({"__key__": key, "jpg": picture(number), "txt": f"text {shard} {number}", "json": meta})
        (folder / f"{shard:08d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:08d}_stats.json").write_text(json.dumps({"count": 4, "successes": 4}))
    return folder


def trained_on(recipe, num_samples, batch_size=4):
    """Key -> caption of one epoch, through the training loader's own batches."""
    batches = recipe.train_batches(max_batches=num_samples // batch_size)
    rows = [
        (key, row)
        for i in range(len(batches))
        for key, row in zip(batches[i].keys, batches[i].views["caption"], strict=True)
    ]
    assert not any(batches[i].faults for i in range(len(batches)))
    return {key: recipe.tokenizer.decode(row) for key, row in rows}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".index"}


def test_datacomp_shards_train_as_they_are(data, datacomp):
    before = contents(datacomp)
    texts = {f"{shard:08d}{number:04d}": f"text {shard} {number}" for shard in range(2) for number in range(4)}
    assert trained_on(data(datacomp), 8) == texts
    assert contents(datacomp) == before


def test_img2dataset_shards_train_as_they_are(data, shards):
    before = contents(shards)
    assert trained_on(data(shards), 12) == {f"{i:09d}": f"text {i} 猫" for i in range(12)}
    assert contents(shards) == before


def test_before_a_run_every_set_is_looked_at_and_counted_against_its_readers(data, toy_shards, caplog):
    pairs = {"pairs": RetrievalSet(str(toy_shards), languages=["en"], fields=Fields(caption="json.caption"))}
    with caplog.at_level(logging.INFO):
        data(toy_shards, retrieval=pairs, num_workers=2).setup("fit")
        data(toy_shards, num_workers=3).setup("fit")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("data: 16 samples in 2 shards for 1 rank x 2 workers; evaluation: pairs 16 (checked in ")
    assert "2 shards for 1 rank x 3 workers, which share shards: samples are read at random" in second


def test_before_a_run_the_shares_of_a_mixture_are_told(toy_shards, toy_tokenizer, caplog):
    sources = {"one": SourceSet(str(toy_shards), 3), "two": SourceSet(f"{toy_shards}/00001.tar", 1)}
    train = TrainSet(sources=sources, fields=Fields(caption="json.caption"))
    recipe = [Fixed(image_size=32, batch_size=4), Sigmoid()]
    with caplog.at_level(logging.INFO):
        SigLIP2Data(recipe, str(toy_tokenizer), TextOptions(length=16), train=train, seed=0).setup("fit")
    assert caplog.messages[0].startswith("data: 24 samples in 3 shards, mixed 0.75 one (16) + 0.25 two (8), for 1 rank")


def test_before_a_run_a_sample_that_no_view_can_be_made_of_is_named_with_its_shard_and_view(data, toy_shards):
    class Dark(Plugin):
        """Reads what no picture has."""

        name = "dark"

        @hookimpl
        def views(self):
            return [DarkView()]

    with pytest.raises(ValueError) as error:
        data(toy_shards, [Dark(start=0.5)]).setup("fit")
    message = str(error.value)
    assert f"none of the first 2 samples of a shard can be used. {toy_shards}/00000.tar: sample '0000'" in message
    assert f"while making the view 'dark' of {toy_shards}/00000.tar, key 0000" in message


def test_before_a_run_an_evaluation_set_without_its_field_is_refused(data, toy_shards, tmp_path):
    with open(tmp_path / "a.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "0", "jpg": picture(0)})
    pairs = {"pairs": RetrievalSet(str(tmp_path / "a.tar"))}
    with pytest.raises(ValueError, match=r"a\.tar: no caption in the first 1 samples of a shard.*sample '0'"):
        data(toy_shards, retrieval=pairs).setup("fit")
