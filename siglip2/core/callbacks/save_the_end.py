"""Saves the last step of a run, which the interval of a ModelCheckpoint rarely hits."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class SaveTheEnd(Callback):
    """Lets every ModelCheckpoint save once more when training ends, unless it has just saved that step."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved != trainer.global_step:
                candidates = callback._monitor_candidates(trainer)
                callback._save_topk_checkpoint(trainer, candidates)
                callback._save_last_checkpoint(trainer, candidates)
