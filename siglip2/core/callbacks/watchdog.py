"""Says what a run is waiting for when nothing happens: which rank, which loader worker, which shard and sample."""

import logging
import sys
import threading
import time
import traceback
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)
CALLS = 5  # of the thread that trains that are shown
LOOKS = 4  # in the time after which it speaks


class Watchdog(Callback):
    """Writes to the log what a run hangs on, again and again until it goes on; it never stops a run.

    A thread looks at when the training loop last went from one hook to the next. If that is too long ago, it says where
    the loop is and what each loader worker of this rank is reading, by shard and key. Ranks tell each other through the
    store of torch.distributed, or that of the strategy, how far they are, so that the first one can name those that did
    not reach the step.

    Args:
        stall_after: seconds without progress. Less than the time-out of the collectives (10 minutes with NCCL), which
            ends the process; more than the first step takes to compile.

    Raises:
        ValueError: if the time is not positive.
    """

    def __init__(self, stall_after: float = 300.0):
        if stall_after <= 0:
            raise ValueError(f"Watchdog: stall_after is {stall_after}, expected seconds, more than 0")
        self.stall_after = stall_after
        self._now = ("starting", 0, 0.0)
        self._stop: threading.Event | None = None
        self._ranks: Ranks | None = None
        self._trains: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("waiting for the first batch", trainer)
        self._ranks = _ranks_of(trainer)
        self._trains = threading.get_ident()  # the main thread, but for XLA replicas
        # the workers of the training loader have been started, so that no thread is copied into them
        self._stop = threading.Event()
        boards = getattr(getattr(trainer, "datamodule", None), "boards", {})
        arguments = (self._stop, trainer.global_rank, boards)
        threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._beat(f"in training step {trainer.global_step}", trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        others = " or another rank" if trainer.world_size > 1 else ""
        self._beat(f"waiting for batch {batch_idx + 1}{others}", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._beat("saving a checkpoint", trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._beat(f"in batch {batch_idx} of validation set {dataloader_idx}", trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._beat(f"past batch {batch_idx} of validation set {dataloader_idx}", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("past validation", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _beat(self, doing: str, trainer: Trainer) -> None:
        self._now = (doing, trainer.global_step, time.monotonic())  # one assignment: the thread sees all or nothing

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()

    def _watch(self, stop: threading.Event, rank: int, boards: dict[str, Any]) -> None:
        told = 0.0
        while not stop.wait(self.stall_after / LOOKS):
            doing, step, since = self._now
            if self._ranks:
                self._ranks.tell(step, doing)
            now = time.monotonic()
            if now - since >= self.stall_after and now - told >= self.stall_after:
                told = now
                log.warning("%s", self._report(rank, boards))

    def _report(self, rank: int, boards: dict[str, Any]) -> str:
        doing, step, since = self._now
        still = f"{time.monotonic() - since:.0f} s, {doing}, at {_calls(self._trains)}"
        lines = [f"rank {rank}: nothing has happened for {still}"]
        for name, board in boards.items():
            lines += [f"  {name}, worker {n}: {what} for {age:.0f} s" for n, what, age in board.read()]
        if len(lines) == 1:
            lines.append("  no loader worker is reading anything: batches are ready, or the workers are gone")
        if self._ranks and rank == 0:
            lines += [f"  {line}" for line in self._ranks.behind(step, doing)]
        return "\n".join(lines)


class Ranks:
    """How far every rank is, by word of its watchdog through a store.

    Args:
        rank: this one.
        world_size: ranks that tell.
        store: shared by all of them; that of torch.distributed if None.
    """

    def __init__(self, rank: int, world_size: int, store: Any = None):
        self.rank, self.world_size = rank, world_size
        # a connection of its own: while the thread that trains waits at the other one, that is locked
        store = store or dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # type: ignore[union-attr] # all that ranks meet in have it, if not their base

    def tell(self, step: int, doing: str) -> None:
        """Says where this rank is; says nothing if the store is gone."""
        try:
            self._store.set(self._key(self.rank), f"{step}|{time.time()}|{doing}")
        except RuntimeError:
            log.debug("the store of the ranks cannot be reached")

    def behind(self, step: int, doing: str) -> list[str]:
        """Returns a line on every rank that has not come as far as a step, or is at it and waits for data."""
        try:
            words = {r: self._store.get(k).decode() for r, k in self._keys().items() if self._store.check([k])}
        except RuntimeError:
            return ["the store of the ranks cannot be reached: the process that holds it may be gone"]
        lines = []
        for rank in range(self.world_size):
            if rank not in words:
                lines.append(f"rank {rank} has said nothing yet")
                continue
            reached, when, what = words[rank].split("|", 2)
            if rank != self.rank and (int(reached), what) != (step, doing):
                lines.append(
                    f"rank {rank} after {reached} steps, {what}; it said so {time.time() - float(when):.0f} s ago"
                )
        return lines or ["all ranks are at the same place"]

    def _keys(self) -> dict[int, str]:
        return {rank: self._key(rank) for rank in range(self.world_size)}

    def _key(self, rank: int) -> str:
        return f"siglip2/watchdog/{rank}"


def _ranks_of(trainer: Trainer) -> Ranks | None:
    store = getattr(trainer.strategy, "store", None) if trainer.world_size > 1 else None
    if trainer.world_size == 1 or not (store or dist.is_initialized()):
        return None
    try:
        return Ranks(trainer.global_rank, trainer.world_size, store)
    except RuntimeError as error:  # a store without copies: each rank speaks for itself
        log.debug("the watchdogs of the ranks cannot talk: %s", error)
        return None


def _calls(thread: int | None) -> str:
    """Where a thread is: its innermost calls, the innermost first."""
    frame = sys._current_frames().get(thread or 0)
    calls = reversed(traceback.extract_stack(frame)[-CALLS:]) if frame else []
    return " < ".join(f"{'/'.join(c.filename.split('/')[-2:])}:{c.lineno} {c.name}" for c in calls) or "its end"
