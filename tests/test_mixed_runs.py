"""A run on a mixture sees what its recipe says, resumed or not, with any number of workers and ranks."""

import json
import logging
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from killable import Run, diary
from lightning.pytorch import Callback

from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.faults import FaultCounter
from siglip2.core.callbacks.source_counts import SourceCounts
from siglip2.core.data.source import open_source
from siglip2.core.data.weights import write_weights

BAD = 3  # of the source `left`


class Diary(Callback):
    """Notes the sample keys of every step and the counts that were logged."""

    def __init__(self):
        self.keys, self.logged = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keys[trainer.global_step] = batch.keys
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "data/" in name}


@pytest.fixture
def halves(toy_shards, tmp_path):
    """The two toy shards as sets of their own; `left` has weights, and a picture that is broken."""
    for number, name in enumerate(("left", "right")):
        (tmp_path / name).mkdir()
        shutil.copy(toy_shards / f"{number:05d}.tar", tmp_path / name / "0.tar")
    shard = tmp_path / "left" / "0.tar"
    content = shard.read_bytes()
    starts = [i for i in range(len(content)) if content.startswith(b"\x89PNG", i)]
    shard.write_bytes(content[: starts[BAD]] + b"broken" + content[starts[BAD] + 6 :])
    write_weights(open_source(str(tmp_path / "left")), "fair", np.array([1, 1, 1, 4, 1, 1, 1, 0]))
    return tmp_path


def sources(folder, **left):
    more = {"weights": "fair", "weight": 3, **left}
    return {"left": {"path": str(folder / "left"), **more}, "right": {"path": str(folder / "right"), "weight": 1}}


@pytest.fixture
def mixed(tiny_recipe, halves):
    """Makes the arguments of `siglip2 fit` on both halves."""
    at = tiny_recipe.index("--data.train.path")

    def made(**left):
        given = ["--data.train.sources", json.dumps(sources(halves, **left)), "--data.train.max_bad", "1"]
        return [*tiny_recipe[:at], *tiny_recipe[at + 2 :], *given]

    return made


def run(arguments, *extra):
    cli, diary, counts = SigLIP2CLI([*arguments, *extra], command="fit"), Diary(), SourceCounts()
    others = [c for c in cli.trainer.callbacks if not isinstance(c, SourceCounts)]
    cli.trainer.callbacks = [counts, diary, *others]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from())
    return diary, counts, cli


def seen(keys):
    """How many keys are those of each half."""
    return Counter("left" if int(key) < 8 else "right" for batch in keys.values() for key in batch)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_resumed_mixture_with_weights_and_bad_samples_repeats_the_stream_with_other_workers(mixed, tmp_path):
    whole, counts, cli = run(mixed(), "--data.num_workers", "0")
    middle = str(tmp_path / "step=5.ckpt")
    resumed, resumed_counts, _ = run(mixed(), "--data.num_workers", "3", "--ckpt_path", middle)
    assert resumed.keys == {step: keys for step, keys in whole.keys.items() if step > 5}
    assert counts.seen == resumed_counts.seen == dict(seen(whole.keys))
    used = {key for batch in whole.keys.values() for key in batch}
    assert f"{BAD:04d}" not in used  # broken, and had been the likeliest
    assert "0007" not in used  # has weight 0
    faults = next(c for c in cli.trainer.callbacks if isinstance(c, FaultCounter))
    assert faults.bad > 0
    assert all(line.startswith("left: ") for line in faults.examples)


def test_counts_of_each_source_are_logged_and_hold_the_shares(mixed):
    diary, counts, _ = run(mixed(), "--trainer.max_steps", "30")
    assert counts.seen == dict(seen(diary.keys))
    logged = diary.logged
    assert [logged["data/left"], logged["data/right"]] == [counts.seen["left"], counts.seen["right"]]
    assert logged["data/left_share"] == pytest.approx(counts.seen["left"] / 120)
    assert abs(counts.seen["left"] - 90) < 4 * (120 * 0.75 * 0.25) ** 0.5


def test_counts_are_taken_up_from_a_checkpoint_whose_sources_were_others(mixed, tmp_path):
    run(mixed(weight=1))
    stored = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]["SourceCounts"]["seen"]
    resumed, counts, _ = run(mixed(weight=1000), "--ckpt_path", str(tmp_path / "step=5.ckpt"))
    assert sum(stored.values()) == 20
    assert counts.seen == {name: stored[name] + seen(resumed.keys)[name] for name in stored}


def test_rows_of_all_ranks_together_are_those_of_one(mixed):
    data = SigLIP2CLI(mixed(), command="fit").datamodule
    whole = data.train_batches(max_batches=6)
    parts = [data.train_batches(max_batches=6, rank=rank, world_size=2) for rank in range(2)]
    for number in range(6):
        assert parts[0][number].keys + parts[1][number].keys == whole[number].keys


