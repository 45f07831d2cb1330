"""Checkpoints at exact shares of a run, where branches begin."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

ROUNDING = 1e-9


class SaveAtProgress(Checkpoint):
    """Saves `progress-0.95.ckpt` and the like after the step that reaches each share of the whole run.

    SigLIP 2 turns on self-supervised losses at 80 %, and branches at 90 % into NaFlex (section 2.4.2) and at 95 % into
    every fixed resolution (2.4.1).

    Args:
        fractions: shares of the run, in (0, 1).
        dirpath: folder; null takes trainer.default_root_dir.

    Raises:
        ValueError: if a fraction is not between 0 and 1.
    """

    def __init__(self, fractions: list[float] = [0.8, 0.9, 0.95], dirpath: str | None = None):  # noqa: B006
        if not all(0 < fraction < 1 for fraction in fractions):
            raise ValueError(f"SaveAtProgress: expected fractions between 0 and 1 (0.95 is 95 %), found {fractions}")
        self.fractions, self.dirpath = sorted(fractions), dirpath
        self._reached = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reached = self._progress(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._progress(trainer, pl_module)
        due = [fraction for fraction in self.fractions if self._reached < fraction <= now]
        self._reached = now
        for fraction in due:
            trainer.save_checkpoint(f"{self.dirpath or trainer.default_root_dir}/progress-{fraction:g}.ckpt")

    def _progress(self, trainer: Trainer, pl_module: Any) -> float:
        progress: float = pl_module.timeline.progress(trainer.global_step, trainer.max_steps)
        return progress + ROUNDING
