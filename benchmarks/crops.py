"""One global and eight local crops per picture against torchvision's transforms, one thread, turn by turn.

torchvision's v2 transforms run on the same decoded uint8 tensors, crop by crop, as its own recipes compose them. Both
end with the same uint8 patches. Decoding is left out. Run: python benchmarks/crops.py
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from siglip2.core.crops import GLOBAL, LOCAL, CropView
from siglip2.core.data.fields import Sample
from siglip2.core.functional import patchify
from siglip2.core.views import Context
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.testing.tiny import tiny_tokenizer

PATCH_SIZE = 16
SIDES = {64: 32, 256: 96}  # pixels of the picture and the global crop -> pixels of a local crop


def pictures(side: int, count: int) -> list[Sample]:
    """Returns decoded pictures of smooth shapes and noise."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse, dtype=np.int16) + rng.normal(0, 8, (side, side, 3)), 0, 255)
        stored = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(stored, "PNG")
        samples.append(Sample(str(number), "memory", {"png": stored.getvalue()}))
        samples[-1].image()  # decoded once and kept
    return samples


def their_transform(view: CropView, size: int) -> Callable[[Tensor], Tensor]:
    """Returns torchvision's transforms with the options of a view, for one crop."""
    colours = view.photometric
    jitter = v2.ColorJitter(colours.brightness, colours.contrast, colours.saturation, colours.hue)
    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=view.scale, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([jitter], colours.jitter),
            v2.RandomGrayscale(colours.grey),
            v2.RandomApply([v2.GaussianBlur(13, colours.sigma)], colours.blur),  # 13 taps: three sigmas of 2 pixels
        ]
    )
    return transform


def seconds(make: Callable[[int], object], count: int) -> float:
    """Returns the CPU time of this process for the views of `count` pictures."""
    start = time.process_time()
    for number in range(count):
        make(number)
    return time.process_time() - start


def compare(side: int, count: int, rounds: int) -> None:
    """Prints images per second of both and their ratio, for square pictures of `side` pixels."""
    samples, views = pictures(side, count), (GLOBAL, replace(LOCAL, size=SIDES[side]))
    patchifier = FixedPatchifier(side, PATCH_SIZE, count, "bilinear", antialias=True)
    layout, tokenizer = patchifier.layout(0), tiny_tokenizer()
    transforms = [(view.copies, their_transform(view, view.size or side)) for view in views]

    def ours(number: int) -> None:
        for i, view in enumerate(views):
            view(samples[number], Context((0, number, i), patchifier, layout, tokenizer))

    def theirs(number: int) -> None:
        image = samples[number].image()
        for copies, transform in transforms:
            patchify(torch.stack([transform(image) for _ in range(copies)]), PATCH_SIZE)

    seconds(ours, count), seconds(theirs, count)  # warm up
    pairs = [(seconds(ours, count), seconds(theirs, count)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    mine, other = (1000 * statistics.median(column) / count for column in zip(*pairs, strict=True))
    print(
        f"{side} px, 1 global crop of {side} and 8 local of {SIDES[side]}: {mine:.2f} ms of CPU time per picture "
        f"({1000 / mine:.0f} pictures/s), torchvision {torchvision.__version__} {other:.2f} ms "
        f"({1000 / other:.0f} pictures/s), {statistics.median(ratios):.2f} times as fast "
        f"(median of {rounds} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for side in SIDES:
        compare(side, args.images, args.rounds)


if __name__ == "__main__":
    main()
