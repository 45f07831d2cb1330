"""Counts how many examples of each source of a mixture were trained on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.batch import Batch
from siglip2.core.data.mixture import Mixture
from siglip2.core.layout import Positions


class SourceCounts(Callback):
    """Logs `data/NAME`, the examples of a source that were seen so far, and `data/NAME_share` of all that were.

    Both are of all ranks together, without a word between them: which source a position belongs to is known on each. An
    example counts if its batch was trained on, whatever a curator then left of it; a bad sample's substitute is out of
    the same source. A run with one source logs nothing.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self._mixture: Mixture | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        order = data.train_order
        self._mixture = order if isinstance(order, Mixture) else None
        self._positions = Positions(data.patchifier)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._mixture is None:
            return
        module: Any = pl_module
        first, end = (module.timeline.examples + self._positions.before(batch.index + more) for more in (0, 1))
        before, after = self._mixture.counts(first), self._mixture.counts(end)
        for name in self._mixture.names:
            self.seen[name] = self.seen.get(name, 0) + after[name] - before[name]
        total = sum(self.seen.values())
        shares = {f"data/{name}_share": count / total for name, count in self.seen.items()}
        counts = {f"data/{name}": float(count) for name, count in self.seen.items()}
        pl_module.log_dict({**counts, **shares}, batch_size=batch.size)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = dict(state_dict["seen"])
