"""Memory and time of drawing the rows of a super-batch jointly, and the share that this has of a training step.

Learner and reference give unit-norm embeddings of M images and texts. Memory is counted twice: as torch allocates it
(tensors that are alive beyond the embeddings) and as the process holds it (its largest resident size beyond that before
the draw). A step scores M rows with learner and reference and trains on those that are kept: whole steps are taken on a
few rows, in turns with plain ones, and for the full M the towers' times are multiplied. One process, one run:
python benchmarks/acid_select.py
"""

import argparse
import ctypes
import gc
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sigmoid_memory import Allocated
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords
from siglip2.core.model.two_towers import TwoTowers, build_two_towers
from siglip2.core.pairs import pair_loss
from siglip2.core.selection import Draw, Embedded, draw_jointly, gumbel_noise

MIB = 2**20


def embedded(rows: int, width: int, *, scale: float, bias: float, like: Embedded | None = None) -> Embedded:
    """Unit-norm embeddings in which a text resembles its image; those of a reference resemble `like`."""
    base = torch.randn(rows, width) if like is None else 0.5 * torch.randn(rows, width) + like.image_mD * width**0.5
    image = F.normalize(base, dim=1)
    text = F.normalize(base + 2 * torch.randn(rows, width), dim=1)
    return Embedded(image, text, torch.tensor([math.log(scale)]), torch.tensor([bias]))


