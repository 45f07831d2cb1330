"""Made-up pictures, captions and shards, for the tests of inspections."""

import io
import random

import numpy as np
from PIL import Image
from webdataset import TarWriter


def drawing(seed, size=(160, 120)):
    """A picture with the spectrum of photographs, amplitudes falling with frequency; different for every seed."""
    rng, (width, height) = np.random.default_rng(seed), size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None, :] * width)
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1) ** 1.5
    pixels = np.fft.ifft2(waves).real
    pixels = 128 + 50 * (pixels - pixels.mean((1, 2), keepdims=True)) / pixels.std((1, 2), keepdims=True)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(picture, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sentence(rng, length, vocabulary=3000):
    """Words drawn independently."""
    return " ".join(
        f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}{rng.randrange(vocabulary):x}" for _ in range(length)
    )


def write_shard(path, samples):
    """A shard of (key, files by extension)."""
    with open(path, "wb") as file, TarWriter(file) as tar:
        for key, files in samples:
            tar.write({"__key__": key, **files})
    return path


def seeded(seed):
    return random.Random(seed)
