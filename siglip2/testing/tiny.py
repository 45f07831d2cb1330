"""Tiny real objects: drawn samples, a trained tokenizer, towers of size tiny/16, and the views of real plugins."""

import copy
import io
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from siglip2.core.batch import Batch
from siglip2.core.data.fields import Sample
from siglip2.core.data.loader import Maker, join
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.layout import Patchifier
from siglip2.core.model.two_towers import ImageFeatures, TwoTowers, build_two_towers, image_features
from siglip2.core.module import SigLIP2Module
from siglip2.core.plugin import Plugin
from siglip2.core.rehearsal import rehearse as rehearse_phases
from siglip2.core.step import STUDENT, Step
from siglip2.core.views import CAPTION, IMAGE, View
from siglip2.plugins.fixed import Fixed, FixedPatchifier

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "gold": "golden"}
SHAPES = {"disc": "Scheibe", "box": "Kiste"}
TEXT_LENGTH = 16
PATCHIFIER = FixedPatchifier(image_size=32, patch_size=16, batch_size=8, filter="bilinear", antialias=True)


class TinySource:
    """Sixteen drawn pictures in memory, each with captions in two languages, a label and a region."""

    name = "tiny"

    def __len__(self) -> int:
        return 16

    def shard_sizes(self) -> list[int]:
        """Samples in each shard: all in one."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """Returns sample i as it would lie in a tar shard: `png` and `json`."""
        colour, shape = list(COLOURS)[i % 4], list(SHAPES)[i // 4 % 2]
        width, height = 40 + 2 * i, 64 - 2 * i  # not square, so that aspect ratios matter
        box = (width // 8, height // 4, width // 8 + 8 + i, height // 4 + 16)
        picture = Image.new("RGB", (width, height), (16 * i, 80, 255 - 16 * i))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=colour)
        captions = {"en": f"a {colour} {shape}, number {i}", "de": f"{SHAPES[shape]} in {COLOURS[colour]}, Nummer {i}"}
        shares = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
        region = {"box": shares, "captions": captions, "label": i % 8}
        record = {"caption": captions, "label": i % 8, "regions": [region], "width": width, "height": height}
        stored = io.BytesIO()
        picture.save(stored, "PNG")
        return Sample(f"{i:04d}", self.name, {"png": stored.getvalue(), "json": json.dumps(record).encode()})


@cache
def tiny_tokenizer(length: int = TEXT_LENGTH) -> Tokenizer:
    """Returns a tokenizer of about 320 ids, trained on the captions of `TinySource`.

    Args:
        length: ids per caption.
    """
    source = TinySource()
    texts = [text for i in range(len(source)) for texts in source.read(i).captions().values() for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = train_tokenizer(texts, vocab_size=320, out=Path(folder) / "tokenizer.json")
        return Tokenizer.load(path, length=length)


def tiny_model(*, grid: tuple[int, int] = (2, 2), seed: int = 0) -> TwoTowers:
    """Returns freshly initialised towers of size tiny/16 with the vocabulary of `tiny_tokenizer`.

    Args:
        grid: (rows, columns) of the position table; 2 x 2 is a picture of 32 pixels.
        seed: of the initial parameters; torch's random state is left as it was.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_two_towers(
            "tiny/16",
            patch_size=16,
            grid=grid,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.contract.length,
            logit_bias=-2.0,
        )


def fake_batch(
    views: Sequence[View] = (IMAGE, CAPTION),
    batch_size: int = 4,
    *,
    patchifier: Patchifier = PATCHIFIER,
    tokenizer: Tokenizer | None = None,
    first: int = 0,
) -> Batch:
    """Returns a batch whose views are really made from samples of `TinySource`, as a loader worker makes them.

    Args:
        views: what is made of every sample.
        batch_size: rows.
        patchifier: turns pictures into patches; 32 pixels in patches of 16 if not given.
        tokenizer: text to ids; `tiny_tokenizer()` if not given.
        first: position of the first row; the same position gives the same row in every batch.
    """
    source = TinySource()
    maker = Maker(source, patchifier, tokenizer or tiny_tokenizer(), seed=0)
    layout = replace(patchifier.layout(0), batch_size=batch_size)
    numbers = range(first, first + batch_size)
    rows = [maker.row(i % len(source), position=i, views=views, layout=layout) for i in numbers]
    return join(rows, size=batch_size, index=0, pack=maker.pack(layout))


