"""What evaluation callbacks share: the same three calls under `validate`, `test` and during `fit`."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.batch import Batch


class Evaluation(Callback, ABC):
    """A callback that scores the embeddings of evaluation sets; it starts, updates per batch, and finishes.

    Attributes:
        step: optimizer steps of the weights that were scored last; -1 before the first time.
    """

    step: int = -1

    @abstractmethod
    def begin(self, module: Any, data: Any) -> None:
        """Prepares the metrics of every set; `data` is the datamodule."""

    @abstractmethod
    def update(self, dataset: str, embedded: dict[str, Any], batch: Batch) -> None:
        """Takes the embeddings of one batch of the set called `dataset`."""

    @abstractmethod
    def finish(self) -> dict[str, float]:
        """Returns the scores over all ranks, by name of the logged metric."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        name = list(trainer.datamodule.eval_sets)[dataloader_idx]  # type: ignore[attr-defined]
        self.update(name, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = self.finish()
        self.step = trainer.global_step
        if not trainer.sanity_checking:
            pl_module.log_dict(scores, sync_dist=True)  # they agree over ranks already; Lightning asks to be told

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
