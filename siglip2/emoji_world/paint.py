"""Turn sprites into stamps, place them so that nearer ones occlude further ones, and paint them on a noisy gradient."""

# H, W height and width of a picture in pixels; h, w those of one stamp (a turned and scaled sprite)

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from siglip2.emoji_world.catalogue import Emoji, sprite

BASE = 0.52  # long side of an emoji at distance 1, as a share of the picture's `reach`. ours
# short sides in a reach at most: above the sqrt(2) of 1:2, and an emoji turned by MAX_TURN still fits. ours
MAX_REACH = 1.45
MAX_TURN = 22.0  # degrees; more would turn an arrow or a digit into another. ours
MIN_VISIBLE = 0.35  # what is occluded more than this is left out of the picture and of the captions. ours
# hues in degrees; between the two ranges lie greens and purples that nobody would call either warm or cool
HUES = {"warm": (-35.0, 60.0), "cool": (150.0, 260.0)}


@dataclass(eq=False)
class Stamp:
    """An emoji about to be painted: RGB float32 [h, w, 3], coverage float32 [h, w, 1] in [0, 1], top left corner."""

    emoji: Emoji
    z: float
    rgb: np.ndarray
    alpha: np.ndarray
    x: int = 0
    y: int = 0
    visible: float = 1.0

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture that it covers."""
        h, w = self.alpha.shape[:2]
        return slice(self.y, self.y + h), slice(self.x, self.x + w)


def reach(width: int, height: int) -> float:
    """The length in pixels that sizes follow: sqrt(H * W), but no more than fits into the short side."""
    return min(math.sqrt(width * height), MAX_REACH * min(width, height))


@lru_cache(maxsize=4096)
def _picture(emoji_id: str) -> Image.Image:
    return Image.fromarray(sprite(emoji_id))


def make_stamp(rng: np.random.Generator, emoji: Emoji, z: float, size: tuple[int, int]) -> Stamp:
    """Scale the sprite for its distance in a picture of `size` (W, H), turn it a little and jitter its colours."""
    picture = _picture(emoji.id)
    scale = BASE * reach(*size) / z / max(picture.size)
    resized = picture.resize([max(2, round(side * scale)) for side in picture.size], Image.Resampling.BILINEAR)
    turned = resized.rotate(rng.uniform(-MAX_TURN, MAX_TURN), Image.Resampling.BILINEAR, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    if turned.width > size[0] or turned.height > size[1]:
        turned.thumbnail(size)  # only a large single, turned: a few pixels less rather than clipped
    pixels = np.asarray(turned, dtype=np.float32)
    gain = rng.uniform(0.8, 1.1) * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    return Stamp(emoji, z, pixels[..., :3] * gain.astype(np.float32), pixels[..., 3:] / 255)


def arrange(rng: np.random.Generator, stamps: list[Stamp], width: int, height: int) -> tuple[list[Stamp], np.ndarray]:
    """Place stamps nearest first and drop those too much occluded; returns the rest and the instance mask [H, W]."""
    mask = np.zeros((height, width), dtype=np.uint8)
    kept: list[Stamp] = []
    for stamp in stamps:
        h, w = stamp.alpha.shape[:2]
        places = [(int(x * (width - w + 1)), int(y * (height - h + 1))) for x, y in rng.random((6, 2)).tolist()]
        stamp.x, stamp.y = min(places, key=lambda place: _crowding(place, (w, h), kept))
        window = mask[stamp.window]
        # half of its own maximum: a thin emoji of a few pixels may be nowhere opaque, and the nearest must stay
        solid = stamp.alpha[..., 0] >= stamp.alpha.max() / 2
        seen = solid & (window == 0)
        stamp.visible = float(seen.sum()) / max(1, int(solid.sum()))
        if stamp.visible >= MIN_VISIBLE:
            kept.append(stamp)
            window[seen] = len(kept)
    return kept, mask


def _crowding(place: tuple[int, int], size: tuple[int, int], others: list[Stamp]) -> float:
    """Share of a box that the boxes of others cover, up to 0.25 for free, so that some occlusion remains."""
    covered = 0
    for other in others:
        h, w = other.alpha.shape[:2]
        dx = min(place[0] + size[0], other.x + w) - max(place[0], other.x)
        dy = min(place[1] + size[1], other.y + h) - max(place[1], other.y)
        covered += max(0, dx) * max(0, dy)
    return max(0.25, covered / (size[0] * size[1]))


def background(rng: np.random.Generator, width: int, height: int, temperature: str) -> np.ndarray:
    """A noisy gradient between two warm or two cool colours, float32 [H, W, 3] in [0, 255]."""
    low, high = HUES[temperature]
    ends = [
        colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
        for hue, saturation, value in rng.uniform((low, 0.2, 0.4), (high, 0.75, 0.95), (2, 3)).tolist()
    ]
    start, stop = np.array(ends) * 255
    angle = rng.uniform(0, 2 * math.pi)
    grid = np.linspace(-0.5, 0.5, 5)
    along = 0.5 + 0.7 * (grid[:, None] * math.sin(angle) + grid[None, :] * math.cos(angle))
    coarse = start + along[..., None] * (stop - start) + rng.normal(0, rng.uniform(4, 22), (5, 5, 1))
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def paint(rng: np.random.Generator, canvas: np.ndarray, stamps: list[Stamp]) -> np.ndarray:
    """Paint the stamps, furthest first, and add pixel noise; uint8 [H, W, 3]."""
    image = canvas.copy()
    for stamp in reversed(stamps):
        patch = image[stamp.window]
        patch += stamp.alpha * (stamp.rgb - patch)
    amplitude = rng.uniform(0, 12) / 128
    noise = np.frombuffer(rng.bytes(image.size), dtype=np.int8).reshape(image.shape)
    image += noise * np.float32(amplitude)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)