class TinyStep(Step):
    """A step in which an encoder that no plugin of the test offers is a frozen copy of the student."""

    def _encode_image(self, view: str, by: str) -> ImageFeatures:
        if by == STUDENT or by in self.encoders:
            return super()._encode_image(view, by)
        with torch.no_grad():
            return image_features(copy.deepcopy(self.model.vision), self.view(view))

    def head(self, name: str, by: str = STUDENT) -> Any:
        if by == STUDENT or by in self.encoders:
            return super().head(name, by)
        return copy.deepcopy(super().head(name)).requires_grad_(False)


class TinyModule(SigLIP2Module):
    """The real Lightning module around towers of size tiny/16, usable without a trainer."""

    def make_step(self, batch: Batch, progress: float) -> TinyStep:
        """Returns the step that the awake plugins see."""
        step = super().make_step(batch, progress)
        return TinyStep(self.model, batch, progress=progress, encoders=step.encoders, heads=step.heads)

    def rehearsal_losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Returns the loss terms in float32."""
        return self(batch, progress)

    def views_at(self, progress: float) -> tuple[View, ...]:
        """Returns the views that the awake plugins declare, each name once."""
        declared = self.awake_hook("views", progress)()
        return tuple({view.name: view for views in declared for view in views}.values())

    def fake_batch(self, progress: float = 0.0, *, batch_size: int = 4, first: int = 0) -> Batch:
        """Returns a batch with the views that are made at `progress`."""
        views = self.views_at(progress)
        return fake_batch(views, batch_size, patchifier=self.patchifier, tokenizer=self.tokenizer, first=first)


def tiny_module(plugins: Iterable[Plugin], *, seed: int = 0) -> TinyModule:
    """Returns the module of a recipe, with tiny towers; pictures of 32 pixels unless a plugin is a patchifier.

    Args:
        plugins: the plugins of the recipe, in order.
        seed: of the initial parameters; torch's random state is left as it was.
    """
    plugins = list(plugins)
    if not any(hasattr(p, "patchifier") for p in plugins):
        plugins.insert(0, Fixed(image_size=32, patch_size=16, batch_size=PATCHIFIER.batch_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModule(plugins, tiny_tokenizer(), size="tiny/16", logit_bias=-2.0)


def tiny_step(plugins: Iterable[Plugin] = (), *, batch_size: int = 4, progress: float = 0.0, seed: int = 0) -> Step:
    """Returns a step over a tiny model with the views that the plugins declare, after waking those that are due.

    Args:
        plugins: the plugins of the recipe; they are set up.
        batch_size: rows.
        progress: of the run, in [0, 1).
        seed: of the initial parameters.
    """
    module = tiny_module(plugins, seed=seed)
    module.wake_due(progress)
    return module.make_step(module.fake_batch(progress, batch_size=batch_size), progress)


def rehearse(plugins: Iterable[Plugin], *, seed: int = 0) -> TinyModule:
    """Runs every phase of a recipe once, forward and backward on two samples, and returns its module.

    Raises:
        ValueError: if a loss term is not a finite scalar, or no objective is awake in some phase.
        Exception: whatever a plugin raises, with a note that names the phase.
    """
    module = tiny_module(plugins, seed=seed)
    rehearse_phases(module, module.phases, lambda phase: module.fake_batch(phase.start, batch_size=2))
    return module


def same(a: Any, b: Any) -> bool:
    """Says whether two views of a sample (tensors or dataclasses of tensors) hold the same values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return bool(a == b)
