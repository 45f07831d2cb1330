"""The NaFlex vision tower against those of transformers and timm: same weights, same batch of mixed aspect ratios.

First forward and backward of the whole towers, B/16 cut in depth; then the position embeddings alone, from the table to
tokens with positions: forward without gradients, and forward and backward. Ours resamples the table for all pictures in
one product of fixed shape. transformers resizes it picture by picture in a loop. timm resizes it once for each grid
that occurs, with antialias as well: that is the default of its `pos_embed_antialias`. Both read the sizes back to the
host. That all three give the same values and gradients is checked before anything is timed.

The pixels arrive as each uses them: uint8 for ours, which normalises them in the step, normalised float for the others.
The sides take turns in one process; a ratio compares times of the same round, so that the machine's noise falls on all.
On a CPU the process keeps its memory between rounds, as a GPU's allocator does. Without that (`--memory plain`) the
loop of transformers takes far longer: its backward copies the gradient of the whole batch once for each picture, so
that its cost grows with the square of the batch, and the kernel clears the pages of every copy.
Run: python benchmarks/naflex.py
"""

# B pictures, N patches, D width

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch
import transformers
from naflex_loader import picture_sizes
from step_cost import KEEP_MEMORY
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from siglip2.core.batch import Patches, collate
from siglip2.core.functional import grid_coords, resample_grid
from siglip2.core.model.sizes import Shape, size_named
from siglip2.core.model.vision import VisionTower, to_unit_range
from siglip2.core.native import native_grid, padded

sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))
from reference_weights import to_transformers

OURS, HF, TIMM = "siglip2", "transformers", "timm"
PATCH_SIZE, TABLE = 16, 16
CLOSE = 1e-4  # in float32, after the blocks; a position embedding that is not antialiased is off by more than 0.01


@dataclass(frozen=True)
class Pictures:
    """One batch as each side takes it.

    Args:
        patches: ours.
        pixels: normalised patches, float32 [B, N, P].
        coords: (y, x), int64 [B, N, 2].
        sizes: (rows, columns), int64 [B, 2].
    """

    patches: Patches
    pixels: Tensor
    coords: Tensor
    sizes: Tensor

    @property
    def valid(self) -> Tensor:
        """Which patches are no padding, bool [B, N]."""
        assert self.patches.valid is not None
        return self.patches.valid


def make_pictures(count: int, seq_len: int, device: str) -> Pictures:
    """Returns a batch of noise on grids of mixed aspect ratio, padded and joined as by the loader."""
    rows = []
    for height, width in picture_sizes(count):
        grid = native_grid(height, width, patch_size=PATCH_SIZE, max_patches=seq_len)
        noise = torch.randint(0, 256, (1, grid[0] * grid[1], PATCH_SIZE * PATCH_SIZE * 3), dtype=torch.uint8)
        sizes = torch.tensor(grid, dtype=torch.int16).reshape(1, 1, 2)
        rows.append({"image": padded(Patches(noise, grid_coords(*grid)[None], sizes=sizes), seq_len)})
    patches = collate(rows)["image"].apply(lambda t: t.to(device))
    return Pictures(patches, to_unit_range(patches.patches), patches.coords.long(), patches.sizes[:, 0].long())


def make_transformers(ours: VisionTower, shape: Shape) -> Siglip2VisionModel:
    """Returns transformers' vision model with our weights, attention through torch's fused kernel."""
    config = Siglip2VisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp_dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        num_patches=TABLE**2,
        patch_size=PATCH_SIZE,
    )
    config._attn_implementation = "sdpa"
    theirs = Siglip2VisionModel(config)
    weights = to_transformers({f"vision.{k}": v for k, v in ours.state_dict().items()}, convolution=False)
    theirs.load_state_dict({name.removeprefix("vision_model."): value for name, value in weights.items()})
    return theirs


