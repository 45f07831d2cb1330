"""What a user asks of an annotation: checked, and as it is recorded beside the shards."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from siglip2.annotation.detector import Detector
from siglip2.annotation.queries import MAX_QUERIES, MAX_WORDS
from siglip2.core.data.fields import Fields

UNLABELLED = ""  # the language of a caption whose language nobody said


@dataclass(frozen=True)
class Settings:
    """Everything that the written shards depend on.

    Args:
        detector: `owlv2:FOLDER`, or `truth` for the regions that are stored already.
        threshold: boxes with a lower score are dropped, in [0, 1]. LocCa: 0.3; OWLv2's main runs: 0.1.
        image_threshold: a picture whose best box scores lower keeps none, in [0, 1]; None: as `threshold`. OWLv2: 0.3.
        category_factor: scores of categories are multiplied by it, in (0, 1]. OWLv2: 0.3 (appendix A.3).
        nms: of two boxes that overlap more than this (intersection over union), whatever their texts, the one with the
            lower score is dropped; None keeps both. No paper mentions it; None is ours.
        languages: captions in these are queried; "" stands for captions without a language.
        max_words: of one n-gram.
        max_queries: n-grams per picture.
        categories: texts that every picture is asked for.
        category_language: their language, "" for none.
        templates: `clip-7` or `none`; a detector may have no use for them.
        dtype: `float32`, `bfloat16` or `float16`, of a detector's towers.
        image: field spec of the picture.
        caption: field spec of the captions.
        batch_size: pictures that the detector sees at once; the shards depend on it by rounding errors only.

    Raises:
        ValueError: if a value is out of range, or no category could ever pass the threshold.
    """

    detector: str = "truth"
    threshold: float = 0.3
    image_threshold: float | None = None
    category_factor: float = 0.3
    nms: float | None = None
    languages: tuple[str, ...] = ("en", UNLABELLED)
    max_words: int = MAX_WORDS
    max_queries: int = MAX_QUERIES
    categories: tuple[str, ...] = ()
    category_language: str = "en"
    templates: str = "clip-7"
    dtype: str = "float32"
    image: str = Fields.image
    caption: str = Fields.caption
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("threshold", "image_threshold", "nms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a number in [0, 1]")
        if not 0 < self.category_factor <= 1:
            raise ValueError(f"category_factor is {self.category_factor}, expected a number in (0, 1]")
        for name, low in (("max_words", 1), ("max_queries", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if not self.languages and not self.categories:
            raise ValueError("no languages and no categories: nothing would be asked for")
        least, best = max(self.threshold, self.image_threshold or 0.0), self.category_factor
        # only the truth is ever certain: a model's score is a sigmoid, below 1
        if self.categories and (best < least or (best == least and self.detector != "truth")):
            raise ValueError(
                f"no category can pass: its score is at most 1 times category_factor={best}, the threshold is {least}. "
                f"Set threshold 0.1, as OWLv2 does, or category_factor 1"
            )
        if self.detector != "truth" and not self.detector.removeprefix("owlv2:").strip("/ "):
            raise ValueError("owlv2 needs a folder: owlv2:PATH")
        if self.detector != "truth" and not self.detector.startswith("owlv2:"):
            raise ValueError(f"no detector called {self.detector!r}; expected owlv2:PATH or truth")

    @property
    def fields(self) -> Fields:
        """Where picture and captions are found."""
        return Fields(image=self.image, caption=self.caption)

    def recorded(self) -> dict[str, Any]:
        """Returns the settings that the shards depend on, as JSON: a model by its contents, categories by their hash.

        Raises:
            FileNotFoundError: if the detector's folder is not there.
        """
        values = asdict(self) | {"languages": list(self.languages)}
        names = "\n".join(self.categories).encode()
        values["categories"] = {"number": len(self.categories), "sha256": hashlib.sha256(names).hexdigest()}
        del values["batch_size"]  # a run may go on with smaller batches
        if self.detector == "truth":
            return {key: value for key, value in values.items() if key not in ("templates", "dtype")}
        from siglip2.annotation.owlv2 import DTYPES, TEMPLATES, fingerprint  # torch: only where a model is asked

        for name, known in (("templates", TEMPLATES), ("dtype", DTYPES)):
            if values[name] not in known:
                raise ValueError(f"no {name} called {values[name]!r}; known: {', '.join(known)}")
        return values | {"detector": f"owlv2 {fingerprint(self.detector.removeprefix('owlv2:'))}"}

    def open_detector(self, device: str) -> Detector:
        """Returns the detector on a device.

        Args:
            device: as torch names it.
        """
        if self.detector == "truth":
            from siglip2.annotation.truth import Truth

            return Truth()
        from siglip2.annotation.owlv2 import Owlv2

        path, fixed = self.detector.removeprefix("owlv2:"), self.categories
        return Owlv2(path, device=device, templates=self.templates, dtype=self.dtype, fixed=fixed)
