"""What the decoder learns to write: captions and regions as token ids, made in the loader workers."""

# C tasks, T decoder tokens

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siglip2.core.regions import Box, Region, regions
from siglip2.core.views import Text, draw_caption, draw_text, shares

if TYPE_CHECKING:
    from siglip2.core.data.fields import Sample
    from siglip2.core.data.text import Tokenizer
    from siglip2.core.data.text_contract import TextContract
    from siglip2.core.views import Context

SEPARATOR = " : "  # between the text and the box of a region (LocCa, https://arxiv.org/abs/2403.19596)
TASKS = ("caption", "refer", "ground")
# which edge of (xmin, ymin, xmax, ymax) is written first, second, ...; the last is that of a public port for RefCOCO
ORDERS = {"xyxy": (0, 1, 2, 3), "yxyx": (1, 0, 3, 2), "left-bottom-right-top": (0, 3, 2, 1)}


@dataclass(frozen=True)
class Prefixes:
    """What a text of each task begins with, given and not learned; `{language}` becomes the language code of the text.

    Source: LocCa writes Cap:, ARef: and GCap: as ordinary text; here in lowercase, as all text of SigLIP 2.

    Args:
        caption: before the caption of a picture.
        refer: before the text of a region, whose box follows (automatic referring expression).
        ground: before the box of a region, whose text follows (grounded caption).
    """

    caption: str = "cap: "
    refer: str = "aref: "
    ground: str = "gcap: "

    def of(self, task: str, language: str) -> str:
        """Returns the prefix of `caption`, `refer` or `ground` for a text in a language."""
        prefix: str = getattr(self, task)
        return prefix.replace("{language}", language)


@dataclass(frozen=True)
class BoxText:
    """Boxes as ordinary text: whole numbers from 0 to `bins`, shares of the picture's width and height.

    Args:
        bins: 500 as in LocCa; SigLIP 2 does not publish its own.
        order: xyxy, yxyx or left-bottom-right-top, where y grows downwards. LocCa's is not published; xyxy is ours.
        template: the text around the four numbers.

    Raises:
        ValueError: if there are no bins, the order is unknown, or a box in that template could not be read again.
    """

    bins: int = 500
    order: str = "xyxy"
    template: str = "[{}, {}, {}, {}]"

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"locca: expected bins >= 1, found {self.bins}; LocCa has 500")
        if self.order not in ORDERS:
            raise ValueError(f"locca: no box order called '{self.order}', expected one of {', '.join(ORDERS)}")
        whole = (0.0, 0.0, 1.0, 1.0)
        try:
            readable = self.read(self.write(whole)) == whole
        except (IndexError, KeyError, ValueError):
            readable = False
        if not readable:
            raise ValueError(
                f"locca: boxes in the template {self.template!r} cannot be read again, expected four {{}} that are "
                f"apart from one another and from other digits, as in '[{{}}, {{}}, {{}}, {{}}]'"
            )

    def write(self, box: Box) -> str:
        """Returns the text of (xmin, ymin, xmax, ymax) in [0, 1], each edge rounded to the nearest bin.

        A box thinner than a bin grows outwards to at least one bin: without area it could not be read again.
        """
        (xmin, xmax), (ymin, ymax) = self._span(box[0], box[2]), self._span(box[1], box[3])
        numbers = (xmin, ymin, xmax, ymax)
        return self.template.format(*(numbers[edge] for edge in ORDERS[self.order]))

    def _span(self, low: float, high: float) -> tuple[int, int]:
        low, high = (min(max(edge * self.bins, 0), self.bins) for edge in (low, high))
        if round(low) != round(high):
            return round(low), round(high)
        first = min(math.floor(low), self.bins - 1)
        return first, max(math.ceil(high), first + 1)

    def read(self, text: str) -> Box | None:
        """Returns the box after the last separator of a text; None where no four numbers there are a box."""
        found = re.findall("[0-9]+", text.rpartition(SEPARATOR.strip())[2])[:4]
        numbers = dict(zip(ORDERS[self.order], map(int, found), strict=False))
        if len(numbers) < 4 or max(numbers.values()) > self.bins:
            return None
        xmin, ymin, xmax, ymax = (numbers[edge] / self.bins for edge in range(4))
        return (xmin, ymin, xmax, ymax) if xmin < xmax and ymin < ymax else None


@dataclass(frozen=True)
class Prompts:
    """The given beginning of each task as token ids; every piece is tokenised by itself, so that it is always the same.

    What is ours in it (prefix, separator, box) keeps its punctuation and spaces even where those of captions are
    stripped (`data.text.canonicalize`): they tell the tasks and the numbers of a box apart.

    Args:
        prefixes: what each task begins with.
        boxes: how boxes are written.
    """

    prefixes: Prefixes = Prefixes()
    boxes: BoxText = BoxText()

    def prefix(self, task: str, language: str, tokenizer: "Tokenizer") -> list[int]:
        """Returns the ids of a task's prefix."""
        return tokenizer.ids(self.prefixes.of(task, language), keep_punctuation=True)

    def until_box(self, text: str, tokenizer: "Tokenizer") -> list[int]:
        """Returns the ids of a region's text, up to where its box begins."""
        return tokenizer.ids(text) + tokenizer.ids(SEPARATOR, keep_punctuation=True)

    def box(self, box: Box, tokenizer: "Tokenizer") -> list[int]:
        """Returns the ids of a box."""
        return tokenizer.ids(self.boxes.write(box), keep_punctuation=True)

    def until_text(self, box: Box, tokenizer: "Tokenizer") -> list[int]:
        """Returns the ids of a region's box, up to where its text begins."""
        return self.box(box, tokenizer) + tokenizer.ids(SEPARATOR, keep_punctuation=True)