def make_timm(ours: VisionTower, shape: Shape) -> nn.Module:
    """Returns timm's NaFlex vision transformer with our weights."""
    theirs = timm.create_model(
        "naflexvit_base_patch16_siglip", num_classes=0, depth=shape.depth, pos_embed_interp_mode="bilinear"
    )
    assert theirs.embeds.pos_embed_antialias
    assert not theirs.embeds.pos_embed_use_grid_sample
    weights = {name.replace("pool.", "attn_pool."): value for name, value in ours.state_dict().items()}
    embeds = {f"embeds.proj.{kind}": weights.pop(f"embed.{kind}") for kind in ("weight", "bias")}
    embeds["embeds.pos_embed"] = weights.pop("pos_embed")[None]
    theirs.load_state_dict({**weights, **embeds})
    return theirs


@dataclass(frozen=True)
class Side:
    """One library's way.

    Args:
        forward: computes the result.
        table: of positions.
        parameters: that `forward` uses, the table among them.
    """

    forward: Callable[[], Tensor]
    table: nn.Parameter
    parameters: tuple[nn.Parameter, ...]


def towers(depth: int, pictures: Pictures, device: str) -> dict[str, Side]:
    """Returns what computes the pooled vectors [B, D] on each side."""
    shape = replace(size_named("B/16").vision, depth=depth)
    ours = VisionTower(shape, patch_size=PATCH_SIZE, grid=(TABLE, TABLE))
    theirs, timms = make_transformers(ours, shape), make_timm(ours, shape)
    for module in (ours, theirs, timms):
        module.to(device).train()  # no side has dropout
    mask = pictures.valid.int()
    inputs = {"patches": pictures.pixels, "patch_coord": pictures.coords, "patch_valid": pictures.valid}

    def side(forward: Callable[[], Tensor], module: nn.Module, table: nn.Parameter) -> Side:
        return Side(forward, table, tuple(module.parameters()))

    return {
        OURS: side(lambda: ours(pictures.patches).pooled, ours, ours.pos_embed),
        HF: side(
            lambda: theirs(pictures.pixels, mask, pictures.sizes).pooler_output,
            theirs,
            theirs.embeddings.position_embedding.weight,
        ),
        TIMM: side(lambda: timms(inputs), timms, timms.embeds.pos_embed),
    }


def positions(pictures: Pictures, device: str) -> dict[str, Side]:
    """Returns what adds positions to tokens [B, N, D] on each side, as its model does it."""
    shape = replace(size_named("B/16").vision, depth=1)
    tower = VisionTower(shape, patch_size=PATCH_SIZE, grid=(TABLE, TABLE))
    table = nn.Parameter(tower.pos_embed.detach().to(device))
    embeds = make_timm(tower, shape).embeds.to(device)
    sizes = pictures.patches.sizes
    assert sizes is not None
    grid = sizes[..., 0], sizes[..., 1]
    tokens = torch.zeros(*pictures.coords.shape[:2], shape.width, device=device)
    room = tokens.clone()
    resize = Siglip2VisionEmbeddings.resize_positional_embeddings

    def in_place() -> Tensor:
        x = room.detach()  # the same memory, in a graph of its own
        embeds._apply_learned_naflex_pos_embed(x, pictures.coords)
        return x

    return {
        OURS: Side(lambda: tokens + resample_grid(table, pictures.patches.coords, grid=grid), table, (table,)),
        HF: Side(lambda: tokens + resize(table, pictures.sizes, tokens.shape[1]), table, (table,)),
        TIMM: Side(in_place, embeds.pos_embed, (embeds.pos_embed,)),
    }


def check(sides: Mapping[str, Side], valid: Tensor | None) -> float:
    """Returns the largest difference of the others from ours, in results and in gradients of the table.

    Each is compared in units of its own largest value.

    Args:
        sides: ours and the others.
        valid: which of the results [B, N, D] are compared; None for all.

    Raises:
        AssertionError: if one is beyond `CLOSE`.
    """
    found = {}
    for name, side in sides.items():
        out = side.forward()
        out = out if valid is None else torch.where(valid[..., None], out, 0)
        (gradient,) = torch.autograd.grad(out.square().sum(), side.table)
        found[name] = out.detach().flatten(), gradient.flatten()
    apart = [
        float((theirs - ours).abs().max() / ours.abs().max())
        for name in (HF, TIMM)
        for theirs, ours in zip(found[name], found[OURS], strict=True)
    ]
    assert max(apart) < CLOSE, f"the sides differ: {apart}"
    return max(apart)


