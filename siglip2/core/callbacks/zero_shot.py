"""Zero-shot classification, per language."""

# B batch, K classes, E embedding dimension

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from siglip2.core.batch import Batch
from siglip2.core.callbacks.evaluation import Evaluation
from siglip2.core.data.settings import ZeroShotSet
from siglip2.core.distributed import gather, rank, world_size
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.report.data import ZeroShotRow

ENGLISH = "en"


def read_classes(path: str, languages: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Returns the class names by language, in the order of the labels.

    Args:
        path: JSON file {"classes": [...]}, each class a name or {"names": {language: name}}.
        languages: the languages wanted; None takes all that every class has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no classes, or a class lacks a wanted language.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no class names at {path}: expected a JSON file {{'classes': [...]}} in label order")
    names = _names_of(path)
    common = set.intersection(*(set(n) for n in names))
    wanted = sorted(common) if languages is None else list(languages)
    if lacking := [x for x in wanted if x not in common]:
        raise ValueError(
            f"{path} has no name for some class in {', '.join(lacking)}; every class has {', '.join(sorted(common))}"
        )
    if not wanted:
        raise ValueError(f"{path}: there is no language in which every class has a name")
    return {language: [n[language] for n in names] for language in wanted}


def _names_of(path: str) -> list[dict[str, str]]:
    """Language -> name of each class."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    entries = stored.get("classes") if isinstance(stored, dict) else None
    if not entries:
        raise ValueError(f"{path} holds no classes: expected {{'classes': [...]}} in label order")
    names: list[dict[str, str]] = []
    for label, entry in enumerate(entries):
        by_language = {ENGLISH: entry} if isinstance(entry, str) else isinstance(entry, dict) and entry.get("names")
        if not by_language:
            raise ValueError(f"{path}: class {label} is {entry!r}, expected a name or {{'names': {{language: name}}}}")
        names.append(by_language)
    return names


def class_vectors(
    module: Any, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256, alone: bool = False
) -> Tensor:
    """Returns one unit-norm vector per class, [K, E]: the mean over prompts of normalised text embeddings, normalised.

    Every rank encodes its share of the batches of prompts; a batch is the same on any number of ranks, and so are its
    embeddings to the last digit.

    Source: google-research/big_vision, evaluators/proj/image_text/discriminative_classifier.py.

    Args:
        module: encodes the texts.
        names: of the classes.
        templates: prompts with `{}` for the name.
        batch_size: prompts that are encoded at once.
        alone: only this rank calls, and encodes everything: the first one, for its report.
    """
    ranks, own_rank = (1, 0) if alone else (world_size(), rank())
    prompts = [template.format(name) for name in names for template in templates]
    batches = torch.as_tensor(module.tokenizer.encode(prompts)).split(batch_size)
    rounds = -(-len(batches) // ranks)  # a rank without a batch in the last one makes any, so that none waits
    own = [batches[min(i * ranks + own_rank, len(batches) - 1)] for i in range(rounds)]
    parts = []
    for number, batch in enumerate(own):
        z_BE = module.model.encode_text(batch.to(module.device)).embedding
        filled = z_BE.new_zeros(batch_size, z_BE.shape[1])  # the last batch is shorter
        filled[: len(batch)] = z_BE
        joined = filled if alone else gather(filled)
        everyone = joined.unflatten(0, (ranks, batch_size))  # those of this round, in order
        sizes = [len(b) for b in batches[number * ranks : (number + 1) * ranks]]
        parts += [found[:size] for found, size in zip(everyone, sizes, strict=False)]
    return unit_norm(torch.cat(parts).unflatten(0, (len(names), len(templates))).mean(1))


class MeanRecall(Metric):
    """Mean over the classes that have images of the share of their images that is classified right.

    This is scikit-learn's balanced accuracy, which CLIP_benchmark calls mean_per_class_recall. The macro recall of
    torchmetrics also counts, as 0, a class without images once it is predicted, and needs K^2 numbers in each batch.

    Args:
        num_classes: K.
    """

    right_K: Tensor
    seen_K: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("right_K", "seen_K"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores_BK: Tensor, label_B: Tensor) -> None:
        """Counts images; those with label -1 are none."""
        real_B, class_B = label_B >= 0, label_B.clamp(min=0)
        right_B = real_B & (scores_BK.argmax(1) == label_B)
        self.seen_K.index_add_(0, class_B, real_B.long())
        self.right_K.index_add_(0, class_B, right_B.long())

    def compute(self) -> Tensor:
        """Returns a share in [0, 1]; 0 without images."""
        recall_K = self.right_K / self.seen_K.clamp(min=1)
        return recall_K.sum() / (self.seen_K > 0).sum().clamp(min=1)


class ZeroShot(Evaluation):
    """Top-1, top-5 and mean recall over classes of every zero-shot set in every language.

    They are logged as `zero_shot/<set>/<language>/top1`, `.../top5` and `.../mean_per_class_recall`.
    """

    def __init__(self) -> None:
        self.rows: list[ZeroShotRow] = []
        self._vectors: dict[tuple[str, str], Tensor] = {}
        self._metrics: dict[tuple[str, str], dict[str, Metric]] = {}
        self._seen: dict[str, SumMetric] = {}

    def begin(self, module: Any, data: Any) -> None:
        self._vectors, self._metrics = {}, {}
        sets: Mapping[str, ZeroShotSet] = data.zero_shot
        self._seen = {dataset: SumMetric().to(module.device) for dataset in sets}
        for dataset, settings in sets.items():
            for language, names in read_classes(settings.classes, settings.languages).items():
                self._vectors[dataset, language] = class_vectors(module, names, settings.templates)
                metrics = {
                    "top1": _accuracy(len(names), 1),
                    "top5": _accuracy(len(names), min(5, len(names))),
                    "mean_per_class_recall": MeanRecall(len(names)),
                }
                self._metrics[dataset, language] = {n: metric.to(module.device) for n, metric in metrics.items()}

    def update(self, dataset: str, embedded: dict[str, Tensor], batch: Batch) -> None:
        if dataset in self._seen:
            self._seen[dataset].update(batch.size if batch.real is None else batch.real.sum())
        for (name, language), vectors in self._vectors.items():
            if name == dataset:
                label = embedded["label"] if batch.real is None else embedded["label"].where(batch.real, -1)
                scores_BK = embedded["image"] @ vectors.T
                for metric in self._metrics[name, language].values():
                    metric.update(scores_BK, label)

    def finish(self) -> dict[str, float]:
        seen = {dataset: int(metric.compute()) for dataset, metric in self._seen.items()}
        self.rows = [self._row(dataset, language, seen[dataset]) for dataset, language in self._metrics]
        scores: dict[str, float] = {}
        for row in self.rows:
            measured = self._metrics[row.dataset, row.language]
            scores |= {f"zero_shot/{row.dataset}/{row.language}/{name}": getattr(row, name) for name in measured}
        for dataset in {row.dataset: None for row in self.rows}:
            top1 = [row.top1 for row in self.rows if row.dataset == dataset]
            scores[f"zero_shot/{dataset}/mean/top1"] = sum(top1) / len(top1)
        return scores

    def _row(self, dataset: str, language: str, num_images: int) -> ZeroShotRow:
        classes = self._vectors[dataset, language].shape[0]
        return ZeroShotRow(
            dataset=dataset,
            language=language,
            num_images=num_images,
            num_classes=classes,
            chance=1 / classes,
            **{name: float(metric.compute()) for name, metric in self._metrics[dataset, language].items()},
        )


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, top_k=top_k, average="micro", ignore_index=-1)
