"""Image-text retrieval in both directions, per language."""

# B batch, M images and their texts, E embedding dimension

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from siglip2.core.batch import Batch
from siglip2.core.callbacks.evaluation import Evaluation
from siglip2.core.data.datamodule import caption_name
from siglip2.core.distributed import rank, world_size
from siglip2.core.report.data import RetrievalRow

KS = (1, 5, 10)


def match_ranks(z_query_ME: Tensor, z_target_ME: Tensor, *, chunk: int = 1024) -> Tensor:
    """Returns the rank, from 1, of row i among all targets for query i, int64 [M]; ties count against it."""
    ranks = []
    for start in range(0, z_query_ME.shape[0], chunk):
        scores = z_query_ME[start : start + chunk] @ z_target_ME.T  # [chunk, M], never M x M at once
        own = scores.diagonal(start)[:, None]
        ranks.append((~(scores < own)).sum(1))  # so that a score that is not a number loses, too
    return torch.cat(ranks)


class PairRecall(Metric):
    """Recall at 1, 5 and 10 of images and texts that belong together pairwise, over all ranks.

    Pairs are put back into the order of the set, so that the products are the same to the last digit on any number of
    ranks, and a close call falls the same way.
    """

    images: list[Tensor]
    texts: list[Tensor]
    real: list[Tensor]
    number: list[Tensor]
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("images", "texts", "real", "number"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, z_image_BE: Tensor, z_text_BE: Tensor, real: Tensor, first: int = 0) -> None:
        """Takes unit-norm embeddings, row i of each belonging together where `real` [B] is true.

        Args:
            z_image_BE: unit-norm embeddings of images.
            z_text_BE: those of their texts.
            real: bool, which rows count.
            first: number of the first row in the set.
        """
        self.number.append(first + torch.arange(len(real), device=z_image_BE.device))
        self.images.append(z_image_BE.float())
        self.texts.append(z_text_BE.float())
        self.real.append(real)

    def compute(self) -> dict[str, Tensor]:
        """Returns `text_to_image@K` and `image_to_text@K` in [0, 1], and `num_pairs`."""
        order = dim_zero_cat(self.number).argsort(stable=True)
        real = dim_zero_cat(self.real)[order]
        images, texts = dim_zero_cat(self.images)[order][real], dim_zero_cat(self.texts)[order][real]
        both = {"text_to_image": match_ranks(texts, images), "image_to_text": match_ranks(images, texts)}
        recalls = {f"{way}@{k}": (ranks <= k).float().mean() for way, ranks in both.items() for k in KS}
        return {**recalls, "num_pairs": real.sum()}


class Retrieval(Evaluation):
    """R@1, R@5 and R@10 of every retrieval set in every language, logged as `retrieval/<set>/<language>/...`."""

    def __init__(self) -> None:
        self.rows: list[RetrievalRow] = []
        self._metrics: dict[tuple[str, str | None], PairRecall] = {}

    def begin(self, module: Any, data: Any) -> None:
        pairs = [(name, x) for name, s in data.retrieval.items() for x in s.languages or [None]]
        self._metrics = {pair: PairRecall().to(module.device) for pair in pairs}

    def update(self, dataset: str, embedded: dict[str, Tensor], batch: Batch) -> None:
        for (name, language), metric in self._metrics.items():
            if name == dataset:
                real = torch.ones(batch.size, dtype=torch.bool) if batch.real is None else batch.real
                first = (batch.index * world_size() + rank()) * batch.size
                metric.update(embedded["image"], embedded[caption_name(language)], real, first)

    def finish(self) -> dict[str, float]:
        self.rows, scores = [], {}
        for (dataset, language), metric in self._metrics.items():
            found = {key: float(value) for key, value in metric.compute().items()}
            pairs = int(found.pop("num_pairs"))
            scores.update({f"retrieval/{dataset}/{language or 'all'}/{key}": value for key, value in found.items()})
            ways = ({k: found[f"{way}@{k}"] for k in KS} for way in ("text_to_image", "image_to_text"))
            self.rows.append(RetrievalRow(dataset, language or "", pairs, pairs, *ways))
        return scores
