"""What a report holds: plain dataclasses, no torch, so that anything that can measure a run can fill one.

Rates and scores are fractions in [0, 1]. A value that was not measured may be NaN; it is shown as a dash.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # [H, W, 3]
Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax as shares of width and height
GAIN, RETAINED = "gain", "retained"  # what a score before and after a fine-tune is to show


def _check_picture(picture: Picture, owner: str) -> None:
    """Refuses what is not a uint8 RGB picture, before it turns into noise on the page."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ValueError(
            f"{owner}: a picture must be uint8 [H, W, 3], found {picture.dtype} {list(picture.shape)}; "
            "undo the normalisation and move channels last"
        )


def _check_lengths(owner: str, **columns: int) -> None:
    """Refuses columns of one table that differ in length."""
    if len(set(columns.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in columns.items())
        raise ValueError(f"{owner}: lists must have one length, found {found}")


def _check_box(box: Box, owner: str) -> None:
    """Refuses a box that cannot be drawn."""
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{owner}: a box is (xmin, ymin, xmax, ymax) with min < max, found {list(box)}")


@dataclass(frozen=True)
class Curve:
    """One logged quantity over training steps.

    Args:
        name: as logged; `train/...` is drawn among the losses, `val/...` among the validation curves.
        steps: optimizer steps, any order; a step that occurs twice (after a resume) keeps its last value.
        values: one per step; NaN and infinities are marked on the axis and counted.
        unit: shown after the value, such as `nats` or `images/s`.
    """

    name: str
    steps: list[int]
    values: list[float]
    unit: str = ""

    def __post_init__(self) -> None:
        _check_lengths(f"curve {self.name!r}", steps=len(self.steps), values=len(self.values))


@dataclass(frozen=True)
class ZeroShotRow:
    """Zero-shot classification of one data set with class names in one language.

    Args:
        dataset: name of the data set; rows of one data set are shown together.
        language: code of the prompts, such as `en`.
        num_images: test images.
        num_classes: classes to choose from.
        top1: share of images whose best class is right.
        top5: share of images with the right class among the best five.
        chance: top-1 of a guess.
        mean_per_class_recall: mean over classes of the share of their images whose best class is right.
    """

    dataset: str
    language: str
    num_images: int
    num_classes: int
    top1: float
    top5: float
    chance: float
    mean_per_class_recall: float = math.nan


@dataclass(frozen=True)
class RetrievalRow:
    """Image-text retrieval on one data set in one language.

    Args:
        dataset: name of the data set; rows of one data set are shown together.
        language: code of the texts.
        num_images: images to choose from.
        num_texts: texts to choose from.
        text_to_image: K -> share of texts whose image is among the best K.
        image_to_text: K -> share of images with one of their texts among the best K.
    """

    dataset: str
    language: str
    num_images: int
    num_texts: int
    text_to_image: dict[int, float]
    image_to_text: dict[int, float]


@dataclass(frozen=True)
class ReferringRow:
    """Texts located in their pictures, on one data set in one language.

    Args:
        dataset: name of the data set; rows of one data set are shown together.
        language: code of the texts; empty if they have none.
        num_texts: texts that were located, each in its own picture.
        accuracy: share of texts whose predicted box has an intersection over union of at least 0.5 with the true one.
        iou: mean intersection over union; a text without a readable box counts as 0.
    """

    dataset: str
    language: str
    num_texts: int
    accuracy: float
    iou: float


@dataclass(frozen=True)
class RetentionRow:
    """One score before and after a fine-tune.

    Args:
        dataset: name of the evaluation set.
        language: of its texts.
        measure: what was measured, a share in [0, 1].
        kind: `retained` for what the model is to keep, `gain` for what it is to learn.
        before: score of the weights that the run started from.
        after: score of the last weights that were evaluated.
    """

    dataset: str
    language: str
    measure: str
    kind: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before


@dataclass(frozen=True, eq=False)
class RetrievalExample:
    """A text and the pictures it found, best first.

    Args:
        query: the text.
        language: its code.
        images: uint8 pictures [H, W, 3].
        scores: probability of each pair.
        correct: whether the picture belongs to the text.
    """

    query: str
    language: str
    images: list[Picture]
    scores: list[float]
    correct: list[bool]

    def __post_init__(self) -> None:
        owner = f"retrieval example {self.query!r}"
        _check_lengths(owner, images=len(self.images), scores=len(self.scores), correct=len(self.correct))
        for image in self.images:
            _check_picture(image, owner)


@dataclass(frozen=True, eq=False)
class ImageExample:
    """A picture and the texts it found, best first.

    Args:
        image: uint8 picture [H, W, 3].
        texts: the texts, in any languages.
        scores: probability of each pair.
        correct: whether the text belongs to the picture.
    """

    image: Picture
    texts: list[str]
    scores: list[float]
    correct: list[bool]

    def __post_init__(self) -> None:
        lengths = {"texts": len(self.texts), "scores": len(self.scores), "correct": len(self.correct)}
        _check_lengths("image example", **lengths)
        _check_picture(self.image, "image example")


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Where in a picture a text is: its similarity with every patch.

    Args:
        image: uint8 picture [H, W, 3].
        text: the text.
        language: its code.
        similarity: float [rows, columns] over the patch grid, on any scale.
    """

    image: Picture
    text: str
    language: str
    similarity: npt.NDArray[np.floating]

    def __post_init__(self) -> None:
        _check_picture(self.image, f"heatmap {self.text!r}")
        if self.similarity.ndim != 2 or 0 in self.similarity.shape:
            shape = list(self.similarity.shape)
            raise ValueError(f"heatmap {self.text!r}: similarity must be [rows, columns], found shape {shape}")


@dataclass(frozen=True, eq=False)
class BoxExample:
    """Where in a picture a text is said to be, and where it is.

    Args:
        image: uint8 picture [H, W, 3].
        text: the text.
        language: its code.
        predicted: the box that was predicted; None if none could be read.
        true: the right box.
    """

    image: Picture
    text: str
    language: str
    predicted: Box | None
    true: Box

    def __post_init__(self) -> None:
        owner = f"box example {self.text!r}"
        _check_picture(self.image, owner)
        _check_box(self.true, owner)
        if self.predicted is not None:
            _check_box(self.predicted, owner)


@dataclass(frozen=True, eq=False)
class CaptionExample:
    """A picture with the caption that was generated for it and a true one.

    Args:
        image: uint8 picture [H, W, 3].
        generated: the caption that was generated; may be empty.
        truth: a caption that the picture came with.
        language: code of both.
    """

    image: Picture
    generated: str
    truth: str
    language: str = ""

    def __post_init__(self) -> None:
        _check_picture(self.image, f"caption example {self.truth!r}")


@dataclass(eq=False)
class RunReport:
    """All that is known of a run; a part left empty leaves no trace on the page.

    Args:
        title: headline.
        subtitle: one sentence under it.
        facts: steps, parameters, hardware, wall time, commit and so on, in the order shown.
        curves: training curves.
        retention: scores before and after a fine-tune.
        zero_shot: zero-shot results.
        retrieval: retrieval results.
        referring: how well texts were located.
        text_to_image: texts and the pictures they found.
        image_to_text: pictures and the texts they found.
        heatmaps: text-to-patch similarity.
        boxes: texts and the boxes predicted for them.
        captions: generated captions beside true ones.
        recipe: the recipe as YAML, shown folded.
        notes: what a reader should know, such as what was not run.
    """

    title: str
    subtitle: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    retention: list[RetentionRow] = field(default_factory=list)
    zero_shot: list[ZeroShotRow] = field(default_factory=list)
    retrieval: list[RetrievalRow] = field(default_factory=list)
    referring: list[ReferringRow] = field(default_factory=list)
    text_to_image: list[RetrievalExample] = field(default_factory=list)
    image_to_text: list[ImageExample] = field(default_factory=list)
    heatmaps: list[Heatmap] = field(default_factory=list)
    boxes: list[BoxExample] = field(default_factory=list)
    captions: list[CaptionExample] = field(default_factory=list)
    recipe: str = ""
    notes: list[str] = field(default_factory=list)
