"""kill -9 at any moment, also inside a write: the run that is resumed each time ends as one that was never killed."""

import os
import random
import signal
import time

import pytest
from killable import Run, assert_same_checkpoint, diary
from staged import arguments

from siglip2.core.checkpoint import ABANDONED_S, AtomicCheckpointIO, newest_checkpoint

KILLS = 20
STEPS = 60
AWAKE = 0.25  # of the steps, from where on the self-supervised losses are there


@pytest.fixture
def recipe(toy_shards, toy_tokenizer):
    """Arguments for a run with all losses, the self-supervised ones from a quarter on, and two workers; by folder."""

    def made(folder):
        folder.mkdir()
        save = {"dirpath": str(folder), "filename": "last", "every_n_train_steps": 1, "enable_version_counter": False}
        callback = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}]
        more = {"--trainer.max_steps": STEPS, "--data.num_workers": 2, "--trainer.callbacks": callback}
        more |= {f"--plugins.{name}.start": AWAKE for name in ("ema_teacher", "silc", "tips")}
        words = [str(word) for pair in more.items() for word in pair]
        return [*arguments(toy_shards, toy_tokenizer, folder), *words]

    return made


@pytest.mark.slow
def test_run_killed_twenty_times_ends_bitwise_as_one_that_was_not(recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Run(recipe(whole), whole) as run:
        assert run.exit_code() == 0
    again = [*recipe(killed), "--ckpt_path", "last"]
    moments, reached = random.Random(0), []
    for number in range(KILLS):
        planted = reached[-1] + 2 if number == KILLS // 2 else None
        with Run(again, killed, die_in_write=planted) as run:
            step = run.until("step", 1 + moments.randrange(3) * (planted is None))
            if planted is None:
                time.sleep(moments.uniform(0, 0.05))  # about a step, in some part of which is written
                run.send(signal.SIGKILL)
            assert run.exit_code() == -signal.SIGKILL
            reached.append(step)
    assert reached == sorted(reached)
    assert reached[-1] > AWAKE * STEPS
    with Run(again, killed) as run:
        assert run.exit_code() == 0
    assert diary(killed) == diary(whole)
    assert_same_checkpoint(killed / "last.ckpt", whole / "last.ckpt")


def test_half_written_file_of_a_killed_run_is_cleared_away_by_a_later_write_and_a_fresh_one_is_not(tmp_path):
    for pid, age in {1: ABANDONED_S + 60, 2: 0}.items():
        partial = tmp_path / f".last.ckpt.{pid}.partial"
        partial.write_bytes(b"half")
        os.utime(partial, (time.time() - age,) * 2)
    AtomicCheckpointIO().save_checkpoint({"siglip2": {}}, f"file://{tmp_path}/last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".last.ckpt.2.partial", "last.ckpt"]
    assert newest_checkpoint([str(tmp_path), str(tmp_path / "none")]) == str(tmp_path / "last.ckpt")
