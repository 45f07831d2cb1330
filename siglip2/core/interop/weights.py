"""What was read out of a file of any format: tensors under our names, with everything that decides what they mean."""

# D width, P patch values

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from siglip2.core.data.text import Tokenizer
from siglip2.core.interop.names import depth_of
from siglip2.core.interop.published import nearest
from siglip2.core.model.sizes import Gelu, Shape
from siglip2.core.model.text import TextTower
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.model.vision import VisionTower

NO_HEAD = "the text tower has no projection: one that changes nothing was put there"
PIXELS_READ = "mean and std 0.5, out of values from 0 to 1"
SQUARE, NATIVE = "fixed", "naflex"  # the two pixel contracts that other libraries have


@dataclass(frozen=True)
class Weights:
    """Weights under the names of `TwoTowers`, and their contracts.

    Args:
        format: where they come from: siglip2, hf, open_clip, timm, big_vision.
        state: `vision.*`, `text.*`, `logit_scale`, `logit_bias`; without the last three if only a trunk was read.
        vision: shape of the vision tower; its width is the embedding dimension.
        text: shape of the text tower; None if there is none.
        patch_size: in pixels.
        grid: (rows, columns) of the position table.
        native: whether images keep their aspect ratio, as in NaFlex.
        vocab_size: rows of the token table; 0 without a text tower.
        context_length: ids per text; 0 without a text tower.
        pixels: the pixel contract, as a patchifier's `contract()`; None if the files do not say.
        tokenizer: with the text contract; None if there are no tokenizer files.
        notes: what was left out or differs from what the library does, in sentences.
    """

    format: str
    state: Mapping[str, Tensor] = field(repr=False)
    vision: Shape
    text: Shape | None
    patch_size: int
    grid: tuple[int, int]
    native: bool
    vocab_size: int
    context_length: int
    pixels: Mapping[str, Any] | None
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()

    @property
    def embed_dim(self) -> int:
        """E, the dimension of the shared embedding space."""
        return self.vision.width

    @property
    def image_size(self) -> int:
        """Side of the square pictures in pixels, as the pixel contract says or as the position table has it."""
        found = (self.pixels or {}).get("image_size", self.grid[0] * self.patch_size)
        return int(found)

    @property
    def heads(self) -> dict[str, int]:
        """Attention heads of each tower."""
        return {"vision": self.vision.num_heads} | ({"text": self.text.num_heads} if self.text else {})

    @property
    def gelus(self) -> dict[str, Gelu]:
        """The GELU of each tower."""
        return {"vision": self.vision.gelu} | ({"text": self.text.gelu} if self.text else {})

    @property
    def depths(self) -> dict[str, int]:
        """Blocks of each tower."""
        return {"vision": self.vision.depth} | ({"text": self.text.depth} if self.text else {})

    def vision_tower(self) -> VisionTower:
        """Returns the vision tower with these weights, in float32, for evaluation."""
        with torch.device("meta"):
            tower = VisionTower(self.vision, patch_size=self.patch_size, grid=self.grid)
        named = {n.removeprefix("vision."): t.float() for n, t in self.state.items() if n.startswith("vision.")}
        tower.load_state_dict(named, assign=True)
        return tower.eval()

    def towers(self) -> TwoTowers:
        """Returns both towers with these weights, in float32, for evaluation.

        Raises:
            ValueError: if there is no text tower.
        """
        self.needs_text("towers")
        towers = _empty(self.vision, self.text, self.patch_size, self.grid, self.vocab_size, self.context_length)
        towers.load_state_dict({n: t.float() for n, t in self.state.items()}, assign=True)
        return towers.eval()

    def needs_text(self, purpose: str) -> None:
        """Raises ValueError if there is no text tower."""
        if self.text is None:
            raise ValueError(f"these weights are of a vision tower alone: {purpose} would need a text tower")


