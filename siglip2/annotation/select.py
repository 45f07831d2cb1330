"""Which of the detected boxes are kept, and how they are stored."""

# N boxes

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from siglip2.annotation.detector import Detections, Question
from siglip2.annotation.settings import Settings

DECIMALS = 5  # of a share of the width or height: a hundredth of a pixel in a picture of 1000


def select(found: Detections, question: Question, settings: Settings) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Returns the regions to store, best first, and how many boxes went where.

    A box is dropped for the first of these reasons: it has no area within the picture (`degenerate`), its score is
    below the threshold (`below_threshold`), no box of the picture reaches the picture's threshold
    (`below_image_threshold`), a better one overlaps it (`suppressed`).

    Args:
        found: what the detector answered.
        question: what it was asked.
        settings: the thresholds.

    Returns:
        Entries of `regions` as `siglip2.core.regions` reads them, with the `score` (times its query's weight) and the
        kind of the `query`; and counts under `boxes`, the reasons above, `kept` and `kept_KIND`.
    """
    shares_N4 = _shares(found.boxes, question.image)
    valid_N = (shares_N4[:, 0] < shares_N4[:, 2]) & (shares_N4[:, 1] < shares_N4[:, 3])  # false for nan, too
    passing_N = valid_N & (found.scores >= settings.threshold)
    least = settings.threshold if settings.image_threshold is None else settings.image_threshold
    enough = bool((found.scores[passing_N] >= least).any())
    numbers = passing_N.nonzero()[:, 0] if enough else torch.empty(0, dtype=torch.int64)
    numbers = numbers[found.scores[numbers].argsort(descending=True, stable=True)]
    counts = Counter(
        boxes=len(valid_N),
        degenerate=int((~valid_N).sum()),
        below_threshold=int((valid_N & ~passing_N).sum()),
        below_image_threshold=int(passing_N.sum()) - len(numbers),
        suppressed=len(numbers),
    )
    if settings.nms is not None:
        numbers = numbers[nms(found.boxes[numbers], found.scores[numbers], settings.nms)]
    counts.update(suppressed=-len(numbers), kept=len(numbers))
    entries = []
    for number in numbers.tolist():
        query = question.queries[int(found.queries[number])]
        counts[f"kept_{query.kind}"] += 1
        entries.append(
            {
                "box": shares_N4[number].tolist(),
                "captions": {query.language: query.text},
                "score": round(float(found.scores[number]), 4),
                "query": query.kind,
            }
        )
    return entries, counts


def _shares(boxes_N4: Tensor, image: Tensor) -> Tensor:
    """Boxes in pixels as shares of width and height within [0, 1], float64, rounded as they are stored."""
    height, width = image.shape[1:]
    shares_N4 = boxes_N4.double() / torch.tensor([width, height, width, height], dtype=torch.float64)
    return shares_N4.clamp(0, 1).round(decimals=DECIMALS)
