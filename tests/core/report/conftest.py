"""A made-up run with drawn pictures, as rich as a real one."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw

from siglip2.core.report import (
    Curve,
    Heatmap,
    ImageExample,
    RetrievalExample,
    RetrievalRow,
    RunReport,
    ZeroShotRow,
)
from siglip2.core.report.data import BoxExample, CaptionExample, Picture, ReferringRow, RetentionRow

TOP1 = {
    "en": 0.712, "de": 0.655, "fr": 0.648, "es": 0.661, "it": 0.622, "ru": 0.583, "zh": 0.547, "ja": 0.521,
    "ar": 0.468, "he": 0.402, "hi": 0.371, "sw": 0.224,
}  # fmt: skip
QUERIES = [
    ("a red circle beside a small yellow square", "en"),
    ("ein blauer Kreis auf grünem Grund", "de"),
    ("un carré jaune à côté d'un grand cercle rouge, vu d'en haut par un jour de pluie", "fr"),
    ("دائرة حمراء بجانب مربع أصفر", "ar"),
    ("עיגול כחול ליד ריבוע צהוב", "he"),
    ("黄色い四角の隣の青い円", "ja"),
    ("红色圆圈旁边的黄色方块", "zh"),
    ("синий круг рядом с жёлтым квадратом", "ru"),
]
RECIPE = """model:
  size: B
  patch_size: 16
plugins:
  - sigmoid: {weight: 1.0}
  - locca: {weight: 1.0}
  - silc: {weight: 1.0, start: 0.8}
  - tips: {weight: 2.5, start: 0.8}
data:
  shards: data/train-{000000..000127}.tar
  batch_size: 1024
"""


def pictures(seed: int, size: int = 96) -> Iterator[Picture]:
    """Endless scenes of a circle and a square over a graded ground."""
    rng = np.random.default_rng(seed)
    while True:
        sky, ground = rng.integers(40, 240, 3), rng.integers(40, 240, 3)
        ramp = np.linspace(0, 1, size)[:, None, None]
        noise = rng.normal(0, 6, (size, size, 3))
        scene = Image.fromarray(np.clip(sky * (1 - ramp) + ground * ramp + noise, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(scene)
        x, y = rng.integers(8, size // 2, 2)
        r = int(rng.integers(size // 5, size // 2))
        draw.ellipse((x, y, x + r, y + r), fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
        x, y = rng.integers(size // 3, size - 24, 2)
        draw.rectangle((x, y, x + 20, y + 20), fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
        yield np.asarray(scene)


def curves(points: int = 1000, total: int = 20_000) -> list[Curve]:
    """Eight curves like those of a run with two losses, a late third one, and two NaN."""
    rng = np.random.default_rng(0)
    steps = np.linspace(20, total, points).astype(int)
    share = steps / total
    sigmoid = 1.1 + 8 * np.exp(-share * 14) + 1.2 * np.exp(-share * 2) + rng.normal(0, 0.12, points)
    locca = 2.4 + 6 * np.exp(-share * 9) + rng.normal(0, 0.1, points)
    locca[[300, 301]] = math.nan
    late = share > 0.8
    silc = 5.2 - 3 * (share[late] - 0.8) / 0.2 + rng.normal(0, 0.15, int(late.sum()))
    rate = 1e-3 * np.minimum(share / 0.05, 0.5 * (1 + np.cos(np.pi * share)))
    speed = 3120 + rng.normal(0, 45, points) - 700 * late
    speed[rng.integers(0, points, 6)] = 1200
    few = list(range(2000, total + 1, 2000))

    def rising(goal: float) -> list[float]:
        return [goal * (1 - math.exp(-4 * step / total)) + float(rng.normal(0, 0.006)) for step in few]

    every = [int(step) for step in steps]
    return [
        Curve("train/sigmoid", every, sigmoid.tolist(), "nats"),
        Curve("train/locca", every, locca.tolist(), "nats"),
        Curve("train/silc", [int(step) for step in steps[late]], silc.tolist(), "nats"),
        Curve("val/zero_shot/en", few, rising(0.72)),
        Curve("val/zero_shot/mean", few, rising(0.56)),
        Curve("val/retrieval/en/text_to_image_r1", few, rising(0.44)),
        Curve("lr", every, rate.tolist()),
        Curve("images_per_s", every, speed.tolist(), "images/s"),
    ]


def heatmap(picture: Picture, text: str, language: str, seed: int) -> Heatmap:
    """A bump on a 6 x 6 patch grid."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:6, 0:6]
    y, x = rng.uniform(1, 4.5, 2)
    bump = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 2.5)
    return Heatmap(picture, text, language, 0.02 + 0.2 * bump + rng.normal(0, 0.012, (6, 6)))