def test_run_on_one_set_logs_no_counts(tiny_recipe):
    diary, counts, _ = run(tiny_recipe)
    assert diary.logged == counts.seen == {}


def test_each_source_draws_captions_as_it_says(mixed):
    data = SigLIP2CLI(mixed(languages={"de": 1.0}), command="fit").datamodule
    batches = data.train_batches(max_batches=10)
    rows = [row for i in range(10) for row in zip(batches[i].keys, batches[i].views["caption"], strict=True)]
    texts = {key: data.tokenizer.decode(ids) for key, ids in rows}
    assert all("nummer" in text for key, text in texts.items() if int(key) < 8)
    assert any("number" in text for key, text in texts.items() if int(key) >= 8)


def test_resuming_with_another_share_is_logged_as_another_stream(mixed, tmp_path, caplog):
    run(mixed())
    for weight, told in ((3, False), (2, True)):
        cli = SigLIP2CLI(mixed(weight=weight), command="fit")
        logging.getLogger().addHandler(caplog.handler)  # the command line has put its own in place of it
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(tmp_path / "step=5.ckpt"))
        assert ("resuming with another stream of samples: data.train" in caplog.text) is told


@pytest.mark.slow
def test_curated_run_on_a_mixture_killed_and_resumed_with_other_workers_ends_as_one_that_was_not(mixed, tmp_path):
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    save = {"filename": "last", "every_n_train_steps": 1, "enable_version_counter": False}
    arguments = {}
    for name, folder in folders.items():
        folder.mkdir()
        save["dirpath"] = str(folder)
        callback = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": dict(save)}]
        more = {"--trainer.default_root_dir": folder, "--trainer.max_steps": 30, "--ckpt_path": "last"}
        more["--trainer.callbacks"] = json.dumps(callback)
        curated = {"score": "hard_learner", "n_chunks": 2, "groups": 1}  # of four rows, two are trained on
        more |= {f"--plugins.acid.{option}": value for option, value in curated.items()}
        arguments[name] = [*mixed(), *(str(word) for pair in more.items() for word in pair)]
    with Run(arguments["whole"], folders["whole"]) as whole:
        assert whole.exit_code() == 0
    for workers in range(3):
        with Run([*arguments["killed"], "--data.num_workers", str(workers)], folders["killed"]) as killed:
            assert killed.until("step", 6) is not None
            killed.send(signal.SIGKILL)
            assert killed.exit_code() == -signal.SIGKILL
    with Run(arguments["killed"], folders["killed"]) as killed:
        assert killed.exit_code() == 0
    assert diary(folders["killed"]) == diary(folders["whole"])


@pytest.fixture
def failed(capsys):
    def message(*arguments):
        with pytest.raises(SystemExit) as error:
            main(["fit", *map(str, arguments)])
        assert error.value.code == 2
        return capsys.readouterr().err

    return message


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"weight": 0}, "data.train.sources.left.weight is 0, expected a share above 0"),
        ({"weight": None}, "data.train.sources.left has no weight: give each source its share"),
        ({"path": "nowhere.tar"}, "no shard nowhere.tar; "),
        ({"weights": "far"}, "no weights 'far' for "),
        ({"fields": {"caption": "json.title"}}, "no caption in the first"),
        (
            {"captions": {"alt": 1}},
            "data.train.sources.left.captions names 'alt', which is no field with captions",
        ),
        ({"captions": {"caption": -1}}, "data.train.sources.left.captions.caption is -1, expected a share above 0"),
        ({"captions": {}}, "data.train.sources.left.captions is empty"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_wrong_source_is_refused_before_training_by_its_name(failed, mixed, left, expected):
    message = failed(*mixed(**left))
    assert expected in message
    assert "data.train.sources.left" in message


def test_unknown_key_of_a_source_is_refused(failed, mixed):
    assert "Option 'langages.de' is not accepted" in failed(*mixed(langages={"de": 1}))


def test_path_and_sources_together_are_refused(failed, mixed, toy_shards):
    message = failed(*mixed(), "--data.train.path", toy_shards)
    assert "data.train has both path and sources" in message


def test_no_sources_are_refused(failed, tiny_recipe):
    at = tiny_recipe.index("--data.train.path")
    message = failed(*tiny_recipe[:at], *tiny_recipe[at + 2 :], "--data.train.sources", "{}")
    assert "data.train needs the option 'path', or 'sources' by name" in message


def test_source_without_samples_is_refused_by_its_name(failed, mixed, tmp_path):
    (tmp_path / "empty").mkdir()
    message = failed(*mixed(path=str(tmp_path / "empty"), weights=None))
    assert "no pictures" in message
    assert "in data.train.sources.left" in message
