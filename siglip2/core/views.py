"""Views: frozen descriptions of the inputs that are made from a sample in the loader workers."""

# C copies, N patches, P patch values, T text tokens

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

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
    """

    entropy: tuple[int, ...]
    patchifier: Patchifier
    layout: Layout
    tokenizer: "Tokenizer"
    languages: Mapping[str, float] | None = None

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
        return context.patchifier(sample.image(), self, context.layout)


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
        texts = self._texts(sample.captions(), sample, context)
        text = texts[int(context.rng.integers(len(texts)))] if len(texts) > 1 else texts[0]
        return torch.as_tensor(context.tokenizer(text))[None]

    def _texts(self, captions: dict[str, list[str]], sample: "Sample", context: Context) -> list[str]:
        languages = sorted(language for language, texts in captions.items() if texts)
        if self.language is not None:
            languages = [self.language] if self.language in languages else []
        weights = np.array([1.0 if context.languages is None else context.languages.get(x, 0.0) for x in languages])
        if self.language is not None or len(languages) == 1:
            weights = np.ones(len(languages))
        if not weights.sum():
            raise sample.bad(f"no caption in {self.language or context.languages}, it has {sorted(captions)}")
        return captions[languages[int(context.rng.choice(len(languages), p=weights / weights.sum()))]]


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
