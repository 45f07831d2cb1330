"""SIGUSR1 saves and goes on, SIGTERM saves and stops, on all ranks the same step; both resume to the bit."""

import json
import signal
import socket

import pytest
import torch
from killable import Run, assert_same_checkpoint, diary
from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.save_on_signal import SaveOnSignal


@pytest.fixture
def recipe(toy_shards, tiny_recipe):
    """Arguments of a run of ten steps that saves nothing before its end, and a retrieval set; by folder."""

    def made(folder):
        folder.mkdir(exist_ok=True)
        end = {"dirpath": str(folder), "filename": "end", "every_n_train_steps": 100}
        callback = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": end}]
        pairs = {"pairs": {"path": str(toy_shards), "languages": ["en"], "fields": {"caption": "json.caption"}}}
        more = {
            "--trainer.default_root_dir": str(folder),
            "--trainer.callbacks": json.dumps(callback),
            "--data.retrieval": json.dumps(pairs),
            "--trainer.limit_val_batches": "1.0",
            "--trainer.val_check_interval": "4",
            "--data.eval_batch_size": "4",
        }
        return [*tiny_recipe, *(word for pair in more.items() for word in pair)]

    return made


@pytest.fixture
def whole(recipe, tmp_path):
    """The folder of a run that got no signal."""
    with Run(recipe(tmp_path / "whole"), tmp_path / "whole") as run:
        assert run.exit_code() == 0
    return tmp_path / "whole"


def test_sigusr1_saves_and_goes_on_and_sigterm_saves_and_stops(recipe, whole, tmp_path):
    folder = tmp_path / "signalled"
    with Run(recipe(folder), folder, pause=3) as run:
        run.until("paused")
        run.send(signal.SIGUSR1)
        run.go_on()
        assert run.exit_code() == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    assert "SIGUSR1: saved step 3, going on" in (folder / "0.log").read_text()
    assert_same_checkpoint(folder / "end.ckpt", whole / "end.ckpt")
    (folder / "end.ckpt").unlink()
    again = [*recipe(folder), "--ckpt_path", "last"]
    with Run(again, folder, pause=5) as run:
        run.until("paused")
        run.send(signal.SIGTERM)
        run.go_on()
        assert run.exit_code() == 128 + signal.SIGTERM
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 5
    assert "To resume: --ckpt_path" in (folder / "0.log").read_text()
    with Run(again, folder) as run:
        assert run.exit_code() == 0
    assert diary(folder) == diary(whole)
    assert_same_checkpoint(folder / "end.ckpt", whole / "end.ckpt")


def test_sigterm_during_validation_is_answered_there_and_resumes_bitwise(recipe, whole, tmp_path):
    folder = tmp_path / "validating"
    with Run(recipe(folder), folder) as run:
        assert run.until("validation") == 4
        run.send(signal.SIGTERM)
        assert run.exit_code() == 128 + signal.SIGTERM
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] in (4, 5)  # the signal may come late
    with Run([*recipe(folder), "--ckpt_path", "last"], folder) as run:
        assert run.exit_code() == 0
    assert diary(folder) == diary(whole)
    assert_same_checkpoint(folder / "end.ckpt", whole / "end.ckpt")


@pytest.mark.dist
def test_signal_to_one_rank_makes_all_ranks_save_the_same_step_and_stop(recipe, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = tmp_path / "ranks"
    own = [{"class_path": "siglip2.core.callbacks.save_on_signal.SaveOnSignal", "init_args": {"every": 3}}]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.callbacks", json.dumps(own)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [*recipe(folder), *ranks, "--trainer.limit_val_batches", "0"]
    with (
        Run(arguments, folder, environment={**address, "LOCAL_RANK": "0"}) as first,
        Run(arguments, folder, environment={**address, "LOCAL_RANK": "1"}, pause=4) as second,
    ):
        second.until("paused")
        second.send(signal.SIGTERM)
        second.go_on()
        assert (first.exit_code(), second.exit_code()) == (128 + signal.SIGTERM, 0)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert max(diary(folder, 0)) == max(diary(folder, 1)) == 6


@pytest.mark.dist
def test_signal_to_one_rank_of_fsdp2_saves_a_whole_checkpoint_and_torchrun_sees_every_rank_end_by_it(
    recipe, whole, tmp_path
):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = tmp_path / "sharded"
    own = [{"class_path": "siglip2.core.callbacks.save_on_signal.SaveOnSignal", "init_args": {"every": 3}}]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    arguments = [*recipe(folder), *ranks, "--trainer.callbacks+", json.dumps(own)]
    torchrun = {"TORCHELASTIC_RUN_ID": "here", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        Run(arguments, folder, environment={**torchrun, "RANK": "0", "LOCAL_RANK": "0"}) as first,
        Run(arguments, folder, environment={**torchrun, "RANK": "1", "LOCAL_RANK": "1"}, pause=5) as second,
    ):
        second.until("paused")
        second.send(signal.SIGTERM)
        second.go_on()
        assert (first.exit_code(), second.exit_code()) == (128 + signal.SIGTERM, 128 + signal.SIGTERM)
    assert max(diary(folder, 0)) == max(diary(folder, 1)) == 6
    with Run([*recipe(folder), "--ckpt_path", "last"], folder) as one_process:
        assert one_process.exit_code() == 0
    losses, wanted = ([float.fromhex(diary(f)[step]["loss"]) for step in (7, 8, 9, 10)] for f in (folder, whole))
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_handler_that_was_there_before_is_called_at_the_end_of_the_step_when_all_is_saved(tiny_recipe, tmp_path):
    """As Lightning's under SLURM, which puts the job back into the queue."""
    seen = []

    class Interrupted(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGUSR1)
                seen.append(("in the step", (tmp_path / "last.ckpt").exists()))

    cli = SigLIP2CLI([*tiny_recipe, "--trainer.max_steps", "4"], command="fit")
    cli.trainer.callbacks.insert(0, Interrupted())
    old = signal.signal(
        signal.SIGUSR1,
        lambda *_: seen.append((cli.trainer.global_step, (tmp_path / "last.ckpt").exists())),
    )
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        assert signal.getsignal(signal.SIGUSR1).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen == [("in the step", False), (3, True)]
    assert cli.trainer.global_step == 4


def test_recipe_may_set_its_own_options(tiny_recipe):
    own = [{"class_path": "siglip2.core.callbacks.save_on_signal.SaveOnSignal", "init_args": {"every": 3}}]
    cli = SigLIP2CLI([*tiny_recipe, "--trainer.callbacks", json.dumps(own)], command="fit")
    assert [c.every for c in cli.trainer.callbacks if isinstance(c, SaveOnSignal)] == [3]


def test_number_of_steps_between_two_looks_is_at_least_one():
    with pytest.raises(ValueError, match="every is 0, expected a number of steps, at least 1"):
        SaveOnSignal(every=0)
