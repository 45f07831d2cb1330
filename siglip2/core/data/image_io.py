"""Bytes of an image file -> uint8 RGB tensor: torchvision for the usual files, PIL for the odd ones.

Both give the same pixels for the same file (alpha is dropped, as `convert("RGB")` does in open_clip), so the
result does not tell which one read it.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

MAX_PIXELS = 89_478_485  # where PIL begins to warn of decompression bombs; it refuses from twice as many on
# What torchvision decodes to the pixels that PIL gives; the rest (CMYK, 16 bit, palettes, GIF) goes to PIL.
FAST = {
    "JPEG": ("RGB", "L"),
    "MPO": ("RGB", "L"),
    "PNG": ("RGB", "L", "RGBA", "LA", "1"),
    "WEBP": ("RGB", "RGBA"),
}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image file, upright (EXIF orientation applied).

    Args:
        data: a whole image file: JPEG, PNG, WebP, or anything PIL reads (the first frame of a GIF).
        max_pixels: largest width x height to decode; checked on the header, before any memory is taken. PIL's own
            limit, twice the default, is not lifted.

    Returns:
        uint8 RGB, [3, H, W], channels last in memory, which is what decoders write and resizing likes best.

    Raises:
        ValueError: if the file is empty, not an image, truncated, or larger than `max_pixels`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is common in web data and says nothing of the pixels
        image = _open(data, max_pixels)
        if _is_fast(image) and (decoded := _decode_fast(data)) is not None:
            return decoded
        try:
            return from_pil(image)
        except Exception as error:  # PIL's readers raise whatever their parser stumbled on
            raise ValueError(f"the image cannot be decoded: {error} ({len(data)} bytes)") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ValueError("the image file is empty")
    try:
        image = Image.open(io.BytesIO(data))  # reads the header only
    except Image.DecompressionBombError:
        raise ValueError(f"the image is over the limit of {min(max_pixels, 2 * MAX_PIXELS)} pixels") from None
    except Exception:  # see above
        raise ValueError(f"not an image file, or its header is broken (it starts with {data[:8]!r})") from None
    if image.width * image.height > max_pixels:
        raise ValueError(f"the image is {image.width}x{image.height}, over the limit of {max_pixels} pixels")
    return image


def _is_fast(image: Image.Image) -> bool:
    if image.mode not in FAST.get(image.format or "", ()):
        return False
    return image.format != "WEBP" or "exif" not in image.info  # torchvision does not turn WebP pictures upright


def _decode_fast(data: bytes) -> Tensor | None:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns about read-only memory
    try:
        decoded: Tensor = torchvision_decode(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:  # PIL may still read it, and says better what is wrong if it cannot
        return None
    # PNG with 16 bits a channel comes back as uint16: PIL keeps the high byte
    return decoded if decoded.dtype == torch.uint8 else (decoded.to(torch.int32) >> 8).to(torch.uint8)


def from_pil(image: Image.Image) -> Tensor:
    """Returns the pixels of an opened picture as `decode_image` does: uint8 RGB [3, H, W], upright, alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    pixels_HWC = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)
