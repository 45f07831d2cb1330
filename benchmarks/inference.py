"""Images and texts per second of `siglip2.load` against transformers, open_clip and timm: same weights and precision.

B/16 with random weights, for squares of 256 px and for NaFlex with 256 patches, written once by our exporter and loaded
by each library. `towers`: what each library's model takes (ours uint8 patches, theirs normalised pixels) to unit-norm
embeddings. `pictures`: uint8 tensors of mixed sizes to the same, through each library's own image processor (that of
open_clip takes PIL pictures). NaFlex in open_clip is timm's NaFlexVit, here by itself. Before anything is timed, the
embeddings of all sides are compared.

The sides take turns in one process; a ratio compares times of the same round, so that the machine's noise falls on all.
`--clock cpu` counts the time that the process computes, for a CPU that others use as well.
`--depth` cuts both towers, to fit a small machine: per block the work is the same, what stands around the blocks counts
for more. Run: python benchmarks/inference.py
"""

# B pictures or texts, N patches, E embedding dimension

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from naflex import HF, OURS, TIMM, make_timm
from naflex_loader import picture_sizes
from step_cost import KEEP_MEMORY
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import to_pil_image

import siglip2
from siglip2.core.batch import Patches, collate
from siglip2.core.data.text import Tokenizer
from siglip2.core.functional import unpatchify
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions, size_named
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.model.vision import to_unit_range
from siglip2.prediction.model import Model
from siglip2.testing import tiny_tokenizer

OPEN_CLIP = "open_clip"
SIDE, PATCH, GRID, CONTEXT = 256, 16, 16, 64
CLOSE = {"fp32": 1e-4, "bf16": 0.03}  # of unit-norm embeddings; processors round a resized pixel each in their own way
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Sides = dict[str, Callable[[], Tensor]]


def make_weights(depth: int, vocab: int, folder: Path) -> None:
    """Writes one pair of towers, for squares and for NaFlex, as transformers and open_clip store them."""
    tokenizer = Tokenizer(tiny_tokenizer().file, replace(tiny_tokenizer().contract, length=CONTEXT, vocab_size=vocab))
    cut, shape = ShapeOptions(depth=depth), size_named("B/16").vision
    sizes = {"patch_size": PATCH, "grid": (GRID, GRID), "vocab_size": vocab, "context_length": CONTEXT}
    model = build_two_towers("B/16", vision=cut, text=cut, **sizes)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    heads = {"vision": shape.num_heads, "text": shape.num_heads}
    for native in (False, True):
        pixels = native_pixels(PATCH, GRID) if native else square_pixels(SIDE, PATCH, filter="bilinear")
        weights = assemble(
            "siglip2", state, place="here", heads=heads, native=native, pixels=pixels, tokenizer=tokenizer
        )
        for format in ("hf",) if native else ("hf", "open_clip"):
            write(weights, format, folder / f"{format}-{native}", check=False)


def make_pictures(count: int) -> list[Tensor]:
    """Returns smooth noise of mixed sizes, uint8 [3, H, W]: without structure, a resize would leave nothing of it."""
    coarse = torch.rand(count, 3, 12, 16)
    resize = partial(torch.nn.functional.interpolate, mode="bicubic")
    fine = [resize(coarse[i, None], size=size)[0] for i, size in enumerate(picture_sizes(count))]
    return [(x.clamp(0, 1) * 255).to(torch.uint8) for x in fine]


def joined(ours: Model, pictures: Sequence[Tensor]) -> Patches:
    """Returns the patches of a batch on the host, padded as the loader pads them."""
    return collate([{"image": ours.patches(picture)} for picture in pictures])["image"]


def square_sides(folder: Path, dtype: torch.dtype, pictures: Sequence[Tensor], device: str) -> dict[str, Sides]:
    """Returns what encodes squares on each side: from their model's input, and from pictures."""
    ours = siglip2.load(folder / "hf-False", device, dtype)
    theirs = transformers.AutoModel.from_pretrained(folder / "hf-False", dtype=dtype).to(device).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "hf-False")
    clip, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'open_clip-False'}")
    clip = clip.to(device, dtype).eval()
    patches = joined(ours, pictures)
    pixels = to_unit_range(unpatchify(patches.patches, (GRID, GRID))).to(device, dtype)
    pil = [to_pil_image(picture) for picture in pictures]

    def by_transformers(pixels: Tensor) -> Tensor:
        return normalize(theirs.get_image_features(pixel_values=pixels.to(device, dtype)).pooler_output.float())

    def by_open_clip(pixels: Tensor) -> Tensor:
        return clip.encode_image(pixels.to(device, dtype), normalize=True).float()

    towers = {
        OURS: lambda: ours.encode_patches(patches),
        HF: lambda: by_transformers(pixels),
        OPEN_CLIP: lambda: by_open_clip(pixels),
    }
    whole = {
        OURS: lambda: ours.encode_image(pictures, batch_size=len(pictures)),
        HF: lambda: by_transformers(processor(list(pictures), return_tensors="pt")["pixel_values"]),
        OPEN_CLIP: lambda: by_open_clip(torch.stack([transform(picture) for picture in pil])),
    }
    return {"squares, towers": towers, "squares, pictures": whole}


