"""`naflex` and `navit` loaders against timm's, on the same JPEGs of mixed aspect ratio: padding, pictures per second.

Half of the pictures have the aspect ratio of a camera or a screen, upright or not, half a log-normal one. Every loader
passes over all of them, in batches of as many tokens, in one process without workers and on one thread. Both sides end
with patches, coordinates and mask: ours uint8, timm's grey levels as float32; neither makes text. timm's plain resize
cuts the same grids as `naflex`, so that its padding has to be the same to the token, which is checked; its training
transform crops and flips, with colour jitter left off.

`navit` packs: once pictures of the size that the other loaders make with 256 patches, four to a row of 1024, which is
the same resize on both sides; and once as it comes, with sizes drawn from 64 to 256 px, where timm's plain resize to
256 patches makes larger pictures. Padding is given as packed, and as it would be if each were padded to 256.
open_clip 3.3.0 has no loader for pictures of their own aspect ratio. Run: python benchmarks/naflex_loader.py
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.naflex_dataset import NaFlexMapDatasetWrapper
from webdataset import TarWriter

from siglip2.core.batch import Batch, Patches
from siglip2.core.data.loader import Maker, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.core.layout import Patchifier
from siglip2.core.views import IMAGE
from siglip2.plugins.naflex import LENGTHS, NaFlex
from siglip2.plugins.navit import NaViT
from siglip2.testing import tiny_tokenizer

RATIOS = (4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 1.0)  # width / height
SPREAD = 0.4  # sigma of the logarithm of the others' aspect ratio
AREA = 640 * 480
DIVISOR = 8  # of batch sizes, the default of both
PLAIN, CROPPED = "plain resize", "random crop"  # timm's transforms


def picture_sizes(count: int) -> list[tuple[int, int]]:
    """Returns (height, width) of `count` pictures of about 640 x 480 pixels in area, the same at every call."""
    drawn = np.exp(np.random.default_rng(0).normal(0, SPREAD, count))
    ratios = [drawn[number] if number % 2 else RATIOS[number // 2 % len(RATIOS)] for number in range(count)]
    return [(round((AREA / ratio) ** 0.5), round((AREA * ratio) ** 0.5)) for ratio in ratios]


def write_pictures(folder: Path, count: int) -> None:
    """Writes photo-like JPEGs (smooth shapes and noise) into a tar shard, and the same files one by one."""
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    (folder / "files").mkdir()
    with open(folder / "shards" / "00000.tar", "wb") as shard, TarWriter(shard) as tar:
        for number, (height, width) in enumerate(picture_sizes(count)):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (width, height), Image.BICUBIC
            )
            noisy = np.clip(np.asarray(coarse, dtype=np.int16) + rng.normal(0, 8, (height, width, 3)), 0, 255)
            stored = io.BytesIO()
            Image.fromarray(noisy.astype(np.uint8)).save(stored, "JPEG", quality=88)
            tar.write({"__key__": f"{number:06d}", "jpg": stored.getvalue()})
            (folder / "files" / f"{number:06d}.jpg").write_bytes(stored.getvalue())


@dataclass
class Tally:
    """Tokens of the batches of one pass over the pictures: all of them, and those that are no padding."""

    room: int = 0
    used: int = 0
    pictures: int = 0

    def add(self, mask: torch.Tensor, pictures: int) -> None:
        """Counts a batch of `pictures`, from its mask: bool, true where no padding is."""
        self.room, self.used = self.room + mask.numel(), self.used + int(mask.sum())
        self.pictures += pictures

    @property
    def padding(self) -> float:
        """Share of the tokens that are padding."""
        return 1 - self.used / self.room


@dataclass
class Ours:
    """Our training batches, one pass after another."""

    folder: Path
    patchifier: Patchifier
    batches: TrainBatches = field(init=False)
    index: int = 0

    def __post_init__(self) -> None:
        source = open_source(str(self.folder / "shards"))
        maker = Maker(source, self.patchifier, tiny_tokenizer(), seed=0)
        order = Order(source.shard_sizes(), seed=0)
        self.batches = TrainBatches(maker, order, [(0.0, (IMAGE,))], max_batches=10**9)
        size, count = self.patchifier.layout(0).batch_size, len(source)
        if count % size:
            raise ValueError(f"{count} pictures are no whole number of batches of {size}: change --images or --tokens")
        self.passes = count // size

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.passes):
            yield self.batches[self.index]
            self.index += 1

    def tally(self) -> Tally:
        found = Tally()
        for batch in self:
            patches: Patches = batch.views["image"]
            mask = patches.valid if patches.packing is None else patches.packing.owner >= 0
            assert mask is not None
            found.add(mask, len(set(batch.keys)))
        return found

    def lengths(self) -> list[int]:
        """Returns how many patches each picture of the next batch has before it is packed."""
        batches, layout = self.batches, self.patchifier.layout(self.index)
        first = self.index * layout.batch_size
        _, samples = batches.order.many(first, layout.batch_size)
        make = partial(batches.maker.row, views=(IMAGE,), layout=layout)
        rows = [make(int(sample), position=first + i) for i, sample in enumerate(samples)]
        return [row.views["image"].patches.shape[1] for row in rows]


@dataclass
class Theirs:
    """timm's NaFlex batches of one sequence length, one epoch after another."""

    folder: Path
    seq_len: int
    tokens: int
    transform: str
    batches: NaFlexMapDatasetWrapper = field(init=False)
    epoch: int = 0

    def __post_init__(self) -> None:
        # as create_naflex_loader makes it, which adds a DataLoader, and a prefetcher that normalises on the device
        transform = partial(
            create_transform,
            is_training=self.transform == CROPPED,
            color_jitter=None,
            interpolation="bilinear",
            use_prefetcher=True,
            naflex=True,
        )
        with redirect_stdout(io.StringIO()):  # it says how many batches there are
            self.batches = NaFlexMapDatasetWrapper(
                ImageDataset(str(self.folder / "files")),
                patch_size=16,
                seq_lens=(self.seq_len,),
                max_tokens_per_batch=self.tokens,
                transform_factory=transform,
                batch_divisor=DIVISOR,
            )

    def __iter__(self) -> Iterator[Any]:
        self.batches.set_epoch(self.epoch)
        self.epoch += 1
        yield from self.batches

    def tally(self) -> Tally:
        found = Tally()
        for patches, targets in self:
            found.add(patches["patch_valid"], len(targets))
        return found


