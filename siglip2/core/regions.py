"""Regions: boxes with texts, as they are stored in a sample, and the views that evaluation makes of them."""

# T text tokens

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siglip2.core.views import Context, draw_text, fitted_ids

if TYPE_CHECKING:
    from siglip2.core.data.fields import Sample

Box = tuple[float, float, float, float]
TOLERANCE = 1e-3  # ours: rounded boxes reach beyond the edge by about that much


@dataclass(frozen=True)
class Region:
    """A part of a picture and what it is called.

    Args:
        box: (xmin, ymin, xmax, ymax), shares of width and height in [0, 1], y down.
        captions: language -> its texts, at least one; texts without a language are under the key "".
        score: confidence of the detector that found it, None if nobody gave one.
    """

    box: Box
    captions: dict[str, list[str]]
    score: float | None = None


def regions(sample: "Sample", *, min_score: float = 0.0) -> list[Region]:
    """Returns the usable regions of a sample; those that cannot be read are noted and left out.

    An entry of the field `regions` is a mapping with `box` (four numbers), a text under `captions` (language -> text or
    list of texts), `caption` or `text`, and possibly `score`.

    Args:
        sample: its field `regions` may be missing.
        min_score: regions with a lower score are left out without a note; those without a score stay.
    """
    stored = sample.get("regions") if sample.has("regions") else []
    if not isinstance(stored, list):
        sample.note(f"bad regions: found {type(stored).__name__}, expected a list of mappings")
        return []
    found = []
    for number, entry in enumerate(stored):
        try:
            found.append(_read(entry, f"region {number}"))
        except ValueError as error:
            sample.note(str(error))
    return [region for region in found if region.score is None or region.score >= min_score]


def _read(entry: Any, which: str) -> Region:
    if not isinstance(entry, Mapping):
        raise ValueError(f"bad region: {which} is {entry!r:.60}, expected a mapping with box and captions")
    return Region(_box(entry.get("box"), which), _captions(entry, which), _score(entry.get("score"), which))


def _box(value: Any, which: str) -> Box:
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(_is_number(edge) for edge in value):
        raise ValueError(f"bad box: {which} has {value!r:.60}, expected four numbers xmin, ymin, xmax, ymax")
    xmin, ymin, xmax, ymax = (min(max(edge, 0.0), 1.0) for edge in value)
    inside = all(-TOLERANCE <= edge <= 1 + TOLERANCE for edge in value)
    if not inside or xmin >= xmax or ymin >= ymax:
        raise ValueError(f"bad box: {which} has {value!r:.60}, expected 0 <= min < max <= 1 in both directions")
    return float(xmin), float(ymin), float(xmax), float(ymax)


def _captions(entry: Mapping[str, Any], which: str) -> dict[str, list[str]]:
    value = entry.get("captions", entry.get("caption", entry.get("text")))
    found = {}
    for language, texts in value.items() if isinstance(value, Mapping) else [("", value)]:
        texts = texts if isinstance(texts, list) else [texts]
        if kept := [text.strip() for text in texts if isinstance(text, str) and text.strip()]:
            found[str(language)] = kept
    if not found:
        raise ValueError(f"no region text: {which} has {value!r:.60}, expected a text, or language: text")
    return found


def _score(value: Any, which: str) -> float | None:
    if value is not None and not _is_number(value):
        raise ValueError(f"bad score: {which} has {value!r:.60}, expected a number")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _evaluated(sample: "Sample", language: str | None) -> Region:
    """The region of a sample that evaluation asks for: by its key, so the same in every run and for every view."""
    found = [region for region in regions(sample) if language in (None, *region.captions)]
    if not found:
        raise sample.bad(f"no region with a box and a text{'' if language is None else f' in {language!r}'}")
    return found[zlib.crc32(sample.key.encode()) % len(found)]


@dataclass(frozen=True)
class RegionText:
    """The text of one region of each sample as token ids [1, T] int32, for evaluation.

    Args:
        name: the key under which the view is found.
        language: take only regions with a text in this language; None takes any.
    """

    name: str = "region_text"
    language: str | None = None
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Tensor:
        drawn = draw_text(_evaluated(sample, self.language).captions, context, self.language)
        if drawn is None:
            raise sample.bad(f"no region text in {sorted(context.languages or ())}")
        return fitted_ids(drawn.text, sample, context, what="region text")


@dataclass(frozen=True)
class RegionBox:
    """The box that belongs to `RegionText` of the same language: xmin, ymin, xmax, ymax in [0, 1], float32 [1, 4].

    Args:
        name: the key under which the view is found.
        language: that of the text; with another one it would be the box of another region.
    """

    name: str = "region_box"
    language: str | None = None
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Tensor:
        return torch.tensor([_evaluated(sample, self.language).box])