def resident(field: str) -> int:
    """Bytes that the process holds: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(rows: int, args: argparse.Namespace) -> tuple[str, float]:
    """A line of the table, and the seconds of the draw."""
    learner = embedded(rows, args.width, scale=20.0, bias=-12.0)
    reference = embedded(rows, args.width, scale=40.0, bias=-14.0, like=learner)
    kept = round(rows * (1 - args.filter_ratio))
    draw = Draw(args.groups, args.chunks, kept // (args.chunks * args.groups))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what is free inside of the process would count as held before
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    with Allocated() as mode, torch.no_grad():
        noise = gumbel_noise(0, 0, chunks=args.chunks, rows=rows)
        drawn = draw_jointly([(1.0, learner), (-1.0, reference)], noise, draw)
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    assert len(set(drawn.rows_b.tolist())) == kept
    held = 2 * sum(t.numel() * t.element_size() for t in (learner.image_mD, learner.text_mD))
    products = 2 * 2 * 2 * rows * (kept - kept // args.chunks) * args.width  # two models, both directions
    return (
        f"| {rows} | {kept} | {held / MIB:.0f} | {mode.peak / MIB:.0f} | {peak / MIB:.0f} | "
        f"{(held + max(peak, mode.peak)) / MIB:.0f} | {seconds:.1f} | {products / seconds / 1e9:.0f} |"
    ), seconds


def inputs(rows: int, patch_size: int) -> tuple[Patches, Tensor]:
    """Random pictures of 256 pixels and texts of 64 tokens."""
    side = 256 // patch_size
    pixels = torch.randint(0, 256, (rows, side * side, patch_size**2 * 3), dtype=torch.uint8)
    return Patches(pixels, grid_coords(side, side)[None], None, (side, side)), torch.randint(0, 32000, (rows, 64))


def scored(towers: TwoTowers, images: Patches, ids: Tensor) -> float:
    """Seconds of the forward passes of a few rows."""
    began = time.perf_counter()
    with torch.no_grad():
        towers.encode_image(images)
        towers.encode_text(ids)
    return time.perf_counter() - began


def trained(towers: TwoTowers, images: Patches, ids: Tensor) -> float:
    """Seconds of forward and backward passes of a few rows."""
    began = time.perf_counter()
    image, text = towers.encode_image(images).embedding, towers.encode_text(ids).embedding
    pair_loss(image, text, scale=towers.logit_scale, bias=towers.logit_bias).backward()
    return time.perf_counter() - began


def seconds_per_row(args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds in which learner and reference score a row, and in which the learner is trained on one: medians."""
    patch_size, rows = int(args.size.partition("/")[2]), args.step_rows
    shape = {"grid": (256 // patch_size,) * 2, "vocab_size": 32000, "context_length": 64}
    learner = build_two_towers(args.size, patch_size=patch_size, **shape)
    patch = int(args.reference_size.partition("/")[2])
    reference = build_two_towers(args.reference_size, patch_size=patch, **{**shape, "grid": (256 // patch,) * 2})
    mine, theirs = inputs(rows, patch_size), inputs(rows, patch)
    rounds = [
        (scored(learner, *mine), scored(reference, *theirs), trained(learner, *mine)) for _ in range(args.rounds + 1)
    ]
    score, other, train = (statistics.median(times) / rows for times in zip(*rounds[1:], strict=True))
    return score, other, train


def paired_steps(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of a curated step over those of a plain one, with cached embeddings and with the reference, by round.

    A plain step trains on as many rows as `filter_ratio` leaves; a curated one scores all of them, draws as many and
    trains on those.
    """
    patch_size, rows = int(args.size.partition("/")[2]), args.paired_rows
    shape = {"patch_size": patch_size, "grid": (256 // patch_size,) * 2, "vocab_size": 32000, "context_length": 64}
    learner, reference = (build_two_towers(args.size, **shape) for _ in range(2))
    images, ids = inputs(rows, patch_size)
    kept = round(rows * (1 - args.filter_ratio))
    cached, first, ratios = whole(reference, images, ids), torch.arange(kept), []
    for turn in range(args.rounds + 1):
        plain = trained(learner, images.images(first), ids[first])
        asked = []
        for other in (lambda: cached, lambda: whole(reference, images, ids)):
            began = time.perf_counter()
            with torch.no_grad():
                terms = [(1.0, whole(learner, images, ids)), (-1.0, other())]
                drawn = draw_jointly(terms, gumbel_noise(0, turn, chunks=1, rows=rows), Draw(1, 1, kept)).rows_b
            trained(learner, images.images(drawn), ids[drawn])
            asked.append((time.perf_counter() - began) / plain)
        ratios.append((asked[0], asked[1]))
    return ratios[1:]


@torch.no_grad()
def whole(towers: TwoTowers, images: Patches, ids: Tensor) -> Embedded:
    """What towers make of all rows."""
    image, text = towers.encode_image(images).embedding, towers.encode_text(ids).embedding
    return Embedded(image, text, towers.logit_scale, towers.logit_bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 65536], help="M, of each super-batch")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--filter-ratio", type=float, default=0.5)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--size", default="B/16", help="of the learner in the step")
    parser.add_argument("--reference-size", default="B/16", help="of the reference in the step")
    parser.add_argument("--step-rows", type=int, default=4, help="rows that the towers are timed on; 0 leaves it out")
    parser.add_argument("--paired-rows", type=int, default=4, help="M of the whole steps; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| M | kept | embeddings, MiB | draw: torch, MiB | process, MiB | in all, MiB | seconds | GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in args.rows:
        line, seconds = measured(rows, args)
        print(line, flush=True)
    if args.paired_rows:
        print(f"\nWhole steps of {args.size} on M = {args.paired_rows}, times of a plain one on what is kept:\n")
        for name, found in zip(
            ("cached embeddings", "with the reference"), zip(*paired_steps(args), strict=True), strict=True
        ):
            print(f"- {name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})", flush=True)
    if not args.step_rows:
        return
    rows = args.rows[-1]
    kept = rows * (1 - args.filter_ratio)
    score, other, train = seconds_per_row(args)
    parts = {
        "draw": seconds,
        f"learner {args.size} scores": rows * score,
        f"reference {args.reference_size} scores": rows * other,
        "training on what is kept": kept * train,
    }
    print(f"\nA step on M = {rows}, towers in float32, times of {args.step_rows} rows multiplied:\n")
    for name, part in parts.items():
        print(f"- {name}: {part:.0f} s, {part / sum(parts.values()):.2%}")
    cached = sum(part for name, part in parts.items() if not name.startswith("reference"))
    print(
        f"- times a step that trains on {kept:.0f} rows: {sum(parts.values()) / (kept * train):.2f}, "
        f"without running the reference {cached / (kept * train):.2f}"
    )


if __name__ == "__main__":
    main()