def _empty(
    vision: Shape, text: Shape | None, patch: int, grid: tuple[int, int], vocab_size: int, context_length: int
) -> TwoTowers:
    assert text is not None
    with torch.device("meta"):
        images = VisionTower(vision, patch_size=patch, grid=grid)
        sizes = {"vocab_size": vocab_size, "context_length": context_length, "embed_dim": vision.width}
        return TwoTowers(images, TextTower(text, **sizes))


def square_pixels(image_size: int, patch_size: int, *, filter: str, antialias: bool = True) -> dict[str, Any]:
    """Returns the pixel contract of images squashed to a square, as the patchifier of squares has it.

    Args:
        image_size: side in pixels.
        patch_size: side of a patch in pixels.
        filter: of the resize, bilinear or bicubic.
        antialias: whether it is antialiased; all libraries but big_vision do.
    """
    how = {"image_size": image_size, "patch_size": patch_size, "filter": filter, "antialias": antialias}
    return {"patchifier": SQUARE, **how, "mean": 0.5, "std": 0.5}


def native_pixels(patch_size: int, table: int) -> dict[str, Any]:
    """Returns the pixel contract of images that keep their aspect ratio, as published.

    Args:
        patch_size: side of a patch in pixels.
        table: side of the position table.
    """
    how = {"patch_size": patch_size, "table": table, "max_scale": None, "filter": "bilinear", "antialias": True}
    return {"patchifier": NATIVE, **how, "mean": 0.5, "std": 0.5}


def exact_gelu(tower: str) -> str:
    """Returns the note on weights whose configuration asks for the exact GELU, which they then have."""
    return (
        f"the {tower} tower has the exact GELU, as its configuration asks: a recipe that goes on from it should set "
        f"model.{tower}.gelu to exact. Released weights were trained with the tanh approximation, about 1e-4 away"
    )


def identity_head(like_D: Tensor) -> dict[str, Tensor]:
    """Returns weight and bias of a projection that changes nothing, for text towers without one.

    Args:
        like_D: a vector of the text tower's width, of the dtype wanted.
    """
    weight = torch.eye(len(like_D), dtype=like_D.dtype, device=like_D.device)
    return {"weight": weight, "bias": torch.zeros_like(like_D)}


@dataclass(frozen=True)
class Sizes:
    """What the tensors alone tell of two towers: all but attention heads, 1 in both shapes, and GELU, tanh there.

    Args:
        vision: shape of the vision tower.
        text: shape of the text tower; None if there is none.
        patch_size: in pixels.
        grid: (rows, columns) of the position table.
        vocab_size: rows of the token table; 0 without a text tower.
        context_length: ids per text; 0 likewise.
    """

    vision: Shape
    text: Shape | None
    patch_size: int
    grid: tuple[int, int]
    vocab_size: int
    context_length: int


AXES = {"vision.embed.weight": 2, "vision.pos_embed": 3, "text.token_embed.weight": 2, "text.pos_embed": 2}
AXES |= {f"{tower}.norm.weight": 1 for tower in ("vision", "text")}
AXES |= {f"{tower}.blocks.0.mlp.fc1.weight": 2 for tower in ("vision", "text")}


def measure(state: Mapping[str, Tensor], place: str) -> Sizes:
    """Returns the sizes of the towers after comparing every tensor with them.

    Args:
        state: under our names, complete.
        place: what messages call the file.

    Raises:
        ValueError: if the tensors do not fit together; the first are listed.
    """
    for name in [n for n, axes in AXES.items() if n in state and state[n].ndim != axes]:
        raise ValueError(f"{place}: {name} {list(state[name].shape)} cannot be read as a tensor of {AXES[name]} axes")
    kernel, table = state["vision.embed.weight"], state["vision.pos_embed"]
    vision = _shape(state, "vision")
    text = _shape(state, "text") if "text.pos_embed" in state else None
    rows, length = (len(state["text.token_embed.weight"]), len(state["text.pos_embed"])) if text else (0, 0)
    patch_size = round((kernel.shape[1] / 3) ** 0.5)
    sizes = Sizes(vision, text, patch_size, (table.shape[0], table.shape[1]), rows, length)
    expected = _empty(vision, text or vision, patch_size, sizes.grid, max(rows, 1), max(length, 1)).state_dict()
    wanted = {n: t.shape for n, t in expected.items() if text is not None or n.startswith("vision.")}
    wrong = [f"{n}: found {list(state[n].shape)}, expected {list(s)}" for n, s in wanted.items() if state[n].shape != s]
    if wrong:
        listed, like = "; ".join(wrong[:4]), nearest(vision.width, vision.depth, patch_size)
        raise ValueError(f"{place}: the tensors do not fit together ({listed}). {like}")
    return sizes


