"""Training step against open_clip: same shapes, same precision, same batch, one process, steps taken in turn.

Both models see the same images and token ids, compute the sigmoid loss, clip nothing, and step AdamW with the weight
decay that their trainers use. Every round takes one step of each; the ratio of a round is ours / theirs, so that noise
of the machine falls on both. Run: python benchmarks/train_step.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify, sigmoid_loss
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.optim import KERNELS_ONLY, param_groups, published_adamw
from siglip2.core.parallel import compile_blocks

SIZES = {"B/32": ("ViT-B-32-SigLIP2-256", 256), "B/16": ("ViT-B-16-SigLIP2-256", 256)}


def their_step(
    name: str, pixels: Tensor, ids: Tensor, precision: str, fused: bool, compiled: bool = False
) -> Callable[[], float]:
    """Returns one training step as open_clip_train does it: autocast, SigLipLoss, AdamW in two groups.

    Args:
        fused: give its AdamW torch's fused kernel, as ours has; open_clip_train leaves it off.
        compiled: as its `--torchcompile`.
    """
    model: Any = open_clip.create_model(name, pretrained=None, device=pixels.device)
    small = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "logit_scale" in n]
    ids_of_small = {id(p) for p in small}
    rest = [p for p in model.parameters() if id(p) not in ids_of_small]
    groups = [{"params": small, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=fused or None)
    loss = SigLipLoss()
    if compiled:
        model = torch.compile(model)

    def step() -> float:
        # open_clip's loader normalises to float in the workers, so the pixels arrive as they are used
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = model(pixels, ids)
            total = loss(*out) if not isinstance(out, dict) else loss(**out)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return float(total.detach())

    return step


def our_step(
    size: str, patches: Patches, ids: Tensor, precision: str, vocab_size: int, compiled: bool = False
) -> Callable[[], float]:
    """Returns one training step of ours: autocast, sigmoid loss, the published AdamW."""
    side = patches.grid[0] if patches.grid else 0
    patch_size = int(size.split("/")[1])
    towers = build_two_towers(size, patch_size=patch_size, grid=(side, side), vocab_size=vocab_size, context_length=64)
    towers.to(ids.device)
    if compiled:
        compile_blocks(towers, "inductor")
    optimizer = published_adamw(param_groups(towers, [KERNELS_ONLY]))

    def step() -> float:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            image, text = towers.encode_image(patches).embedding, towers.encode_text(ids).embedding
            total = sigmoid_loss(image, text, scale=towers.logit_scale, bias=towers.logit_bias)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return float(total.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="B/32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--their-fused", action="store_true", help="Give open_clip's AdamW the fused kernel too.")
    args = parser.parse_args()
    torch.manual_seed(0)
    name, resolution = SIZES[args.size]
    patch_size = int(args.size.split("/")[1])
    pixels = torch.randint(0, 256, (args.batch, 3, resolution, resolution), dtype=torch.uint8)
    ids = torch.randint(0, 256000, (args.batch, 64))
    side = resolution // patch_size
    patches = Patches(patchify(pixels, patch_size), grid_coords(side, side)[None], None, (side, side))
    theirs = their_step(name, pixels.float() / 127.5 - 1, ids, args.precision, args.their_fused)
    ours = our_step(args.size, patches, ids, args.precision, 256000)
    theirs(), ours()  # warm up: memory, optimizer state
    ratios, seconds = [], ([], [])
    for number in range(args.rounds):
        pair = ((0, ours), (1, theirs)) if number % 2 else ((1, theirs), (0, ours))
        for who, step in pair:
            start = time.perf_counter()
            step()
            seconds[who].append(time.perf_counter() - start)
        ratios.append(seconds[0][-1] / seconds[1][-1])
        print(f"round {number}: ours / open_clip = {ratios[-1]:.3f}", flush=True)
    print(
        f"{args.size}, batch {args.batch}, {args.precision}{', both fused AdamW' * args.their_fused}, "
        f"{torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: "
        f"ours / open_clip {open_clip.__version__} = {statistics.median(ratios):.3f} "
        f"(median of {args.rounds} paired steps, {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
