"""`siglip2 soup`: the weights between two models, for a fine-tune that forgets less."""

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip2.core.checkpoint import AtomicCheckpointIO, differences, read_checkpoint
from siglip2.core.data.text import Tokenizer
from siglip2.core.interop.contracts import same_vocabulary
from siglip2.core.interop.detect import is_foreign, read_weights
from siglip2.core.interop.weights import Weights
from siglip2.core.model.sizes import SIZES, ShapeOptions, size_named
from siglip2.registry import catalogue

PRODUCT, SCAFFOLDING = "model.", "plugins."
LISTED = 6  # differences that an error names
STANDING = ("pytorch-lightning_version", "epoch", "global_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Interpolate the weights of two models (WiSE-FT, https://arxiv.org/abs/2109.01903): those that a fine-tune "
        "started from, and those that it ended with. Each is a checkpoint of ours or released weights, whatever "
        "model.warm_start takes. The result is a checkpoint of the towers alone."
    )
    parser.add_argument("a", help="Weights at alpha 0, usually those before fine-tuning: a file, a folder, a hub id.")
    parser.add_argument("b", help="Weights at alpha 1, usually the fine-tuned ones: a file, a folder, a hub id.")
    parser.add_argument("--alpha", type=float, default=0.5, help="Share of B, from 0 to 1 (default: 0.5).")
    where = "beside B, or beside A if only that is a checkpoint of ours, or here if neither is"
    parser.add_argument("--out", help=f"File to write (default: soup-ALPHA.ckpt {where}).")


def run(args: argparse.Namespace) -> None:
    """Writes the interpolated checkpoint and says where.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if alpha is no share, one of the two cannot be read, or they are not of the same model.
    """
    ours = [path for path in (args.b, args.a) if not is_foreign(path)]
    named = f"soup-{args.alpha:g}.ckpt"
    path = Path(args.out or (Path(ours[0]).with_name(named) if ours else named))
    if path.exists() and path.resolve() in (Path(args.a).resolve(), Path(args.b).resolve()):
        raise ValueError(f"{path} is one of the two that are mixed: choose another --out")
    a, b = read(args.a), read(args.b)
    checkpoint = soup(a, b, args.alpha)
    checkpoint["siglip2"]["soup"] = {"of": [args.a, args.b], "alpha": args.alpha}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    tensors = len(checkpoint["state_dict"])
    print(f"{path}: {tensors} tensors, {1 - args.alpha:g} of {args.a} and {args.alpha:g} of {args.b}")
    for name, model in ((args.a, a), (args.b, b)):
        for note in model["siglip2"].get("notes", ()):
            print(f"note: {name}: {note}")


def read(path: str) -> dict[str, Any]:
    """Returns a checkpoint of ours as it is, and other weights as if they were one.

    Args:
        path: whatever `model.warm_start` takes.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if it cannot be read, is of a vision tower alone, or we have no size with such patches.
    """
    return as_checkpoint(read_weights(path), path) if is_foreign(path) else read_checkpoint(path)


def as_checkpoint(weights: Weights, place: str) -> dict[str, Any]:
    """Returns weights as a checkpoint of ours, of a run that has not begun; `siglip2.notes` are those of the weights.

    Args:
        weights: of any origin; contracts that they do not say are None.
        place: what messages call them.

    Raises:
        ValueError: if they are of a vision tower alone, we have no size with such patches, or what makes them is not
            installed.
    """
    if weights.text is None:
        raise ValueError(f"{place} holds a vision tower alone: a soup is made of two models with both towers")
    sizes = [name for name, size in SIZES.items() if size.patch_size == weights.patch_size]
    if not sizes:
        raise ValueError(f"{place} has patches of {weights.patch_size} px, which none of our sizes has")
    shapes = {"vision": asdict(weights.vision), "text": asdict(weights.text)}
    notes = list(weights.notes)
    if weights.pixels is None:
        notes.append("it does not say how pictures are resized: that was not compared")
    if weights.tokenizer is None:
        notes.append("it does not say how texts are read: only the number of ids was compared")
    return {
        "pytorch-lightning_version": version("lightning"),
        "epoch": 0,
        "global_step": 0,
        "state_dict": {PRODUCT + name: tensor for name, tensor in weights.state.items()},
        "siglip2": {
            "recipe": {"plugins": _patchifier(weights.pixels), "model": {"size": sizes[0], **shapes}, "trainer": {}},
            "text": weights.tokenizer and weights.tokenizer.to_state(),
            "pixels": weights.pixels,
            "notes": notes,
        },
    }