def boxed(picture: Picture, text: str, language: str, seed: int) -> BoxExample:
    """A true box and a predicted one further off with every seed; the last has none that could be read."""
    x, y = np.random.default_rng(seed).uniform(0.05, 0.4, 2)
    off = 0.03 * seed
    predicted = None if seed == len(QUERIES) - 1 else (x + off, y + off / 2, x + 0.5 + off, y + 0.3 + off)
    return BoxExample(picture, text, language, predicted, (x, y, x + 0.45, y + 0.35))


def full_report() -> RunReport:
    """A full report: 12 languages, 8 curves, 8 examples of each kind."""
    draw, texts = pictures(1), 2 * [text for text, _ in QUERIES]
    scores = [0.93, 0.41, 0.087, 0.0042, 0.0003]

    def right(rank: int) -> list[bool]:
        return [place == rank for place in range(len(scores))]

    recalls = {code: {1: 0.62 * top1, 5: 0.92 * top1, 10: min(1.0, 1.2 * top1)} for code, top1 in TOP1.items()}
    return RunReport(
        title="SigLIP 2 B/16 on synthetic scenes",
        subtitle="All losses of the paper, 20,000 steps from scratch, captions in twelve languages.",
        facts={
            "Steps": "20,000", "Images seen": "20.5 M", "Parameters": "91.4 M image, 112.8 M text",
            "Resolution": "96 px, patch 16", "Batch size": "1,024", "Hardware": "8 accelerators",
            "Wall time": "1 h 52 min", "Commit": "3f9c2ab1", "Version": "0.1.0",
        },
        curves=curves(),
        retention=[
            RetentionRow("new", "", "text to image R@1", "gain", 0.12, 0.58),
            *(RetentionRow("kept", code, "top-1", "retained", top1, 0.97 * top1) for code, top1 in TOP1.items()),
        ],
        zero_shot=[
            ZeroShotRow("Scenes-100", code, 5000, 100, top1, top1 + 0.2, 0.01) for code, top1 in TOP1.items()
        ],
        retrieval=[
            RetrievalRow("Scenes captions", code, 1000, 5000, there, {k: r + 0.06 for k, r in there.items()})
            for code, there in recalls.items()
        ],
        referring=[ReferringRow("Scenes", code, 1000, 0.8 * top1, 0.7 * top1) for code, top1 in TOP1.items()],
        text_to_image=[
            RetrievalExample(query, code, [next(draw) for _ in scores], scores, right(n % 3))
            for n, (query, code) in enumerate(QUERIES)
        ],
        image_to_text=[
            ImageExample(next(draw), texts[n : n + 5], scores, right(n % 2))
            for n in range(8)
        ],
        heatmaps=[heatmap(next(draw), *query, seed) for seed, query in enumerate(QUERIES)],
        boxes=[boxed(next(draw), *query, seed) for seed, query in enumerate(QUERIES)],
        captions=[
            CaptionExample(next(draw), "" if n == 7 else texts[n + n % 3], *query) for n, query in enumerate(QUERIES)
        ],
        recipe=RECIPE,
        notes=[
            "The scenes are drawn, not photographed: numbers do not compare with those of natural images.",
            "Prompts outside English were translated by machine and not checked by a speaker.",
        ],
    )  # fmt: skip


@pytest.fixture(scope="session")
def sample_report() -> RunReport:
    """The full report, drawn once."""
    return full_report()