@dataclass(frozen=True)
class LocCaView:
    """Three sequences per sample for the decoder, int32 [3, 2, T]: a caption, a region's box, a region's text.

    [:, 0] are token ids, padded. [:, 1] is 1 where a token counts in the loss: not the prefix, not the padding, but the
    EOS. What cannot be done is padding throughout. For each of the two tasks about regions one is drawn evenly.

    Args:
        length: T.
        prompts: what is given.
        min_score: regions with a lower detector score are not used.
        location_languages: only region texts in these are used; None takes all.
        name: the key under which the step finds it.
        copies: one for each task.
    """

    length: int = 64
    prompts: Prompts = Prompts()
    min_score: float = 0.3
    location_languages: tuple[str, ...] | None = None
    name: str = "locca"
    copies: int = len(TASKS)

    def __call__(self, sample: "Sample", context: "Context") -> Tensor:
        caption = draw_caption(sample, context)
        found = [r for r in self._regions(sample) if shares(r.captions, context)]
        rows = [
            self._caption(caption, sample, context),
            self._refer(*_draw(found, context), sample, context) if found else None,
            self._ground(*_draw(found, context), sample, context) if found else None,
        ]
        contract = context.tokenizer.contract
        return torch.tensor([self._filled(row, contract) for row in rows], dtype=torch.int32)

    def _regions(self, sample: "Sample") -> list[Region]:
        found = regions(sample, min_score=self.min_score)
        if self.location_languages is None:
            return found
        wanted = self.location_languages
        return [replace(r, captions={code: t for code, t in r.captions.items() if code in wanted}) for r in found]

    def _caption(self, caption: Text, sample: "Sample", context: "Context") -> tuple[list[int], list[int]]:
        prefix = self._prefix("caption", caption.language, context)
        return prefix, self._cut(prefix, context.tokenizer.ids(caption.text), "caption", sample)

    def _refer(
        self, region: Region, text: Text, sample: "Sample", context: "Context"
    ) -> tuple[list[int], list[int]] | None:
        prefix = self._prefix("refer", text.language, context)
        tokenizer = context.tokenizer
        written = self.prompts.until_box(text.text, tokenizer) + self.prompts.box(region.box, tokenizer)
        if len(written) > self._room(prefix):  # half a box would be another box
            found = len(prefix) + len(written) + 1
            sample.note(f"region text too long: {found} tokens with its box, expected at most {self.length}")
            return None
        return prefix, written

    def _ground(
        self, region: Region, text: Text, sample: "Sample", context: "Context"
    ) -> tuple[list[int], list[int]] | None:
        prefix = self._prefix("ground", text.language, context)
        box = self.prompts.until_text(region.box, context.tokenizer)
        if len(box) >= self._room(prefix):
            found = len(prefix) + len(box) + 1
            sample.note(f"box too long: {found} tokens before its text, expected fewer than {self.length}")
            return None
        return prefix, self._cut(prefix, box + context.tokenizer.ids(text.text), "region text", sample)

    def _prefix(self, task: str, language: str, context: "Context") -> list[int]:
        prefix = self.prompts.prefix(task, language, context.tokenizer)
        if self._room(prefix) < 1:
            raise ValueError(
                f"locca: the prefix {self.prompts.prefixes.of(task, language)!r} takes {len(prefix)} of the decoder's "
                f"{self.length} tokens and leaves no room for a text: shorten it or raise `length`"
            )
        return prefix

    def _room(self, prefix: list[int]) -> int:
        return self.length - len(prefix) - 1  # one for EOS

    def _cut(self, prefix: list[int], written: list[int], what: str, sample: "Sample") -> list[int]:
        if len(written) > self._room(prefix):
            found = len(prefix) + len(written) + 1
            sample.note(f"{what} cut for the decoder: {found} tokens, expected at most {self.length}")
        return written[: self._room(prefix)]

    def _filled(self, row: tuple[list[int], list[int]] | None, contract: "TextContract") -> list[list[int]]:
        prefix, written = row or ([], [])
        written = [*written, contract.eos_id] if row else []
        padding = self.length - len(prefix) - len(written)
        ids = prefix + written + [contract.pad_id] * padding
        return [ids, [0] * len(prefix) + [1] * len(written) + [0] * padding]


def _draw(found: list[Region], context: "Context") -> tuple[Region, Text]:
    region = found[int(context.rng.integers(len(found)))]
    text = draw_text(region.captions, context)
    assert text is not None  # only such regions are drawn from
    return region, text


@dataclass(frozen=True)
class CoinView:
    """Whether the caption of a sample is predicted in parallel, bool [1]; drawn in the worker, so resume repeats it.

    Args:
        probability: of true.
        name: the key under which the step finds it.
        copies: one.
    """

    probability: float = 0.5
    name: str = "locca_parallel"
    copies: int = 1

    def __call__(self, sample: "Sample", context: "Context") -> Tensor:
        return torch.tensor([bool(context.rng.random() < self.probability)])
