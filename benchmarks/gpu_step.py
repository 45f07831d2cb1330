"""A whole training step on one GPU: images per second, share of the peak and memory, beside open_clip's SigLIP step.

Ours with all losses (as from 80 % of a run: teacher, eight crops, masked view) and with the sigmoid loss alone, and
open_clip's, each as it is and compiled; same size, batch and precision, the published AdamW (fused on both sides). The
sides take turns, so that the machine's noise falls on all. Operations are counted once, without compiling
(torch.utils.flop_counter; a multiplication and an addition are two, those of the recomputation of attention included);
the share is operations / time / peak. Memory is the peak of a step with the side's own weights and moments.
It was written for one H200 and runs on any device; on a CPU memory is not measured.
Run: python benchmarks/gpu_step.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import open_clip
import step_cost
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import SIZES, our_step, their_step

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify
from siglip2.core.optim import KERNELS_ONLY, param_groups, published_adamw
from siglip2.core.parallel import compile_blocks

TERA, MEBI = 10**12, 2**20
ALL, SIGMOID, THEIRS = "siglip2-all", "siglip2-sigmoid", "open_clip-sigmoid"


@dataclass
class Side:
    """What one side needs for a step.

    Args:
        step: takes one.
        own: bytes that it holds between steps.
        operations: of one step.
        peak: bytes that it holds at most in a step.
        seconds: of each round.
    """

    step: Callable[[], object]
    own: int = 0
    operations: int = 0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)


def all_losses(args: argparse.Namespace, compiled: bool) -> Callable[[], object]:
    """Returns a step with every loss of the recipe awake: losses, gradients, AdamW, moving average."""
    module = step_cost.build(args)
    module.wake_due(step_cost.PROGRESS)
    if compiled:
        compile_blocks(module, "inductor")
    batch = module.fake_batch(step_cost.PROGRESS, batch_size=args.batch).to(module.device)
    optimizer = published_adamw(param_groups(module, [KERNELS_ONLY]))

    def step() -> None:
        with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            total = torch.stack(list(module(batch, step_cost.PROGRESS).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        module.awake_hook("after_step", step_cost.PROGRESS)(model=module.model, progress=step_cost.PROGRESS)

    return step


def makers(args: argparse.Namespace) -> dict[str, Callable[[bool], Callable[[], object]]]:
    """Returns what makes the step of each side, compiled or not."""
    name, resolution = SIZES[args.size]
    patch_size, device = int(args.size.split("/")[1]), torch.device(args.device)
    pixels = torch.randint(0, 256, (args.batch, 3, resolution, resolution), dtype=torch.uint8, device=device)
    ids = torch.randint(0, args.vocab, (args.batch, 64), device=device)
    side = resolution // patch_size
    patches = Patches(patchify(pixels, patch_size), grid_coords(side, side)[None].to(device), None, (side, side))
    floats = pixels.float() / 127.5 - 1
    return {
        ALL: lambda compiled: all_losses(args, compiled),
        SIGMOID: lambda compiled: our_step(args.size, patches, ids, args.precision, 256000, compiled),
        THEIRS: lambda compiled: their_step(name, floats, ids, args.precision, True, compiled),
    }


def build(make: Callable[[bool], Callable[[], object]], compiled: bool, device: torch.device) -> Side:
    """Returns a side after its first step, which makes its moments and, if compiled, its kernels."""
    before = held(device)
    side = Side(make(compiled))
    side.step()
    side.own = held(device) - before
    return side


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def count(step: Callable[[], object]) -> int:
    """Returns the operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(side: Side, device: torch.device) -> None:
    """Takes one step, and notes its time and its peak of memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, start = held(device), time.perf_counter()
    side.step()
    if cuda:
        torch.cuda.synchronize()
        side.peak = max(side.peak, torch.cuda.max_memory_allocated() - before + side.own)
    side.seconds.append(time.perf_counter() - start)


def table(sides: Mapping[str, Side], args: argparse.Namespace) -> str:
    """Returns a row for every side; ratios are medians over rounds, open_clip's time over this side's."""
    lines = [
        "| step | images/s | TFLOP per image | share of the peak | peak MiB | time of open_clip / its |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        seconds = statistics.median(side.seconds)
        share = side.operations / seconds / (args.tflops * TERA)
        theirs = sides[THEIRS].seconds if THEIRS in sides else []
        ratio = f"{statistics.median(a / b for a, b in zip(theirs, side.seconds, strict=True)):.2f}" if theirs else "-"
        memory = f"{side.peak / MEBI:.0f}" if side.peak else "-"
        cells = [name, f"{args.batch / seconds:.4g}", f"{side.operations / args.batch / TERA:.3f}", f"{share:.1%}"]
        lines.append(f"| {' | '.join([*cells, memory, ratio])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="B/16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak in that precision; 989 is an H200 in bf16")
    parser.add_argument("--only", nargs="+", choices=[ALL, SIGMOID, THEIRS], default=[ALL, SIGMOID, THEIRS])
    parser.add_argument("--no-compile", action="store_true", help="Leave the compiled sides out.")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prototypes", type=int, default=32768)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.image_size, args.unfused, device = SIZES[args.size][1], False, torch.device(args.device)
    torch.manual_seed(0)
    sides: dict[str, Side] = {}
    for name, make in makers(args).items():
        if name not in args.only:
            continue
        for compiled in (False,) if args.no_compile else (False, True):
            sides[name + ", compiled" * compiled] = build(make, compiled, device)
        operations = count(sides[name].step)
        for key in (name, f"{name}, compiled"):
            if key in sides:
                sides[key].operations = operations
    for number in range(args.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            measure(sides[name], device)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(
        f"{args.size} at {args.image_size} px, batch {args.batch}, {args.precision}, {args.prototypes} prototypes, "
        f"{kind}, torch {torch.__version__}, open_clip {open_clip.__version__}; medians of {args.rounds} rounds\n\n"
        f"{table(sides, args)}"
    )


if __name__ == "__main__":
    main()