def native_sides(folder: Path, dtype: torch.dtype, pictures: Sequence[Tensor], device: str) -> dict[str, Sides]:
    """Returns what encodes pictures at their own aspect ratio on each side."""
    ours = siglip2.load(folder / "hf-True", device, dtype)
    theirs = transformers.AutoModel.from_pretrained(folder / "hf-True", dtype=dtype).to(device).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "hf-True")
    shape = replace(size_named("B/16").vision, depth=len(ours.model.vision.blocks))
    plain = siglip2.load(folder / "hf-True", "cpu", packed=False).model.vision  # packed layers show no weights
    timms = make_timm(plain, shape).to(device, dtype).eval()
    patches = joined(ours, pictures)
    assert patches.valid is not None
    assert patches.sizes is not None
    pixels, valid = to_unit_range(patches.patches).to(device, dtype), patches.valid.to(device)
    mask, shapes, coords = valid.int(), patches.sizes[:, 0].long().to(device), patches.coords.long().to(device)

    def by_transformers(**inputs: Tensor) -> Tensor:
        found = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        return normalize(theirs.get_image_features(**found).pooler_output.float())

    towers = {
        OURS: lambda: ours.encode_patches(patches),
        HF: lambda: by_transformers(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes),
        TIMM: lambda: normalize(timms({"patches": pixels, "patch_coord": coords, "patch_valid": valid}).float()),
    }
    whole = {
        OURS: lambda: ours.encode_image(pictures, batch_size=len(pictures)),
        HF: lambda: by_transformers(**processor(list(pictures), return_tensors="pt")),
    }
    return {"NaFlex, towers": towers, "NaFlex, pictures": whole}


def text_sides(folder: Path, dtype: torch.dtype, count: int, device: str) -> dict[str, Sides]:
    """Returns what encodes ids on each side."""
    ours = siglip2.load(folder / "hf-False", device, dtype)
    theirs = transformers.AutoModel.from_pretrained(folder / "hf-False", dtype=dtype).to(device).eval()
    clip = open_clip.create_model(f"local-dir:{folder / 'open_clip-False'}").to(device, dtype).eval()
    ids = torch.randint(1, 300, (count, CONTEXT), device=device)
    return {
        "texts, towers": {
            OURS: lambda: ours.encode_ids(ids),
            HF: lambda: normalize(theirs.get_text_features(input_ids=ids).pooler_output.float()),
            OPEN_CLIP: lambda: clip.encode_text(ids, normalize=True).float(),
        }
    }


def apart(sides: Sides) -> float:
    """Returns the largest difference of the others' embeddings from ours."""
    found = {name: run() for name, run in sides.items()}
    return max(float((found[name] - found[OURS]).abs().max()) for name in sides if name != OURS)


def take_turns(sides: Sides, rounds: int, device: str, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round; every round begins with another one."""
    names, spent = list(sides), {name: [] for name in sides}
    for number in range(-1, rounds):  # the first is for memory and kernels
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock()
            sides[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            spent[name] += [clock() - start] if number >= 0 else []
    return spent


def row(label: str, count: int, spent: Mapping[str, list[float]]) -> str:
    """Returns a row of the table: our rate, and how many times as long each of the others takes."""
    cells = [label, f"{count / statistics.median(spent[OURS]):.3g}"]
    for names in ((HF,), (OPEN_CLIP, TIMM)):
        name = next((n for n in names if n in spent), None)
        ratios = [a / b for a, b in zip(spent[name], spent[OURS], strict=True)] if name else []
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
    return f"| {' | '.join(cells)} |"


@torch.inference_mode()
def compare(args: argparse.Namespace, folder: Path) -> None:
    """Prints a row for every precision, batch and way."""
    for precision in args.precision:
        for batch in args.batch:
            pictures, dtype = make_pictures(batch), DTYPES[precision]
            makers = {
                "squares": partial(square_sides, folder, dtype, pictures, args.device),
                "NaFlex": partial(native_sides, folder, dtype, pictures, args.device),
                "texts": partial(text_sides, folder, dtype, batch, args.device),
            }
            for kind in args.only:
                for name, sides in makers[kind]().items():
                    difference = apart(sides)
                    allowed = CLOSE[precision] if "towers" in name else 0.1
                    assert difference < allowed, f"the sides differ by {difference} in {name}, {precision}"
                    spent = take_turns(sides, args.rounds, args.device, CLOCKS[args.clock])
                    print(row(f"{name}, {precision}, {batch} ({difference:.0e} apart)", batch, spent), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument(
        "--vocab", type=int, default=8000, help="rows of the token table, which a look-up does not feel"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--only", nargs="+", choices=["squares", "NaFlex", "texts"], default=["squares", "NaFlex", "texts"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if args.device == "cpu" and not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"B/16 with {args.depth} blocks, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{args.clock} time of theirs / ours,\nmedian of {args.rounds} paired rounds, smallest to largest\n\n"
        f"| | ours per second | transformers {transformers.__version__} | open_clip {open_clip.__version__} "
        f"(NaFlex: timm {timm.__version__}) |\n|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_weights(args.depth, args.vocab, Path(folder))
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
