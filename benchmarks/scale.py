"""What a step costs on many chips, on paper: counted floating-point operations, memory and bytes between chips.

Operations are counted by torch's FlopCounterMode on the real modules with fake tensors (matrix products only; forward
and backward); nothing is run, and no time is measured. Bandwidths, latency and utilisation are assumptions, given as
options. docs/scale.md reads the table. Run: python benchmarks/scale.py
"""

import argparse
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from siglip2.core.batch import Batch, Patches
from siglip2.core.functional import grid_coords
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.model.vision import VisionOutput
from siglip2.core.step import Step
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS

VOCABULARY, LENGTH, IMAGES = 256_000, 64, 2
STAGES = {"sigmoid": ["sigmoid"], "to 80 %": ["sigmoid", "locca"], "from 80 %": ["sigmoid", "locca", "silc", "tips"]}
GIGA, TERA = 1e9, 1e12


class Teacher(nn.Module):
    """Gives tokens without computing them: its forward pass is counted alone, since the counter stumbles over it."""

    def __init__(self, width: int, heads: dict[str, nn.Module]):
        super().__init__()
        self.width, self.heads = width, nn.ModuleDict(heads)

    def forward(self, images: Patches) -> VisionOutput:
        size = images.patches.shape[0]
        return VisionOutput(torch.zeros(size, images.patches.shape[1], self.width), torch.zeros(size, self.width))


@dataclass(frozen=True)
class Counted:
    """Of one size: parameters by part, and operations per image and stage.

    Args:
        width: of the shared embedding space.
        parameters: part -> number.
        operations: stage -> floating-point operations of forward and backward for one image.
    """

    width: int
    parameters: dict[str, int]
    operations: dict[str, float]


def count(size: str) -> Counted:
    """Builds a size with all its losses out of fake tensors and counts a step of two images."""
    with FakeTensorMode():
        model = build_two_towers(size, patch_size=16, grid=(16, 16), vocab_size=VOCABULARY, context_length=LENGTH)
        losses = {"sigmoid": Sigmoid(), "locca": LocCa(), "silc": SILC(start=0.0), "tips": TIPS(start=0.0)}
        heads: dict[str, nn.Module] = {}
        losses["locca"].setup(model)
        for name in ("silc", "tips"):
            losses[name].setup(model, heads)
        views = {
            "image": pictures(IMAGES, 16),
            "global": pictures(IMAGES, 16),
            "local": pictures(8 * IMAGES, 6),
            "caption": torch.zeros(IMAGES, LENGTH, dtype=torch.int32),
            "mask": torch.zeros(IMAGES, 128, dtype=torch.int32),
            "locca": torch.zeros(3 * IMAGES, 2, LENGTH, dtype=torch.int32),
            "locca_parallel": torch.zeros(IMAGES, dtype=torch.bool),
        }
        with FlopCounterMode(display=False) as counter:
            model.vision(views["global"])
        teaching = counter.get_total_flops() / IMAGES
        operations = {}
        for stage, names in STAGES.items():
            with FlopCounterMode(display=False) as counter:
                teacher = {"teacher": Teacher(model.vision.width, heads)}
                step = Step(model, Batch(views, IMAGES, 0), progress=0.9, encoders=teacher, heads=heads)
                torch.stack([losses[name].loss(step) for name in names]).sum().backward()
            operations[stage] = counter.get_total_flops() / IMAGES + ("silc" in names) * teaching
        parts = {"vision": model.vision, "text": model.text, "decoder": losses["locca"], "heads": nn.ModuleDict(heads)}
        parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        vocabulary = [losses["locca"].decoder.token_embed, losses["locca"].decoder.out, model.text.token_embed]
        parameters["of these, vocabulary"] = sum(p.numel() for part in vocabulary for p in part.parameters())
        return Counted(model.embed_dim, parameters, operations)


def pictures(number: int, side: int) -> Patches:
    """Pictures of side x side patches."""
    patches = torch.zeros(number, side * side, 768, dtype=torch.uint8)
    patches = torch.zeros(number, side * side, 768, dtype=torch.uint8)
    return Patches(patches, grid_coords(side, side)[None], None, (side, side))


def rows(counted: Counted, args: argparse.Namespace) -> dict[str, str]:
    """What one chip does in a step, line by line."""
    images = args.batch_size / args.chips
    trained = sum(n for name, n in counted.parameters.items() if name != "of these, vocabulary")
    out = {f"parameters, {name}": f"{n / 1e6:.0f} M" for name, n in counted.parameters.items()}
    out["images per chip"] = f"{images:g}"
    for stage, operations in counted.operations.items():
        seconds = operations * images / (args.tflops * TERA * args.utilisation)
        out[f"compute, {stage}"] = f"{operations * images / TERA:.1f} TFLOP, {1e3 * seconds:.0f} ms"
    state = 16 * trained + 4 * (counted.parameters["vision"] + counted.parameters["heads"])
    out["weights, gradients, Adam, teacher: copied"] = f"{state / GIGA:.1f} GB"
    out["the same, sharded"] = f"{state / args.chips / GIGA:.3f} GB"
    moved = 2 * 4 * trained
    out["gradients, all-reduced in float32"] = f"{moved / GIGA:.1f} GB, {1e3 * moved / (args.link * GIGA):.0f} ms"
    texts = 4 * images * counted.width
    ring = 2 * texts * (args.chips - 1)
    hops = 1e-6 * args.latency * (args.chips - 1)
    out["ring of texts and their gradients"] = (
        f"{ring / GIGA:.2f} GB, {1e3 * ring / (args.link * GIGA):.1f} ms + {1e3 * hops:.0f} ms "
        f"for {args.chips - 1} hops"
    )
    out["texts gathered instead"] = f"{texts * args.chips / GIGA:.2f} GB held on each chip"
    out["logits of a chip, all texts at once"] = f"{4 * images * args.batch_size / 2**20:.1f} MiB"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["B/16", "g-opt/16"])
    parser.add_argument("--chips", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32768)
    parser.add_argument("--tflops", type=float, default=197.0, help="peak of a chip in bf16; 197 is a TPU v5e")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--link", type=float, default=100.0, help="GB/s that a collective moves through a chip")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds of one hop of the ring")
    args = parser.parse_args()
    found = {size: rows(count(size), args) for size in args.sizes}
    print(f"| {args.chips} chips, batch {args.batch_size} | {' | '.join(args.sizes)} |")
    print("|---" * (len(args.sizes) + 1) + "|")
    for line, sizes in product(next(iter(found.values())), [args.sizes]):
        print(f"| {line} | {' | '.join(found[size][line] for size in sizes)} |")


if __name__ == "__main__":
    main()