def _patchifier(pixels: Mapping[str, Any] | None) -> dict[str, Any]:
    """The plugin that makes pictures into patches under a contract, with its options."""
    if pixels is None:
        return {}
    name, known = pixels["patchifier"], catalogue()
    if name not in known:
        raise ValueError(f"pictures were made into patches by the plugin '{name}', which is not installed")
    said = {**pixels, "eval_seq_len": pixels.get("table", 0) ** 2}  # as many as `siglip2.load` takes, where it is free
    return {name: {option: said[option] for option in inspect.signature(known[name].cls).parameters if option in said}}


def soup(a: Mapping[str, Any], b: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Returns a checkpoint whose towers, temperature and bias are (1 - alpha) a + alpha b.

    Temperature and bias are interpolated as they are stored, the temperature as its logarithm. Where the two have other
    dtypes, the wider one is kept. Recipe and contracts are those of b, unless only a is of a run of ours. Plugins are
    left out: they belong to a run. What the recipe says of those that have parameters, and of rules, goes with them.
    Adapters are in the towers of a checkpoint already.

    Source: Wortsman et al., https://arxiv.org/abs/2109.01903, section 3.

    Args:
        a: checkpoint, as `read` returns it.
        b: another, of the same model and with the same contracts.
        alpha: share of b, in [0, 1].

    Raises:
        ValueError: if alpha is outside [0, 1], or towers, text or pixels differ; the first differences are named. Also
            if none of the two says both how texts are read and how pictures are resized.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha is a share of the second model, from 0 to 1, found {alpha}")
    if lines := _differences(a, b):
        more = f"\n  ... and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        raise ValueError("the two are not of the same model:\n  " + "\n  ".join(lines[:LISTED]) + more)
    like = a if _known(a) > _known(b) else b
    if not _known(like)[1]:
        raise ValueError(
            "none of the two says both how texts are read and how pictures are resized, as a checkpoint of ours does: "
            "give the whole folder that one was released in, with its tokenizer and processor files"
        )
    theirs = b["state_dict"]
    state = {n: _between(t, theirs[n], alpha) for n, t in a["state_dict"].items() if n.startswith(PRODUCT)}
    said = {key: value for key, value in like["siglip2"].items() if key != "notes"}
    ours = {**said, "recipe": _without_scaffolding(like), "woken": [], "optimizer": None}
    return {**{k: like[k] for k in STANDING}, "state_dict": state, "callbacks": {}, "siglip2": ours}


def _known(checkpoint: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether it is of a run of ours, and whether it has both contracts."""
    ours = checkpoint["siglip2"]
    return "stream" in ours, ours["text"] is not None and ours["pixels"] is not None


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    if alpha in (0, 1):
        return (b if alpha else a).to(dtype, copy=True)
    return a.double().lerp(b.double(), alpha).to(dtype)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        *(f"text: {line}" for line in _text_differences(a["siglip2"]["text"], b["siglip2"]["text"])),
        *(f"pixels: {line}" for line in _pixel_differences(a["siglip2"]["pixels"], b["siglip2"]["pixels"])),
        *differences(_towers(a), _towers(b), "A", "B"),
        *differences(_shapes(a), _shapes(b), "A", "B"),
    ]


def _text_differences(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[str]:
    if a is None or b is None:
        return []
    text_a, text_b = Tokenizer.from_state(a), Tokenizer.from_state(b)
    lines = differences(text_a.contract.to_dict(), text_b.contract.to_dict(), "A", "B")
    return lines if same_vocabulary(text_a, text_b) else ["tokenizer file: other pieces", *lines]


def _pixel_differences(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[str]:
    return [] if a is None or b is None else differences(a, b, "A", "B")


def _towers(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each tower, which its tensors do not tell whole, or the name of a tower of timm's."""
    model = checkpoint["siglip2"]["recipe"]["model"]
    size = size_named(model["size"])
    shapes = {t: ShapeOptions(**(model.get(t) or {})).applied_to(getattr(size, t)) for t in ("vision", "text")}
    if model.get("timm"):
        del shapes["vision"]
    told = {f"{tower}.{key}": value for tower, shape in shapes.items() for key, value in asdict(shape).items()}
    return {"timm": model.get("timm"), **told}


def _shapes(checkpoint: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shape of every tensor of the towers, by name."""
    state = checkpoint["state_dict"]
    return {name: list(t.shape) for name, t in state.items() if name.startswith(PRODUCT)}


def _without_scaffolding(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the plugins whose parameters are left out, and without rules, which may speak of them."""
    recipe = dict(checkpoint["siglip2"]["recipe"])
    gone = {name.split(".")[1] for name in checkpoint["state_dict"] if name.startswith(SCAFFOLDING)}
    plugins = {name: None if name in gone else options for name, options in (recipe.get("plugins") or {}).items()}
    return {**recipe, "plugins": plugins, "model": {**(recipe.get("model") or {}), "rules": [], "warm_start": None}}
