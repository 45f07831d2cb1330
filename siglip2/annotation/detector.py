"""What an open-vocabulary detector is asked and what it answers."""

# N boxes, H, W height and width of a picture in pixels

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from siglip2.annotation.queries import Query
from siglip2.core.data.fields import Sample

PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


@dataclass(frozen=True, eq=False)
class Question:
    """One picture and what to look for in it.

    Args:
        image: uint8 RGB [3, H, W].
        queries: at least one.
        sample: what else is stored for the picture; only a detector that knows the truth looks at it.
    """

    image: Tensor
    queries: tuple[Query, ...]
    sample: Sample


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes in one picture, each with the one query that fits it best; on the CPU.

    Args:
        boxes: (xmin, ymin, xmax, ymax) in pixels of the picture, y down, float32 [N, 4]; may reach beyond its edges.
        scores: confidence times the query's weight, float32 [N]: the largest over all queries.
        queries: number of that query in the question, int64 [N].
    """

    boxes: Tensor
    scores: Tensor
    queries: Tensor


class Detector(Protocol):
    """Finds texts in pictures."""

    def detect(self, questions: Sequence[Question]) -> list[Detections]:
        """Returns what was found for each question, in order; called with a whole batch, so that a GPU is busy."""
        ...


def plain(text: str) -> str:
    """Returns a text in lower case without ASCII punctuation, with single spaces.

    Source: what OWL-ViT does to queries before its tokenizer
    (https://github.com/google-research/scenic, projects/owl_vit/evaluator.py, `tokenize_queries`).
    """
    return " ".join(PUNCTUATION.sub("", text.lower()).split())
