"""Loader against open_clip's: the same tar shards, one core, batches of decoded images and token ids.

The shards hold JPEG pictures of about 640 x 480 and captions. open_clip's pipeline has the stages of its own training
script, its own image transform, and the same tokenizer; ours is the recipe's training loader. Both run in this
process, without workers, on one thread, turn by turn.
Run: python benchmarks/loader.py
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from PIL import Image

from siglip2.core.data.datamodule import SigLIP2Data
from siglip2.core.data.settings import TextOptions, TrainSet
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.sigmoid import Sigmoid

WORDS = ("a photo of the red blue green small large old new dog cat house tree car street river boat hill").split(" ")  # noqa: SIM905


def write_shards(folder: Path, count: int) -> list[str]:
    """Writes photo-like JPEGs (smooth shapes and noise, 640 x 480 give or take) with captions; returns the captions."""
    rng = np.random.default_rng(0)
    captions = []
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=count // 2, verbose=0) as writer:
        for number in range(count):
            width, height = int(rng.integers(560, 720)), int(rng.integers(420, 540))
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (width, height), Image.BICUBIC
            )
            noisy = np.clip(np.asarray(coarse, dtype=np.int16) + rng.normal(0, 8, (height, width, 3)), 0, 255)
            stored = io.BytesIO()
            Image.fromarray(noisy.astype(np.uint8)).save(stored, "JPEG", quality=88)
            captions.append(" ".join(rng.choice(WORDS, 12)))
            writer.write({"__key__": f"{number:06d}", "jpg": stored.getvalue(), "txt": captions[-1]})
    return captions


def their_batches(folder: Path, batch: int, tokenizer: Tokenizer, train: bool) -> Iterator[Any]:
    """Yields batches from the stages of open_clip_train.data.get_wds_dataset, in its order.

    Its own function for grouping files into samples does not run with webdataset 1.0 (it expects a file name in the
    markers between shards), so webdataset's stands in its place.
    """
    transform = open_clip.transform.image_transform(
        256, is_train=train, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="squash"
    )
    pipeline = wds.DataPipeline(
        wds.ResampledShards(str(folder / "{00000..00001}.tar"), deterministic=True),
        wds.tarfile_to_samples(),
        wds.shuffle(256),
        wds.select(lambda sample: "txt" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer.encode([text])[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    yield from wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=0)


def our_batches(folder: Path, tokenizer_file: Path, batch: int) -> Iterator[Any]:
    """Yields batches as `siglip2 fit` gets them."""
    plugins = [Fixed(image_size=256, patch_size=16, batch_size=batch), Sigmoid()]
    data = SigLIP2Data(plugins, str(tokenizer_file), TextOptions(), TrainSet(str(folder)))
    batches = data.train_batches(max_batches=10**9)
    for index in range(10**9):
        yield batches[index]


def rate(batches: Iterator[Any], rounds: int, batch: int) -> float:
    """Returns images per CPU second of this process over `rounds` batches."""
    start = time.process_time()
    for _ in range(rounds):
        next(batches)
    return rounds * batch / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = write_shards(folder, args.images)
        file = train_tokenizer(captions, vocab_size=400, out=folder / "tokenizer.json")
        tokenizer = Tokenizer.load(file)
        ours = our_batches(folder, file, args.batch)
        peers = {
            "its training transform (random crop)": their_batches(folder, args.batch, tokenizer, True),
            "its plain resize": their_batches(folder, args.batch, tokenizer, False),
        }
        for label, theirs in peers.items():
            rate(ours, 1, args.batch), rate(theirs, 1, args.batch)
            ratios = [rate(ours, 2, args.batch) / rate(theirs, 2, args.batch) for _ in range(args.rounds)]
            print(
                f"images per core second, ours / open_clip {open_clip.__version__} with {label}: "
                f"{statistics.median(ratios):.2f} "
                f"(median of {args.rounds} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
