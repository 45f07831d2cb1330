"""Referring accuracy: how well a trained decoder finds the region that a text names, per language."""

# B batch, N patches, D width of the image tokens

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_iou

from siglip2.core.batch import Batch
from siglip2.core.callbacks.evaluation import Evaluation
from siglip2.core.data.datamodule import region_names
from siglip2.core.data.text import Tokenizer
from siglip2.core.report.data import ReferringRow

log = logging.getLogger(__name__)
FINE = 2.0**30  # overlaps are added as integers, so that the sum is the same in any order, on any number of ranks
HIT = 0.5  # intersection over union from which a box is right, as is usual for referring expressions


@runtime_checkable
class Grounder(Protocol):
    """A plugin whose decoder writes captions and boxes from image tokens [B, N, D]; boxes are float32 [B, 4].

    A box is (xmin, ymin, xmax, ymax) in shares of width and height. `language` is a code, empty if unknown; `valid` is
    bool [B, N], false where padded, or None.
    """

    def caption(
        self, tokens_BND: Tensor, tokenizer: Tokenizer, *, language: str = "", valid: Tensor | None = None
    ) -> list[str]:
        """Returns a caption of each image."""

    def locate(
        self,
        tokens_BND: Tensor,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        language: str = "",
        valid: Tensor | None = None,
    ) -> Tensor:
        """Returns the box of text i in image i, NaN where none can be read."""

    def describe(
        self,
        tokens_BND: Tensor,
        boxes_B4: Tensor,
        tokenizer: Tokenizer,
        *,
        language: str = "",
        valid: Tensor | None = None,
    ) -> list[str]:
        """Returns a text for box i of image i."""


def grounder_of(module: Any) -> Grounder | None:
    """Returns the first plugin that can caption and locate and has been awake, so trained; None if there is none."""
    awake = (plugin for name, plugin in module.plugins.items() if name in module.woken)
    return next((plugin for plugin in awake if isinstance(plugin, Grounder)), None)


def run_precision(module: Any) -> AbstractContextManager[Any]:
    """Returns the context that steps of the run compute in; callbacks are called outside of it."""
    trainer = module._trainer
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


class BoxAccuracy(Metric):
    """Share of predicted boxes that hit the true one, and the mean intersection over union, over all ranks."""

    hits: Tensor
    overlap: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name, start in (("hits", 0), ("overlap", 0), ("total", 0)):
            self.add_state(name, default=torch.tensor(start), dist_reduce_fx="sum")

    def update(self, predicted_B4: Tensor, true_B4: Tensor, real: Tensor) -> None:
        """Takes boxes float [B, 4], row i of each for one text; NaN is wrong, rows that are not `real` do not count."""
        iou_B = box_iou(predicted_B4.float(), true_B4.float()).diagonal().nan_to_num(0.0)
        self.hits += ((iou_B >= HIT) & real).sum()
        self.overlap += ((iou_B * FINE).round().long() * real).sum()
        self.total += real.sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns `acc@0.5` and `iou` in [0, 1], and `num_texts`."""
        return {
            f"acc@{HIT}": self.hits / self.total,
            "iou": self.overlap / FINE / self.total,
            "num_texts": self.total,
        }


class Referring(Evaluation):
    """Texts located in their pictures, every referring set in every language: `referring/<set>/<language>/acc@0.5`.

    Without a plugin that can locate, nothing is scored.
    """

    def __init__(self) -> None:
        self.rows: list[ReferringRow] = []
        self._metrics: dict[tuple[str, str | None], BoxAccuracy] = {}
        self._module: Any = None
        self._grounder: Grounder | None = None
        self._told = False

    def begin(self, module: Any, data: Any) -> None:
        self._module, self._grounder = module, grounder_of(module)
        pairs = [(name, x) for name, s in data.referring.items() for x in s.languages or [None]]
        if pairs and self._grounder is None and not self._told:
            log.info("no plugin can locate texts yet: referring sets (%s) are not scored", ", ".join(data.referring))
            self._told = True
        scored = pairs if self._grounder else []
        self._metrics = {pair: BoxAccuracy().to(module.device) for pair in scored}

    def update(self, dataset: str, embedded: dict[str, Tensor], batch: Batch) -> None:
        languages = [language for name, language in self._metrics if name == dataset]
        if not languages or self._grounder is None:
            return
        real = torch.ones(batch.size, dtype=torch.bool) if batch.real is None else batch.real
        with torch.no_grad(), run_precision(self._module):
            image = self._module.model.encode_image(batch.views["image"])
            for language in languages:
                text_view, box_view = region_names(language)
                tokenizer = self._module.tokenizer
                texts = [tokenizer.decode(ids) for ids in batch.views[text_view].tolist()]
                found_B4 = self._grounder.locate(
                    image.tokens, texts, tokenizer, language=language or "", valid=image.valid
                )
                self._metrics[dataset, language].update(found_B4, batch.views[box_view], real.to(found_B4.device))

    def finish(self) -> dict[str, float]:
        self.rows, scores = [], {}
        for (dataset, language), metric in self._metrics.items():
            found = {key: float(value) for key, value in metric.compute().items()}
            texts = int(found.pop("num_texts"))
            scores.update({f"referring/{dataset}/{language or 'all'}/{key}": value for key, value in found.items()})
            self.rows.append(ReferringRow(dataset, language or "", texts, found[f"acc@{HIT}"], found["iou"]))
        return scores