def seconds(run: Callable[[], object], device: str) -> float:
    """Returns how long `run` takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Returns the seconds of each run in each round; every round begins with another one."""
    names, spent = list(runs), {name: [] for name in runs}
    for run in runs.values():  # memory, kernels
        run()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(seconds(runs[name], device))
    return spent


def row(label: str, spent: Mapping[str, list[float]]) -> str:
    """Returns a row of the table: how many times as long each of the others takes as ours."""
    cells = [label]
    for name in (HF, TIMM):
        ratios = [theirs / ours for theirs, ours in zip(spent[name], spent[OURS], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


def training(sides: Mapping[str, Side], precision: str, device: str) -> dict[str, Callable[[], object]]:
    """Returns forward and backward of each side, with one gradient of the result for all."""
    with torch.no_grad():
        gradient = torch.randn_like(sides[OURS].forward())

    def run(side: Side) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = side.forward()
        torch.autograd.grad(out, side.parameters, gradient.to(out.dtype))

    return {name: partial(run, side) for name, side in sides.items()}


def compare_towers(args: argparse.Namespace) -> None:
    """Prints a row for forward and backward of the whole towers, in each precision."""
    pictures = make_pictures(args.batch, args.seq_len, args.device)
    sides = towers(args.depth, pictures, args.device)
    apart = check(sides, None)
    for precision in args.precision:
        label = (
            f"towers, {args.depth} blocks, {args.batch} pictures of {args.seq_len} patches, {precision}, "
            f"forward + backward ({apart:.0e} apart)"
        )
        spent = take_turns(training(sides, precision, args.device), args.rounds, args.device)
        print(row(label, spent), flush=True)


def compare_positions(args: argparse.Namespace) -> None:
    """Prints two rows for each sequence length: forward alone, forward and backward."""
    for seq_len in args.pos_seq_lens:
        pictures = make_pictures(args.pos_batch, seq_len, args.device)
        sides = positions(pictures, args.device)
        apart = check(sides, pictures.valid)
        grids = len(set(map(tuple, pictures.sizes.tolist())))
        label = f"positions, {args.pos_batch} pictures of {seq_len} patches, {grids} grids ({apart:.0e} apart)"
        with torch.no_grad():
            spent = take_turns({k: side.forward for k, side in sides.items()}, args.rounds, args.device)
        print(row(f"{label}, forward", spent), flush=True)
        spent = take_turns(training(sides, "fp32", args.device), args.pos_rounds, args.device)
        print(row(f"{label}, forward + backward", spent), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", nargs="*", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pos-batch", type=int, default=64, help="pictures, for the position embeddings alone")
    parser.add_argument("--pos-seq-lens", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--pos-rounds", type=int, default=3, help="of forward and backward of the position embeddings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--memory", choices=["kept", "plain"], default="kept", help="of a CPU: kept between rounds, or given back"
    )
    args = parser.parse_args()
    keep = args.device == "cpu" and args.memory == "kept"
    if keep and not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.manual_seed(0)
    print(
        f"B/16, {args.device}, {torch.get_num_threads()} threads, memory {args.memory}, torch {torch.__version__}: "
        f"time of theirs / ours,\nmedian of {args.rounds} paired rounds ({args.pos_rounds} where positions alone go "
        f"backward too), smallest to largest\n\n"
        f"| | transformers {transformers.__version__} | timm {timm.__version__} |\n|---|---|---|",
        flush=True,
    )
    compare_towers(args)
    compare_positions(args)


if __name__ == "__main__":
    main()
