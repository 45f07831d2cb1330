"""`siglip2 soup`: the weights between two checkpoints, for a fine-tune that forgets less."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from siglip2.core.checkpoint import AtomicCheckpointIO, differences, read_checkpoint
from siglip2.core.data.text import Tokenizer

PRODUCT, SCAFFOLDING = "model.", "plugins."
LISTED = 6  # differences that an error names
STANDING = ("pytorch-lightning_version", "epoch", "global_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Interpolate the weights of two checkpoints (WiSE-FT, https://arxiv.org/abs/2109.01903): those that a "
        "fine-tune started from, and those that it ended with. The result is a checkpoint of the towers alone."
    )
    parser.add_argument("a", help="Checkpoint at alpha 0, usually the one before fine-tuning.")
    parser.add_argument("b", help="Checkpoint at alpha 1, usually the fine-tuned one.")
    parser.add_argument("--alpha", type=float, default=0.5, help="Share of B, from 0 to 1 (default: 0.5).")
    parser.add_argument("--out", help="File to write (default: soup-ALPHA.ckpt beside B).")


def run(args: argparse.Namespace) -> None:
    """Writes the interpolated checkpoint and says where.

    Raises:
        ValueError: if alpha is no share, or the two are not of the same model.
    """
    path = Path(args.out) if args.out else Path(args.b).with_name(f"soup-{args.alpha:g}.ckpt")
    if path.exists() and path.resolve() in (Path(args.a).resolve(), Path(args.b).resolve()):
        raise ValueError(f"{path} is one of the two checkpoints: choose another --out")
    checkpoint = soup(read_checkpoint(args.a), read_checkpoint(args.b), args.alpha)
    checkpoint["siglip2"]["soup"] = {"of": [args.a, args.b], "alpha": args.alpha}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    tensors = len(checkpoint["state_dict"])
    print(f"{path}: {tensors} tensors, {1 - args.alpha:g} of {args.a} and {args.alpha:g} of {args.b}")


def soup(a: Mapping[str, Any], b: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Returns a checkpoint whose towers, temperature and bias are (1 - alpha) a + alpha b.

    Temperature and bias are interpolated as they are stored, the temperature as its logarithm. Plugins are left out:
    they belong to a run. What the recipe says of those that have parameters, and of rules, goes with them.

    Source: Wortsman et al., https://arxiv.org/abs/2109.01903, section 3.

    Args:
        a: checkpoint of ours, as `read_checkpoint` returns it.
        b: another, of the same model and with the same contracts; gives the recipe.
        alpha: share of b, in [0, 1].

    Raises:
        ValueError: if alpha is outside [0, 1], or towers, text or pixels differ; the first differences are named.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha is a share of the second checkpoint, from 0 to 1, found {alpha}")
    if lines := _differences(a, b):
        more = f"\n  ... and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        raise ValueError("the two checkpoints are not of the same model:\n  " + "\n  ".join(lines[:LISTED]) + more)
    theirs = b["state_dict"]
    state = {n: _between(t, theirs[n], alpha) for n, t in a["state_dict"].items() if n.startswith(PRODUCT)}
    ours = {**b["siglip2"], "recipe": _without_scaffolding(b), "woken": [], "optimizer": None}
    return {**{k: b[k] for k in STANDING}, "state_dict": state, "callbacks": {}, "siglip2": ours}


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1):
        return (b if alpha else a).clone()
    return a.double().lerp(b.double(), alpha).to(a.dtype)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    text_a, text_b = (Tokenizer.from_state(c["siglip2"]["text"]) for c in (a, b))
    return [
        *(f"text: {line}" for line in text_a.differences(text_b)),
        *(f"pixels: {line}" for line in differences(a["siglip2"]["pixels"], b["siglip2"]["pixels"], "A", "B")),
        *differences(_shapes(a), _shapes(b), "A", "B"),
    ]


def _shapes(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Shape and type of every tensor of the towers, by name."""
    state = checkpoint["state_dict"]
    return {name: f"{list(t.shape)} {t.dtype}" for name, t in state.items() if name.startswith(PRODUCT)}


def _without_scaffolding(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the plugins whose parameters are left out, and without rules, which may speak of them."""
    recipe = dict(checkpoint["siglip2"]["recipe"])
    gone = {name.split(".")[1] for name in checkpoint["state_dict"] if name.startswith(SCAFFOLDING)}
    plugins = {name: None if name in gone else options for name, options in (recipe.get("plugins") or {}).items()}
    return {**recipe, "plugins": plugins, "model": {**(recipe.get("model") or {}), "rules": [], "warm_start": None}}
