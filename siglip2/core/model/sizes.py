"""The published sizes, by name."""

import difflib
from dataclasses import dataclass, replace
from typing import Literal, get_args

Gelu = Literal["tanh", "exact"]


@dataclass(frozen=True)
class Shape:
    """The shape of one transformer.

    Args:
        width: channels of a token.
        depth: number of transformer blocks.
        mlp_dim: hidden channels of each MLP.
        num_heads: attention heads.
        gelu: the GELU of each MLP: its tanh approximation, as all released weights were trained, or exact.

    Raises:
        ValueError: if there is no such GELU.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        if self.gelu not in get_args(Gelu):
            raise ValueError(f"gelu is '{self.gelu}', expected {' or '.join(get_args(Gelu))}")


@dataclass(frozen=True)
class ShapeOptions:
    """Changes to the shape of a tower; null keeps what the size says.

    Args:
        width: channels of a token.
        depth: number of transformer blocks.
        mlp_dim: hidden channels of each MLP.
        num_heads: attention heads; they divide the width.
        gelu: tanh, as all released weights were trained, or exact, as some libraries run them.
    """

    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    gelu: Gelu | None = None

    def applied_to(self, shape: Shape) -> Shape:
        """Returns `shape` with the options that are set."""
        return replace(shape, **{k: v for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class Size:
    """A named pair of towers.

    Args:
        vision: shape of the vision tower; its width is the embedding dimension.
        text: shape of the text tower, followed by a head to the embedding dimension.
        patch_size: side of a patch in pixels.
    """

    vision: Shape
    text: Shape
    patch_size: int


_TINY = Shape(width=64, depth=2, mlp_dim=128, num_heads=2)
_MINI = Shape(width=128, depth=4, mlp_dim=512, num_heads=4)
_B = Shape(width=768, depth=12, mlp_dim=3072, num_heads=12)
_L = Shape(width=1024, depth=24, mlp_dim=4096, num_heads=16)
_SO400M = Shape(width=1152, depth=27, mlp_dim=4304, num_heads=16)
_G_OPT = Shape(width=1536, depth=40, mlp_dim=6144, num_heads=16)  # not the classic g, which is 1408 wide

# google-research/big_vision, models/vit.py, decode_variant; tiny and mini are ours, for tests and the quickstart
SIZES = {
    "tiny/16": Size(_TINY, _TINY, 16),
    "mini/16": Size(_MINI, replace(_MINI, depth=2), 16),
    "B/32": Size(_B, _B, 32),
    "B/16": Size(_B, _B, 16),
    "L/16": Size(_L, _L, 16),
    "So400m/14": Size(_SO400M, _SO400M, 14),
    "So400m/16": Size(_SO400M, _SO400M, 16),
    "g-opt/16": Size(_G_OPT, _SO400M, 16),  # SigLIP 2, section 2.1: g is paired with the So400m text tower
}


def size_named(name: str) -> Size:
    """Returns the size called `name`; raises ValueError with the nearest name if there is none."""
    if name in SIZES:
        return SIZES[name]
    close = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.4)
    hint = f", did you mean '{close[0]}'?" if close else "."
    raise ValueError(f"no model size called '{name}'{hint} Sizes: {', '.join(SIZES)}.")
