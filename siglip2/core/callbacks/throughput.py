"""Images per second, and the share of time spent between steps, mostly waiting for the loader."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.batch import Batch


class Throughput(Callback):
    """Logs `images_per_s` over all ranks and `waiting`, the share of wall time between steps.

    Between steps a run waits for the loader; writing a checkpoint and other callbacks count, too.

    Args:
        every: steps over which both are averaged.
    """

    def __init__(self, every: int = 20):
        self.every = every
        self._images, self._steps, self._waited = 0, 0, 0.0
        self._since = self._idle_since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._idle_since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._waited += time.monotonic() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch.keys) * trainer.world_size  # a batch on XLA devices has the rows of all hosts
        self._steps += 1
        now = self._idle_since = time.monotonic()
        if self._steps == self.every:
            pl_module.log("images_per_s", self._images / (now - self._since), prog_bar=True, batch_size=batch.size)
            pl_module.log("waiting", self._waited / (now - self._since), batch_size=batch.size)
            self._images, self._steps, self._waited, self._since = 0, 0, 0.0, now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._steps, self._waited = 0, 0, 0.0
        self._since = self._idle_since = time.monotonic()
