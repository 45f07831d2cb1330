"""The progress bar of a run."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """A rich progress bar that reads the loss terms only when it redraws: reading them makes the device wait.

    Args:
        refresh_rate: steps between two redraws; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 10):
        super().__init__(refresh_rate=refresh_rate)

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_disabled:
            return
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step >= trainer.max_steps:
            super()._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Returns what is shown beside the bar, without the number of the log folder."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
