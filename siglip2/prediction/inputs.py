"""Pictures of any kind made into what the vision tower reads, and what became of one."""

# B pictures, N patches

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.data.image_io import decode_image, from_pil
from siglip2.core.data.storage import is_local, read_file

Picture = str | Path | bytes | Image.Image | Tensor | NDArray[np.uint8]


@dataclass(frozen=True)
class Explanation:
    """What a model sees of a picture.

    Args:
        size: (height, width) of the picture in pixels, upright.
        grid: (rows, columns) of its patches.
        patch_size: side of a patch in pixels.
        seq_len: patches that a row has room for.
        resized: the pixels that the patches hold, uint8 [3, H, W].
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: int
    seq_len: int
    resized: Tensor

    @property
    def tokens(self) -> int:
        """Patches of the picture, padding left out."""
        return math.prod(self.grid)

    @property
    def scale(self) -> tuple[float, float]:
        """How much larger it became, in height and in width."""
        height, width = (side * self.patch_size / old for side, old in zip(self.grid, self.size, strict=True))
        return height, width

    def __str__(self) -> str:
        (height, width), (rows, columns) = self.size, self.grid
        shown = f"{width} x {height} px -> {columns * self.patch_size} x {rows * self.patch_size} px"
        filled = f"{self.tokens} of {self.seq_len} tokens"
        stretched = self.scale[1] / self.scale[0] - 1
        return (
            f"{shown} (x {self.scale[1]:.2f}, x {self.scale[0]:.2f}), {columns} x {rows} patches of {self.patch_size} "
            f"px, {filled}, aspect ratio {stretched:+.1%}"
        )

    def draw(self) -> Image.Image:
        """Returns the resized picture under the lines between its patches."""
        picture = Image.fromarray(self.resized.permute(1, 2, 0).contiguous().numpy())
        lines, (width, height) = ImageDraw.Draw(picture), picture.size
        for x in range(self.patch_size, width, self.patch_size):
            lines.line((x, 0, x, height), fill=(255, 255, 255))
        for y in range(self.patch_size, height, self.patch_size):
            lines.line((0, y, width, y), fill=(255, 255, 255))
        return picture


def pixels_of(image: Picture) -> Tensor:
    """Returns a picture as uint8 RGB [3, H, W], upright.

    Args:
        image: a path or URL, a whole image file as bytes, a PIL picture, a uint8 tensor [3, H, W] or array [H, W, 3].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as a picture, has no pixels, or is no such tensor.
    """
    if isinstance(image, str | Path):
        path = str(image if not is_local(str(image)) else Path(image).expanduser())
        try:
            return decode_image(read_file(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if isinstance(image, bytes | bytearray):
        return decode_image(bytes(image))
    if isinstance(image, Image.Image):
        return _with_pixels(from_pil(image))
    pixels: Any = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        # a copy: torch takes no negative strides, and warns of arrays that cannot be written to, as PIL's are
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor | np.ndarray) else type(image).__name__
        raise ValueError(
            f"a picture is {found}, expected a path, bytes, a PIL picture, a uint8 tensor [3, H, W] or a uint8 array "
            f"[H, W, 3]: pixels are scaled by the model, so give them as 0 to 255"
        )
    return _with_pixels(pixels.cpu())


def _with_pixels(picture: Tensor) -> Tensor:
    if not picture.numel():
        _, height, width = picture.shape
        raise ValueError(f"a picture is {width} x {height} px, expected at least one pixel")
    return picture


def each(images: Picture | Sequence[Picture]) -> list[Picture]:
    """Returns the pictures of what may be one picture or several."""
    if isinstance(images, str | Path | bytes | bytearray | Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray):
        return [images] if images.ndim == 3 else list(_rows(images))
    return list(images) if isinstance(images, Iterable) else [images]


def _rows(images: Any) -> Iterator[Any]:
    if images.ndim != 4:
        raise ValueError(
            f"pictures of shape {list(images.shape)}, expected a tensor [3, H, W] or [B, 3, H, W], or an array "
            f"[H, W, 3] or [B, H, W, 3]"
        )
    yield from images


def by_length(images: Patches) -> tuple[int, int]:
    """Returns what a single picture is sorted by: its patches without padding, and their rows; the longest first."""
    if images.valid is None or images.sizes is None:
        return 0, 0
    return -int(images.valid.sum()), int(images.sizes[0, 0, 0])


def equally_long(images: Patches) -> list[Tensor]:
    """Returns the numbers of the pictures of each length, int64, without padding."""
    if images.valid is None:
        return [torch.arange(images.num_images)]
    lengths_B = images.valid.sum(1)
    return [(lengths_B == length).nonzero().flatten() for length in lengths_B.unique()]


def trimmed(images: Patches) -> Patches:
    """Returns pictures without the padding that all of them have; without mask if they are equally long.

    Pictures of one grid share its positions, which the tower then makes once.
    """
    if images.valid is None or images.sizes is None:
        return images
    lengths_B, sizes_B2 = images.valid.sum(1), images.sizes[:, 0]
    longest = int(lengths_B.max())
    images = replace(images, patches=images.patches[:, :longest], coords=images.coords[:, :longest])
    if bool((sizes_B2 != sizes_B2[0]).any()):
        even = bool((lengths_B == longest).all())
        return replace(images, valid=None if even else images.valid[:, :longest])  # type: ignore[index]
    rows, columns = sizes_B2[0].tolist()
    return replace(images, coords=images.coords[:1], valid=None, sizes=None, grid=(rows, columns))
