"""Views: frozen descriptions of the inputs that are made from a sample in the loader workers."""

# C copies, N patches, P patch values, T text tokens

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from siglip2.core.layout import Layout, Patchifier

if TYPE_CHECKING:
    from siglip2.core.batch import Patches
    from siglip2.core.data.fields import Sample
    from siglip2.core.data.text import Tokenizer


@dataclass(frozen=True)
class Context:
    """What a view may use beside the sample.

    Args:
        entropy: seed, sample position and view as integers; `rng` follows from them.
        patchifier: the patchifier of the recipe.
        layout: the layout of the batch.
        tokenizer: text to ids.
        languages: share of each language when a sample has captions in several; None draws evenly.
        captions: share of each field that captions are drawn from; None takes the field `caption`.
    """

    entropy: tuple[int, ...]
    patchifier: Patchifier
    layout: Layout
    tokenizer: "Tokenizer"
    languages: Mapping[str, float] | None = None
    captions: Mapping[str, float] | None = None

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this very (seed, sample position, view): the same in every run, made when first used."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.entropy)))


class View(Protocol):
    """One input made from a sample; equal descriptions are the same view.

    Attributes:
        name: the key under which the step finds it.
        copies: how many are made of each sample.
    """

    @property
    def name(self) -> str: ...

    @property
    def copies(self) -> int: ...

    def __call__(self, sample: "Sample", context: Context) -> "Patches | Tensor":
        """Returns the view of one sample with the leading dimension `copies`; raises BadSample if it cannot."""


@dataclass(frozen=True)
class ImageView:
    """The whole image through the recipe's patchifier: patches [1, N, P] uint8."""

    name: str = "image"
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> "Patches":
        return context.patchifier(sample.image(), self, context.layout, context.rng)


class Text(NamedTuple):
    """A text and the code of its language, "" if it has none."""

    language: str
    text: str


def shares(captions: Mapping[str, list[str]], context: Context, language: str | None = None) -> dict[str, float]:
    """Returns with which weight a text is drawn in each language; empty if there is none that may be drawn.

    Args:
        captions: language -> its texts.
        context: `languages` gives the weights, as for captions; a language that is alone needs no weight.
        language: only this one; None takes all.
    """
    found = sorted(code for code, texts in captions.items() if texts and language in (None, code))
    if len(found) == 1 or context.languages is None:
        return dict.fromkeys(found, 1.0)
    return {code: share for code in found if (share := context.languages.get(code, 0.0)) > 0}


def draw_text(captions: Mapping[str, list[str]], context: Context, language: str | None = None) -> Text | None:
    """Returns one text drawn by the shares of the languages, then evenly; None if there is none that may be drawn."""
    weights = shares(captions, context, language)
    if not weights:
        return None
    total = sum(weights.values())
    drawn = context.rng.choice(len(weights), p=[weight / total for weight in weights.values()])
    code = list(weights)[int(drawn)]
    return Text(code, captions[code][int(context.rng.integers(len(captions[code])))])


def draw_caption(sample: "Sample", context: Context, language: str | None = None) -> Text:
    """Returns one caption of a sample: the field is drawn by its share, then the language by its, then the text evenly.

    Fields that have no caption to draw for this sample are left out, and the shares of the others count. One that
    cannot be read is noted.

    Args:
        sample: has the captions.
        context: `captions` and `languages` give the shares. Without `captions` only the field `caption` is read, and
            no random number is spent on the choice.
        language: only this one; None takes all.

    Raises:
        BadSample: if there is no caption that may be drawn.
    """
    if context.captions is None:
        return _drawn(sample, sample.captions(), context, language)
    found, sizes = {}, {}
    for name, share in context.captions.items():
        captions = sample.captions_if_any(name)
        if shares(captions, context, language):
            found[name], sizes[name] = captions, share
    if not found:
        raise sample.bad(f"no caption{'' if language is None else f' in {language}'} in {', '.join(context.captions)}")
    total = sum(sizes.values())
    number = context.rng.choice(len(sizes), p=[size / total for size in sizes.values()])
    return _drawn(sample, list(found.values())[int(number)], context, language)


def _drawn(sample: "Sample", captions: Mapping[str, list[str]], context: Context, language: str | None) -> Text:
    drawn = draw_text(captions, context, language)
    if drawn is None:
        raise sample.bad(f"no caption in {language or context.languages}, it has {sorted(captions)}")
    return drawn


def fitted_ids(text: str, sample: "Sample", context: Context, *, what: str) -> Tensor:
    """Returns a text as the ids that the text tower reads, int32 [1, T]; a text that is cut is noted.

    Args:
        text: of any length.
        sample: takes the note.
        context: has the tokenizer.
        what: the text is, for the note: caption.
    """
    ids, contract = context.tokenizer.ids(text), context.tokenizer.contract
    if len(ids) > contract.room:
        sample.note(f"{what} cut: {len(ids)} tokens, the text tower reads {contract.room} and their end")
    return torch.tensor([contract.fit(ids)], dtype=torch.int32)


@dataclass(frozen=True)
class TextView:
    """One caption as token ids [1, T] int32.

    Args:
        name: the key under which the step finds it.
        language: take only captions in this language; None draws one by the shares of the data settings.
    """

    name: str = "caption"
    language: str | None = None
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Tensor:
        drawn = draw_caption(sample, context, self.language)
        return fitted_ids(drawn.text, sample, context, what="caption")


@dataclass(frozen=True)
class LabelView:
    """The class number of a sample, int64 [1]."""

    name: str = "label"
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Tensor:
        value: Any = sample.get("label")
        try:
            return torch.tensor([int(value)])
        except (TypeError, ValueError):
            raise sample.bad(f"label should be a whole number, found {value!r}") from None


IMAGE = ImageView()
CAPTION = TextView()