def seconds(batches: Callable[[], Iterator[Any]]) -> float:
    """Returns the CPU time of this process for one pass."""
    start = time.process_time()
    for _ in batches():
        pass
    return time.process_time() - start


def compare(ours: Ours, peers: dict[str, Theirs], rounds: int) -> str:
    """Returns how many times as many pictures per CPU second ours makes as each of the peers, as columns of a table."""
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds):
        first = seconds(ours.__iter__) if number % 2 else None
        spent = {name: seconds(peer.__iter__) for name, peer in peers.items()}
        own = first or seconds(ours.__iter__)
        for name, time_of_peer in spent.items():
            ratios[name].append(time_of_peer / own)
    return " | ".join(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values())


def compare_naflex(folder: Path, args: argparse.Namespace) -> None:
    """Prints a row for each sequence length: padding of the three loaders, and our speed over that of timm's two."""
    print(
        "| patches per picture | batch | padding, naflex | timm, plain resize | timm, random crop "
        "| naflex / timm, plain resize | naflex / timm, random crop |\n|---|---|---|---|---|---|---|"
    )
    for seq_len in args.seq_lens:
        patchifier = NaFlex(seq_lens=[seq_len], tokens=args.tokens, divisor=DIVISOR).patchifier()
        ours = Ours(folder, patchifier)
        peers = {name: Theirs(folder, seq_len, args.tokens, name) for name in (PLAIN, CROPPED)}
        own, plain, cropped = (side.tally() for side in (ours, *peers.values()))  # warms up, too
        assert own == plain, f"naflex and timm's plain resize differ in tokens: {own}, {plain}"
        assert own.pictures == cropped.pictures == args.images
        size = patchifier.layout(0).batch_size
        print(
            f"| {seq_len} | {size} | {own.padding:.1%} | {plain.padding:.1%} | {cropped.padding:.1%} "
            f"| {compare(ours, peers, args.rounds)} |",
            flush=True,
        )


def compare_navit(folder: Path, args: argparse.Namespace) -> None:
    """Prints a row for each way of packing: padding with and without it, patches lost, and the speed over timm's."""
    whole = {"min_side": 256, "max_side": 256, "max_tokens": 256, "images_per_row": 4, "seq_len": 1024}
    print(
        "\n| navit | rows | padding, packed | each padded to 256 | patches lost | navit / timm, plain resize to 256 |"
        "\n|---|---|---|---|---|---|"
    )
    for label, options in {"256 patches, 4 to a row of 1024": whole, "64 to 256 px, rows of 256": {}}.items():
        ours = Ours(folder, NaViT(batch_size=args.images, **options).patchifier())
        before = ours.lengths()
        tally = ours.tally()
        assert tally.pictures == len(before) == args.images
        peer = Theirs(folder, 256, args.tokens, PLAIN)
        peer.tally()  # warm up
        row = ours.patchifier.layout(0).seq_len
        print(
            f"| {label} | {tally.room // row} | {tally.padding:.1%} | {1 - sum(before) / (256 * len(before)):.1%} "
            f"| {1 - tally.used / sum(before):.1%} | {compare(ours, {PLAIN: peer}, args.rounds)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="a multiple of every batch size")
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{args.images} JPEGs, {args.tokens} tokens per batch, timm {timm.__version__}, torch {torch.__version__}, one "
        f"thread; pictures per CPU second, median of {args.rounds} pairs (smallest to largest)\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, args.images)
        compare_naflex(folder, args)
        compare_navit(folder, args)


if __name__ == "__main__":
    main()
