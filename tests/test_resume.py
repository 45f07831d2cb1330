"""A resumed run is the run that was never stopped, whatever the number of workers."""

import json
import logging
import time

import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import AsyncCheckpointIO

from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import AtomicCheckpointIO, read_checkpoint
from siglip2.core.data.order import Order


class Diary(Callback):
    """Notes the sample keys and the loss of every step."""

    def __init__(self):
        self.keys, self.losses = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keys[trainer.global_step] = batch.keys
        self.losses[trainer.global_step] = outputs["loss"].item()


def run(arguments, *extra):
    cli, diary = SigLIP2CLI([*arguments, *extra], command="fit"), Diary()
    cli.trainer.callbacks.append(diary)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from())
    return diary, {name: tensor.clone() for name, tensor in cli.model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    different = [name for name in state if not torch.equal(state[name], other[name])]
    assert not different, f"these differ after resuming: {different}"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ten_steps_are_five_and_five_resumed_bitwise(tiny_recipe, tmp_path, workers):
    whole, weights = run(tiny_recipe, "--data.num_workers", workers)
    middle = str(tmp_path / "step=5.ckpt")
    resumed, resumed_weights = run(tiny_recipe, "--data.num_workers", workers, "--ckpt_path", middle)
    assert resumed.keys == {step: keys for step, keys in whole.keys.items() if step > 5}
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


def test_run_killed_by_an_error_resumes_bitwise_from_its_last_checkpoint(tiny_recipe, tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    whole, weights = run(tiny_recipe, "--trainer.default_root_dir", str(tmp_path / "whole"))
    cli = SigLIP2CLI(tiny_recipe, command="fit")
    cli.trainer.callbacks.append(Crash())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    resumed, resumed_weights = run(tiny_recipe, "--ckpt_path", str(tmp_path / "step=5.ckpt"))
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_sample_order_does_not_depend_on_the_number_of_workers(tiny_recipe):
    keys = [run(tiny_recipe, "--data.num_workers", workers)[0].keys for workers in ("0", "1", "3")]
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 10


def test_checkpoint_carries_recipe_text_and_pixel_contract(tiny_recipe, tmp_path):
    run(tiny_recipe)
    ours = read_checkpoint(str(tmp_path / "step=10.ckpt"))["siglip2"]
    assert ours["recipe"]["plugins"]["fixed"]["image_size"] == 32
    assert ours["recipe"]["model"]["size"] == "tiny/16"
    assert ours["text"]["contract"]["length"] == 16
    assert ours["pixels"]["filter"] == "bilinear"


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_batches_of_all_ranks_together_do_not_depend_on_ranks_and_workers(tiny_recipe):
    """Other crops and captions would show in the views, which the loader's tests compare; here it is the recipe's."""

    def keys(workers, ranks):
        data = SigLIP2CLI([*tiny_recipe, "--data.num_workers", str(workers)], command="fit").datamodule
        shares = [data.train_batches(max_batches=6, rank=rank, world_size=ranks) for rank in range(ranks)]
        loaders = [data._loader(share) for share in shares]
        return [sum((batch.keys for batch in batches), ()) for batches in zip(*loaders, strict=True)]

    expected = Order([8, 8], 0).many(0, 24)[1]
    wanted = [tuple(f"{i:04d}" for i in expected[4 * n : 4 * n + 4]) for n in range(6)]
    for workers in (0, 1, 3):
        for ranks in (1, 2):
            assert keys(workers, ranks) == wanted


def test_last_is_the_newest_whole_checkpoint_or_a_fresh_start(tiny_recipe, tmp_path, caplog):
    fresh = SigLIP2CLI([*tiny_recipe, "--ckpt_path", "last"], command="fit")
    with caplog.at_level(logging.INFO):
        logging.getLogger().addHandler(caplog.handler)  # the command line has put its own in place of it
        assert fresh.resume_from() is None
        assert f"no checkpoint in {tmp_path} yet: starting from the beginning" in caplog.text
        run(tiny_recipe)
        logging.getLogger().addHandler(caplog.handler)
        (tmp_path / "step=10.ckpt").write_bytes((tmp_path / "step=10.ckpt").read_bytes()[:1000])
        (tmp_path / ".step=11.ckpt.1.partial").write_bytes(b"a write that was cut")
        assert fresh.resume_from() == str(tmp_path / "step=5.ckpt")
    assert "passed over a checkpoint: " in caplog.text


def test_last_without_a_recipe_is_refused_with_the_reason(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "last"])
    assert "looked for in the folder of a recipe: give its --config, too" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_run_in_a_bucket_is_resumed_from_its_url_bitwise(tiny_recipe, tmp_path):
    bucket = f"memory://{tmp_path.name}"
    there = [*tiny_recipe, "--trainer.default_root_dir", bucket]
    whole, weights = run(there)
    files = fsspec.filesystem("memory")
    assert {name.rpartition("/")[2] for name in files.ls(f"/{tmp_path.name}", detail=False)} >= {
        "step=5.ckpt",
        "step=10.ckpt",
    }
    assert read_checkpoint(f"{bucket}/step=5.ckpt")["global_step"] == 5
    files.rm(f"/{tmp_path.name}/step=10.ckpt")
    resumed, resumed_weights = run(there, "--ckpt_path", "last")
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


def test_checkpoints_written_beside_training_are_those_of_their_step(tiny_recipe, tmp_path, monkeypatch):
    save = AtomicCheckpointIO.save_checkpoint

    def late(self, *args, **kwargs):
        time.sleep(0.5)  # meanwhile training has gone on
        save(self, *args, **kwargs)

    _, weights = run(tiny_recipe, "--trainer.default_root_dir", str(tmp_path / "plain"))
    plugin = json.dumps([{"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO"}])
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", late)
    beside, _ = run(tiny_recipe, "--trainer.plugins", plugin)
    monkeypatch.undo()
    for step in (5, 10):
        a, b = (read_checkpoint(str(folder / f"step={step}.ckpt")) for folder in (tmp_path, tmp_path / "plain"))
        assert_same(a["state_dict"], b["state_dict"])
    resumed, resumed_weights = run(tiny_recipe, "--ckpt_path", str(tmp_path / "step=5.ckpt"))
    assert resumed.losses == {step: loss for step, loss in beside.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


def test_asynchronous_writer_writes_atomically(tiny_recipe):
    plugin = json.dumps([{"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO"}])
    cli = SigLIP2CLI([*tiny_recipe, "--trainer.plugins", plugin], command="fit")
    writer = cli.trainer.strategy.checkpoint_io
    assert isinstance(writer, AsyncCheckpointIO)
    assert isinstance(writer.checkpoint_io, AtomicCheckpointIO)


def test_checkpoints_are_saved_every_so_many_minutes(tiny_recipe, tmp_path):
    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(0.5)

    init = {"dirpath": str(tmp_path), "filename": "{step}", "train_time_interval": "0:00:02", "save_top_k": -1}
    init["every_n_train_steps"] = None  # else that of the recipe below stays
    callback = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}]
    cli = SigLIP2CLI([*tiny_recipe, "--trainer.callbacks", json.dumps(callback)], command="fit")
    cli.trainer.callbacks.append(Slow())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    saved = sorted(int(path.stem.partition("=")[2]) for path in tmp_path.glob("step=*.ckpt"))
    assert saved[-1] == 10
    assert 2 <= len(saved) <= 4


@pytest.mark.parametrize("ended", [7, 10])  # saved when training had ended, and within its last step
@pytest.mark.parametrize("longer", [12, 20])
def test_run_that_had_ended_goes_on_with_more_steps_where_it_stopped(tiny_recipe, ended, longer):
    whole, _ = run(tiny_recipe, "--trainer.max_steps", str(longer))
    main(["fit", *tiny_recipe, "--trainer.max_steps", str(ended), "--report", "false"])
    more, _ = run(tiny_recipe, "--trainer.max_steps", str(longer), "--ckpt_path", "last")
    assert more.keys == {step: keys for step, keys in whole.keys.items() if step > ended}
    assert len(more.keys) == longer - ended
