"""Saves when the system asks for it: SIGUSR1 saves and goes on, SIGTERM saves and stops."""

import logging
import signal
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, XLAEnvironment

log = logging.getLogger(__name__)
SAVE, STOP = "SIGUSR1", "SIGTERM"
STOPPED = 128 + 15  # what a shell calls the end of a program by SIGTERM


class SaveOnSignal(Callback):
    """Saves `last.ckpt` after the step in which a signal came, on every rank the same step.

    SIGUSR1 saves and goes on; SIGTERM saves and ends the program with status 143. It takes one rank that gets the
    signal. Lightning's own handlers are replaced: they save in the middle of a step, or talk to other ranks there. What
    they do under SLURM (a job that puts itself back into the queue) is done at the end of the step instead. A SIGTERM
    during validation cuts it short; a resumed run does not make up for it.

    Args:
        every: steps between two questions to the other ranks, since to ask makes a device wait; one rank alone asks
            nobody. A scheduler has to leave the time for so many steps between SIGTERM and SIGKILL.
        dirpath: folder or URL; null takes trainer.default_root_dir.
    """

    def __init__(self, every: int = 10, dirpath: str | None = None):
        if every < 1:
            raise ValueError(f"SaveOnSignal: every is {every}, expected a number of steps, at least 1")
        self.every, self.dirpath = every, dirpath
        self._came: set[str] = set()
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
            return
        # Lightning has put its handlers there between `on_fit_start` and now, and takes ours away in the end
        self._came = {STOP} if trainer.received_sigterm else set()
        self._before = signal.getsignal(signal.SIGUSR1)
        for name in (SAVE, STOP):
            signal.signal(getattr(signal, name), lambda number, frame: self._came.add(signal.Signals(number).name))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # else gradients would be lost
            self._answer(trainer, trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._answer(trainer, batch_idx + 1)

    def _answer(self, trainer: Trainer, count: int) -> None:
        if trainer.world_size > 1:
            if count % self.every:
                return
            self._came |= self._of_all_ranks(trainer)
        if not self._came:
            return
        came, self._came = self._came, set()
        path = f"{(self.dirpath or trainer.default_root_dir).rstrip('/')}/last.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            what = "stopping" if STOP in came else "going on"
            log.warning("%s: saved step %d, %s. To resume: --ckpt_path %s", max(came), trainer.global_step, what, path)
        if SAVE in came and callable(self._before):
            self._before(signal.SIGUSR1, None)
        if STOP in came:
            raise SystemExit(_status(trainer))

    def _of_all_ranks(self, trainer: Trainer) -> set[str]:
        here = torch.tensor([float(name in self._came) for name in (SAVE, STOP)], device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(here, reduce_op="sum").tolist()
        return {name for name, count in zip((SAVE, STOP), counts, strict=True) if count}


def _status(trainer: Trainer) -> int:
    """143, which torchrun and SLURM are told by every process; 0 of those that Lightning has started.

    Its launcher kills the process that started them as soon as one of them fails, before it has come to its own end.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if trainer.local_rank and isinstance(environment, LightningEnvironment | XLAEnvironment) else STOPPED
