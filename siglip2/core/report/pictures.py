"""Pictures as data URIs, and similarity maps laid over them."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from siglip2.core.report.data import Picture

SHORTEST_LONG_SIDE = 160  # smaller ones are enlarged here: Lanczos is smoother than a browser's scaling
LONGEST_LONG_SIDE = 320  # about twice what a page column shows, for dense screens
QUALITY = 84

# Nine equidistant stops of matplotlib's inferno: dark where there is no similarity, and even in lightness.
INFERNO = np.array(
    [
        (0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96),
        (207, 68, 70), (237, 105, 37), (251, 155, 6), (252, 255, 164),
    ],
    dtype=np.float64,
)  # fmt: skip


def fit(picture: Image.Image) -> Image.Image:
    """The picture with a long side the page can use, its aspect kept."""
    long_side = max(picture.size)
    target = min(max(long_side, SHORTEST_LONG_SIDE), LONGEST_LONG_SIDE)
    if target == long_side:
        return picture
    width, height = (max(1, round(side * target / long_side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(picture: Picture | Image.Image) -> str:
    """The picture as a WebP data URI, a few kilobytes long."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    buffer = io.BytesIO()
    fit(image).save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def similarity_range(similarity: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Smallest and largest finite similarity; (0, 0) if there is none."""
    finite = similarity[np.isfinite(similarity)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def colour(level: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Inferno colours [H, W, 3] in 0..255 of levels [H, W] in 0..1."""
    stops = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(level, stops, INFERNO[:, channel]) for channel in range(3)], axis=-1)


def overlay(picture: Picture, similarity: npt.NDArray[np.floating]) -> Image.Image:
    """The greyed picture under a smooth, semi-transparent map of the similarity, scaled to its own range.

    Args:
        picture: uint8 [H, W, 3].
        similarity: [rows, columns] over the patch grid; not finite counts as the smallest.

    Returns:
        RGB image of the size the page shows.
    """
    low, high = similarity_range(similarity)
    level = np.zeros(similarity.shape, dtype=np.float32)
    if high > low:
        scaled = (similarity.astype(np.float64) - low) / (high - low)
        level = np.where(np.isfinite(similarity), scaled, 0.0).astype(np.float32)
    base = fit(Image.fromarray(np.ascontiguousarray(picture)))
    smooth = np.clip(np.asarray(Image.fromarray(level).resize(base.size, Image.Resampling.BICUBIC)), 0, 1)
    rgb = np.asarray(base, dtype=np.float64)
    grey = 0.75 * rgb.mean(axis=-1, keepdims=True) + 0.25 * rgb
    mixed = 0.45 * grey + 0.55 * colour(smooth)
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