def compare(place: str, file: str, tower: str, *, said: Mapping[str, Any], found: Mapping[str, Any], like: str) -> None:
    """Raises ValueError for the first value that a configuration says otherwise than the tensors.

    Args:
        place: what messages call the weights.
        file: what they call the configuration.
        tower: that both are of.
        said: by the configuration.
        found: in the tensors, under the same keys.
        like: the nearest known shape, as a sentence.
    """
    for key, value in found.items():
        if said[key] != value:
            raise ValueError(
                f"{place}: {file} says {key} {said[key]} of the {tower} tower, the tensors have {value}. {like}"
            )


def check_pixels(place: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError for the first value of a processor that makes other pixels than our towers read.

    Args:
        place: what the message calls the weights.
        found: what the files say.
        expected: what our towers read, a number for all three channels or a flag; keys that are not there are passed.
    """
    for key, value in expected.items():
        said = found.get(key, value)
        each = [*said] if isinstance(said, list | tuple) else [said] * 3
        if len(each) != 3 or any(one is None or not abs(one - value) <= 1e-6 for one in each):
            raise ValueError(f"{place}: {key} is {said}, and our towers read pixels of {PIXELS_READ}")


def _shape(state: Mapping[str, Tensor], tower: str) -> Shape:
    width, depth = len(state[f"{tower}.norm.weight"]), depth_of(state, f"{tower}.blocks.{{i}}.")
    return Shape(width, depth, len(state[f"{tower}.blocks.0.mlp.fc1.weight"]), 1)


def assemble(
    format: str,
    state: Mapping[str, Tensor],
    *,
    place: str,
    heads: Mapping[str, int],
    native: bool,
    gelus: Mapping[str, Gelu] | None = None,
    pixels: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    notes: tuple[str, ...] = (),
) -> Weights:
    """Returns the weights after measuring all shapes, so that what is returned loads.

    Args:
        format: where they come from.
        state: under our names.
        place: what messages call the file.
        heads: attention heads of each tower, which no tensor tells.
        native: whether images keep their aspect ratio.
        gelus: the GELU of each tower; of one that is left out tanh, as all released weights were trained.
        pixels: the pixel contract, if known.
        tokenizer: if there is one.
        notes: sentences.

    Raises:
        ValueError: if the tensors do not fit together, or the tokenizer has more ids than the token table rows.
    """
    default: dict[str, Gelu] = {"vision": "tanh", "text": "tanh"}
    sizes, acts = measure(state, place), default | dict(gelus or {})
    vision = replace(sizes.vision, num_heads=heads["vision"], gelu=acts["vision"])
    text = replace(sizes.text, num_heads=heads["text"], gelu=acts["text"]) if sizes.text else None
    for tower, shape in (("vision", vision), ("text", text)):
        if shape is not None and (shape.num_heads < 1 or shape.width % shape.num_heads):
            raise ValueError(f"{place}: {shape.num_heads} heads do not divide the {tower} tower's width {shape.width}")
    rows = sizes.vocab_size
    if tokenizer is not None and tokenizer.vocab_size != rows:
        raise ValueError(
            f"{place}: the tokenizer is of another vocabulary, {tokenizer.vocab_size} ids where the token table has "
            f"{rows} rows"
        )
    where = (sizes.patch_size, sizes.grid, native, rows, sizes.context_length)
    return Weights(format, dict(state), vision, text, *where, pixels, tokenizer, notes)
