"""A run that hangs says on what: which rank, which loader worker, which shard and key; and goes on when it can."""

import json
import pickle
import re
import socket
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from killable import Run
from torch.utils.data import DataLoader, get_worker_info

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.watchdog import Ranks, Watchdog
from siglip2.core.data.loader import Maker, Noticeboard, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.data.tar_source import TarSource
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.testing import TinySource, tiny_tokenizer

PATCHIFIER = FixedPatchifier(image_size=32, patch_size=16, batch_size=4, filter="bilinear", antialias=True)
SLOW = "0005"


class Stuck(TinySource):
    """The toy samples in two shards; one takes its time, once."""

    shards = ["a.tar", "b.tar"]

    def __init__(self, seconds):
        self.seconds = seconds

    def shard_sizes(self):
        return [4, 12]

    def read(self, i):
        if f"{i:04d}" == SLOW:
            time.sleep(self.seconds)
        return super().read(i)


class StuckAndNamed(Stuck):
    """The same, whose keys are known before samples are read."""

    def key(self, i):
        return f"{i:04d}"


def loader(source, workers):
    board = Noticeboard(workers)
    maker = Maker(source, PATCHIFIER, tiny_tokenizer(), seed=0, board=board)
    order = Order([16], 0, shuffle=False)
    batches = TrainBatches(maker, order, [(0.0, (IMAGE, CAPTION))], max_batches=4)
    return board, iter(
        DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=1 if workers else None)
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [(Stuck(6.0), "reading b.tar, sample 1 of it,"), (StuckAndNamed(6.0), f"reading b.tar, key {SLOW},")],
)
def test_board_shows_the_shard_and_sample_that_a_worker_is_stuck_in(source, expected):
    board, batches = loader(source, 2)
    next(batches)  # of worker 0; worker 1 makes the one with the slow sample
    while not (stuck := [(worker, text) for worker, text, age in board.read() if age > 1]):
        time.sleep(0.1)
    assert stuck == [(1, expected)]
    assert len(list(batches)) == 3
    assert board.read() == []


def test_board_that_is_pickled_for_no_worker_is_empty_and_its_own():
    board = Noticeboard(1)
    board.write("reading a")
    copy = pickle.loads(pickle.dumps(board))
    assert copy.read() == []
    copy.write("reading b")
    assert [text for _, text, _ in board.read()] == ["reading a"]


def test_run_that_waits_for_its_loader_names_worker_shard_and_key_and_goes_on(tiny_recipe, monkeypatch, capsys):
    read, slept = TarSource.read, []

    def slow(self, i):
        sample = read(self, i)
        if sample.key == SLOW and get_worker_info() and not slept:
            slept.append(i)
            time.sleep(5)
        return sample

    monkeypatch.setattr(TarSource, "read", slow)
    monkeypatch.setenv("COLUMNS", "400")
    cli = SigLIP2CLI([*tiny_recipe, "--data.num_workers", "1", "--trainer.max_steps", "5"], command="fit")
    dogs = [callback for callback in cli.trainer.callbacks if isinstance(callback, Watchdog)]
    assert [dog.stall_after for dog in dogs] == [300.0]
    dogs[0].stall_after = 1.0
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 5
    printed = capsys.readouterr().err
    assert re.search(r"rank 0: nothing has happened for \d+ s, waiting for batch \d+, at \S+:\d+ \w+", printed)
    assert re.search(r"train, worker 0: reading \S+/00000\.tar, key 0005, for \d+ s", printed)


def test_first_rank_names_the_ranks_that_have_not_come_as_far(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks = [Ranks(rank, 3) for rank in range(2)]
        ranks[0].tell(7, "in training step 7")
        ranks[1].tell(6, "waiting for batch 6")
        behind = ranks[0].behind(7, "in training step 7")
    finally:
        dist.destroy_process_group()
    assert re.fullmatch(r"rank 1 after 6 steps, waiting for batch 6; it said so \d+ s ago", behind[0])
    assert behind[1:] == ["rank 2 has said nothing yet"]


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rank_that_waits_for_another_one_names_it(tiny_recipe, tmp_path, strategy):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    own = [{"class_path": "siglip2.core.callbacks.watchdog.Watchdog", "init_args": {"stall_after": 2.0}}]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.callbacks", json.dumps(own)]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "COLUMNS": "400"}
    with (
        Run([*tiny_recipe, *ranks], tmp_path, environment={**environment, "LOCAL_RANK": "0"}) as first,
        Run([*tiny_recipe, *ranks], tmp_path, environment={**environment, "LOCAL_RANK": "1"}, pause=4) as second,
    ):
        second.until("paused")
        while "said so" not in (tmp_path / "0.log").read_text():
            time.sleep(0.2)
            assert first.process.is_alive()
        second.go_on()
        assert (first.exit_code(), second.exit_code()) == (0, 0)
    printed = (tmp_path / "0.log").read_text()
    assert re.search(r"rank 0: nothing has happened for \d+ s, waiting for batch 4 or another rank, at ", printed)
    assert re.search(r"rank 1 after 3 steps, in training step 3; it said so \d+ s ago", printed)


def test_watchdog_is_silent_while_the_run_goes_on(caplog):
    dog = Watchdog(stall_after=1.0)
    trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    dog.on_train_start(trainer, None)
    for batch in range(15):
        dog.on_train_batch_start(trainer, None, None, batch)
        time.sleep(0.1)
        dog.on_train_batch_end(trainer, None, None, None, batch)
    dog.on_train_end(trainer, None)
    assert caplog.text == ""


def test_time_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="stall_after is 0, expected seconds, more than 0"):
        Watchdog(stall_after=0)
