"""Compose one picture of the emoji world, with exact captions, boxes, instance masks and distances.

A sample is a pure function of (seed, split, kind, index) and the options: the same anywhere, in any order.
"""

# H, W height and width of a picture in pixels

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from siglip2.emoji_world.catalogue import Emoji
from siglip2.emoji_world.paint import arrange, background, make_stamp, paint, reach
from siglip2.emoji_world.phrases import listing, relation

KINDS = ("single", "scene")
COUNTS = (0.1, 0.35, 0.25, 0.2, 0.1)  # share of scenes with 1, 2, .. 5 emoji. ours
# see SceneOptions.bias
WARM_GROUPS = frozenset({"Smileys & Emotion", "Animals & Nature", "Travel & Places", "Symbols"})


@dataclass(frozen=True)
class SceneOptions:
    """What a sample depends on besides its number.

    Args:
        languages: languages of the captions.
        size: long side of the picture in pixels.
        bias: in [0, 1], how strongly the background tells the group of the first emoji: WARM_GROUPS get a warm
            background with probability (1 + bias) / 2, the other groups with (1 - bias) / 2.
        scene_aspect: scenes are up to so many times as wide as high, or as high as wide; at least 1.
        single_aspect: the same for singles.
    """

    languages: tuple[str, ...] = ("en",)
    size: int = 96
    bias: float = 0.0
    scene_aspect: float = 2.0
    single_aspect: float = 1.0


@dataclass(frozen=True, eq=False)
class Region:
    """One emoji as it is seen.

    Args:
        emoji: which one.
        box: (xmin, ymin, xmax, ymax) around its visible pixels, each a share of width or height in [0, 1].
        z: distance; the unturned long side is BASE * reach(W, H) / z pixels.
        visible: share of its pixels that nothing nearer covers, in (0, 1].
    """

    emoji: Emoji
    box: tuple[float, float, float, float]
    z: float
    visible: float


@dataclass(frozen=True, eq=False)
class Scene:
    """One sample.

    Args:
        kind: "single" or "scene".
        image: uint8 [H, W, 3].
        captions: text by language.
        regions: nearest first.
        instance_mask: uint8 [H, W]; 0 is background, k is `regions[k - 1]`.
        background: "warm" or "cool".
        relation: "left" or "above" if the captions claim it, else "".
    """

    kind: str
    image: np.ndarray
    captions: dict[str, str]
    regions: tuple[Region, ...]
    instance_mask: np.ndarray
    background: str
    relation: str


def compose(
    pool: Sequence[Emoji], index: int, *, kind: str, seed: int, split: str, options: SceneOptions = SceneOptions()
) -> Scene:
    """Sample number `index` of a split.

    Args:
        pool: emoji to draw from. Over `len(pool)` successive singles each one occurs exactly once.
        index: from 0.
        kind: "single", one large emoji, or "scene", one to five at several distances.
        seed: of the whole world.
        split: any word; splits with different names share no random numbers.
        options: languages, size, bias, aspect ratios.

    Raises:
        ValueError: if the kind is unknown or the pool is empty.
    """
    if kind not in KINDS or not pool:
        raise ValueError(f"found kind {kind!r} and {len(pool)} emoji; expected one of {KINDS} and at least one emoji")
    stream = (seed, zlib.crc32(split.encode()), KINDS.index(kind))
    rng = np.random.Generator(np.random.PCG64((*stream, index)))
    if kind == "single":
        width, height = _aspect(rng, options.size, options.single_aspect)
        # a range below 1: in a square, singles are nearer, so larger, than anything in a scene; in a wide or tall
        # picture they are as large beside its short side
        nearness = reach(width, height) / min(width, height)
        cast = [(pool[_turn(len(pool), index, stream)], nearness * float(rng.uniform(0.56, 0.95)))]
    else:
        width, height = _aspect(rng, options.size, options.scene_aspect)
        cast = _cast(rng, pool)
    temperature = _temperature(rng, cast[0][0].group, options.bias)
    stamps, mask = arrange(rng, [make_stamp(rng, emoji, z, (width, height)) for emoji, z in cast], width, height)
    image = paint(rng, background(rng, width, height, temperature), stamps)
    regions = tuple(
        Region(stamp.emoji, _box(mask == k), stamp.z, stamp.visible) for k, stamp in enumerate(stamps, start=1)
    )
    captions, claim = _caption(rng, regions, options.languages)
    return Scene(kind, image, captions, regions, mask, temperature, claim)


def _turn(length: int, index: int, stream: tuple[int, ...]) -> int:
    return _shuffled(length, (*stream, 1, index // length))[index % length]


@lru_cache(maxsize=64)
def _shuffled(length: int, stream: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.random.Generator(np.random.PCG64(stream)).permutation(length).tolist())


def _cast(rng: np.random.Generator, pool: Sequence[Emoji]) -> list[tuple[Emoji, float]]:
    """One to five different emoji with their distances, nearest first."""
    count = min(1 + int(rng.choice(len(COUNTS), p=COUNTS)), len(pool))
    nearest = float(rng.uniform(1.0, 1.6))  # so that no picture holds nothing but specks
    distances = [nearest, *np.sort(rng.uniform(nearest, 2.4, count - 1)).tolist()]
    return [(pool[i], z) for i, z in zip(rng.choice(len(pool), count, replace=False), distances, strict=True)]


def _aspect(rng: np.random.Generator, size: int, most: float) -> tuple[int, int]:
    """Width and height, log-uniform between 1:most and most:1, the longer one `size`; a square draws nothing."""
    ratio = most ** rng.uniform(-1.0, 1.0) if most > 1 else 1.0
    return (size, round(size / ratio)) if ratio > 1 else (round(size * ratio), size)


def _temperature(rng: np.random.Generator, group: str, bias: float) -> str:
    sign = 1 if group in WARM_GROUPS else -1
    return "warm" if rng.random() < (1 + sign * bias) / 2 else "cool"


def _box(region: np.ndarray) -> tuple[float, float, float, float]:
    """The box around the true pixels of a mask [H, W], in shares of width and height."""
    height, width = region.shape
    columns, rows = np.flatnonzero(region.any(axis=0)), np.flatnonzero(region.any(axis=1))
    xmin, xmax, ymin, ymax = columns[0] / width, (columns[-1] + 1) / width, rows[0] / height, (rows[-1] + 1) / height
    return float(xmin), float(ymin), float(xmax), float(ymax)


def _caption(
    rng: np.random.Generator, regions: tuple[Region, ...], languages: Sequence[str]
) -> tuple[dict[str, str], str]:
    """Captions by language, and the relation they claim ("left", "above" or "")."""
    claims = _claims(regions)
    claim, order = claims[int(rng.random() * len(claims))]
    captions = {}
    for language in languages:
        names = [region.emoji.names[language] for region in order]
        captions[language] = relation(claim, names[0], names[1], language) if claim else listing(names, language)
    return captions, claim


def _claims(regions: tuple[Region, ...]) -> list[tuple[str, tuple[Region, ...]]]:
    """What may truly be said: a plain list, and for two that do not overlap along an axis, which comes first."""
    claims: list[tuple[str, tuple[Region, ...]]] = [("", regions)]
    if len(regions) == 2:
        for axis, claim in enumerate(("left", "above")):
            for a, b in (regions, regions[::-1]):
                if a.box[axis + 2] <= b.box[axis]:
                    claims.append((claim, (a, b)))
    return claims
