"""What a picture looks like in a few bytes, so that copies of it are found after cropping and encoding."""

import io
import math
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

SIDE, KEPT, COLOURS = 32, 8, 4
SILENT = 0.5  # coefficients below this, of pixels in [0, 255], are noise: a plain picture has none but the mean
ORIENTATION, TURNED = 0x0112, frozenset({5, 6, 7, 8})  # EXIF: those four swap width and height


@dataclass(frozen=True)
class Look:
    """A picture in 112 bytes or so.

    Args:
        shape_bits: 64 bits of the luminance, a perceptual hash.
        colours: mean colours of a 4 x 4 grid, uint8 RGB in reading order, 48 bytes: the hash sees no hue.
    """

    shape_bits: int
    colours: bytes


def look(image_CHW: Tensor) -> Look:
    """Returns the look of a picture.

    The hash is the usual one of 64 bits: luminance of 32 x 32 pixels, the lowest 8 x 8 coefficients of its cosine
    transform, each above their median or not (Zauner, Implementation and Benchmarking of Perceptual Image Hash
    Functions, 2010).

    Args:
        image_CHW: uint8 RGB.
    """
    small = torch.nn.functional.interpolate(
        image_CHW[None].float(), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
    )[0]
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL's mode L
    grey = np.asarray((weights[:, None, None] * small).sum(0), dtype=np.float64)
    transform = _cosines()
    low = (transform @ grey @ transform.T)[:KEPT, :KEPT].ravel()
    low = np.where(np.abs(low) < SILENT, 0, low)
    bits = low > np.median(low)
    grid = small.reshape(3, COLOURS, SIDE // COLOURS, COLOURS, SIDE // COLOURS).mean((2, 4)).round()
    colours = grid.permute(1, 2, 0).to(torch.uint8).numpy().tobytes()
    return Look(int.from_bytes(np.packbits(bits).tobytes(), "big"), colours)


@cache
def _cosines() -> npt.NDArray[np.float64]:
    """The orthonormal cosine transform (DCT-II) as a matrix."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    matrix = math.sqrt(2 / SIDE) * np.cos(math.pi * rows * (2 * columns + 1) / (2 * SIDE))
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float64)


def header(data: bytes) -> tuple[int, int, str]:
    """Returns width, height (upright, EXIF orientation applied) and format of an image file, without decoding it.

    Raises:
        ValueError: if there is no header that can be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            turned = image.getexif().get(ORIENTATION) in TURNED
        except Exception:  # PIL's readers raise whatever their parser stumbled on
            raise ValueError("not an image file, or its header is broken") from None
    width, height = (image.height, image.width) if turned else image.size
    return width, height, image.format or "unknown"
