"""`fixed`: every image becomes the same square grid of patches."""

import difflib
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.hooks import hookimpl
from siglip2.core.layout import Layout
from siglip2.core.plugin import Plugin
from siglip2.core.square import FILTERS, square_patches
from siglip2.core.views import View


class Protocol(NamedTuple):
    """How a library resizes."""

    filter: str
    antialias: bool


PROTOCOLS = {
    "transformers": Protocol("bilinear", antialias=True),  # SiglipImageProcessor with resample=2
    "big_vision": Protocol("bilinear", antialias=False),  # pp/ops_image.py, `resize(N)` in the SigLIP 2 demo
    "open_clip": Protocol("bicubic", antialias=True),  # transform.py, resize_mode "squash"
}


@dataclass(frozen=True)
class FixedPatchifier:
    """Squashes images to a square, ignoring their aspect ratio, and cuts it into patches (SigLIP 2, section 2.1).

    Args:
        image_size: side of the square in pixels.
        patch_size: side of a patch in pixels.
        batch_size: examples per step over all devices.
        filter: resize filter, a key of `FILTERS`.
        antialias: whether the resize is antialiased.
    """

    image_size: int
    patch_size: int
    batch_size: int
    filter: str
    antialias: bool

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns); pixels beyond the last whole patch are dropped (384 at patch 14 gives 27 x 27)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self.layout(0),)

    def layout(self, index: int) -> Layout:
        return Layout(seq_len=self.grid[0] * self.grid[1], batch_size=self.batch_size)

    def eval_layout(self, batch_size: int) -> Layout:
        return Layout(seq_len=self.grid[0] * self.grid[1], batch_size=batch_size)

    def __call__(self, image: Tensor, view: View, layout: Layout, rng: np.random.Generator | None = None) -> Patches:
        """Returns the patches [1, N, P] uint8 of an image [3, H, W] uint8."""
        return square_patches(image, self.image_size, self.patch_size, filter=self.filter, antialias=self.antialias)

    def contract(self) -> dict[str, object]:
        plain = {k: v for k, v in asdict(self).items() if k != "batch_size"}
        return {"patchifier": "fixed", **plain, "mean": 0.5, "std": 0.5}


class Fixed(Plugin):
    """Square images of one resolution: constant sequence length, no padding, no mask.

    Args:
        image_size: side of the square in pixels.
        patch_size: side of a patch in pixels.
        batch_size: examples per step over all devices (per micro-batch if gradients are accumulated).
        protocol: whose resize is followed: transformers (bilinear, antialiased), big_vision (bilinear, not antialiased)
            or open_clip (bicubic, antialiased). Keep the one that the weights were trained with; SigLIP 2 does not
            publish its own. Pixels are rounded to whole grey levels, where big_vision cuts the fraction off.
        filter: resize filter, bilinear or bicubic, in place of the protocol's.
        antialias: whether the resize is antialiased, in place of the protocol's.
        start: leave at 0: a recipe always needs its patchifier.
        stop: leave at 1.

    Raises:
        ValueError: if a size is not positive, a patch is larger than the image, or protocol or filter are unknown.
    """

    name = "fixed"

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        batch_size: int = 32768,
        protocol: str = "transformers",
        filter: str | None = None,
        antialias: bool | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        if not 0 < patch_size <= image_size or batch_size < 1:
            raise ValueError(
                f"fixed: expected 0 < patch_size <= image_size and batch_size >= 1, found image_size={image_size}, "
                f"patch_size={patch_size}, batch_size={batch_size}"
            )
        if protocol not in PROTOCOLS:
            close = difflib.get_close_matches(protocol, PROTOCOLS, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"fixed: no protocol called '{protocol}', {hint}expected one of {', '.join(PROTOCOLS)}")
        if filter is not None and filter not in FILTERS:
            raise ValueError(f"fixed: no resize filter called '{filter}', expected one of {', '.join(FILTERS)}")
        followed = PROTOCOLS[protocol]
        self._patchifier = FixedPatchifier(
            image_size,
            patch_size,
            batch_size,
            filter=followed.filter if filter is None else filter,
            antialias=followed.antialias if antialias is None else antialias,
        )

    @hookimpl
    def patchifier(self) -> FixedPatchifier:
        return self._patchifier
