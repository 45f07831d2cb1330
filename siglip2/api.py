"""A trained model in five lines: `siglip2.load`, for checkpoints of ours and for released weights.

The towers come with the text and pixel contract they were trained under, so a caller has to know neither.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from timm.layers import Attention, AttentionPoolLatent

from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.text import Tokenizer
from siglip2.core.interop.detect import is_foreign, read_weights
from siglip2.core.interop.weights import Weights, square_pixels
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.module import SigLIP2Module
from siglip2.core.plugin import Plugin
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.plugins.naflex import NaFlexPatchifier
from siglip2.prediction.model import Model
from siglip2.prediction.packed import can_pack, pack
from siglip2.registry import catalogue, in_order, plugins_class

log = logging.getLogger(__name__)

Device = str | torch.device


def load(
    path_or_id: str | Path,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    *,
    seq_len: int | None = None,
    tokenizer: str | Path | None = None,
    packed: bool = True,
) -> Model:
    """Returns a trained model, ready for use. A local path touches no network.

    Args:
        path_or_id: a checkpoint that `siglip2 fit` wrote; or released weights: a folder or hub id of transformers or
            open_clip, an `.npz` of big_vision.
        device: where it runs; None takes a GPU if there is one.
        dtype: of the weights, such as torch.bfloat16; None keeps float32.
        seq_len: patches per picture, where pictures keep their aspect ratio; None takes what the checkpoint says, and
            for released weights as many as the position table has cells.
        tokenizer: a tokenizer.json, a SentencePiece model, or a folder or hub id with one, where the weights have
            none.
        packed: on a CPU, whether linear layers are stored as its matrix products read them: up to twice as fast, but
            the towers can then not be trained, moved, copied or saved. Elsewhere nothing is changed.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if the weights cannot be read, are of a vision tower alone, or `seq_len` or `tokenizer` do not fit.
    """
    path = str(path_or_id)
    found = _from_weights(read_weights(path), path, tokenizer) if is_foreign(path) else _from_checkpoint(path)
    if seq_len is not None:
        found.patchifier = _with_length(found.patchifier, seq_len)
    found.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    if found.device.type == "cpu" and dtype == torch.bfloat16:
        multiply_out(found.model)
    if packed and found.device.type == "cpu" and can_pack(found.model.logit_scale.dtype):
        pack(found.model)
    return found


def multiply_out(model: TwoTowers) -> None:
    """Takes attention off torch's fused kernel, which is slow in bf16 on a CPU; rounding is of the same size."""
    for module in model.modules():
        if isinstance(module, Attention | AttentionPoolLatent):
            module.fused_attn = False  # type: ignore[misc]  # Final in timm for TorchScript only


def _from_checkpoint(path: str) -> Model:
    module = load_module(path)
    return Model(module.model, module.patchifier, module.tokenizer, name=path)


def _from_weights(weights: Weights, path: str, tokenizer: str | Path | None) -> Model:
    weights.needs_text("`siglip2.load`")
    own = weights.tokenizer
    if own is None and tokenizer is not None:
        own = Tokenizer.load(tokenizer, length=weights.context_length)
        if own.vocab_size > weights.vocab_size:
            raise ValueError(
                f"{tokenizer} has {own.vocab_size} ids, the token table of {path} {weights.vocab_size} rows: give the "
                f"tokenizer that the weights were trained with"
            )
    pixels = weights.pixels
    if pixels is None:
        pixels = square_pixels(weights.image_size, weights.patch_size, filter="bilinear")
        log.warning("%s does not say how pictures were resized: taking bilinear, antialiased, as transformers", path)
    return Model(weights.towers(), patchifier_of(pixels, path), own, name=path)


def patchifier_of(pixels: Mapping[str, Any], path: str) -> Patchifier:
    """Returns the patchifier that a pixel contract describes.

    Args:
        pixels: as a patchifier's `contract()`.
        path: what messages call its origin.

    Raises:
        ValueError: if it is of no kind that other libraries have.
    """
    if pixels["patchifier"] == "fixed":
        size, patch_size, filter = pixels["image_size"], pixels["patch_size"], pixels["filter"]
        return FixedPatchifier(size, patch_size, 1, filter=filter, antialias=pixels["antialias"])
    if pixels["patchifier"] == "naflex":
        table = pixels["table"]
        layout = Layout(table**2, 1)
        return NaFlexPatchifier(pixels["patch_size"], table, (layout,), layout.seq_len, pixels["max_scale"], seed=0)
    raise ValueError(f"{path} makes patches as '{pixels['patchifier']}' does, expected fixed or naflex")


def _with_length(patchifier: Patchifier, seq_len: int) -> Patchifier:
    if not hasattr(patchifier, "eval_seq_len") or seq_len < 1:
        raise ValueError(
            f"seq_len is {seq_len}, expected a number of patches, and only for models whose pictures keep their aspect "
            f"ratio"
        )
    changed: Any = replace(patchifier, eval_seq_len=seq_len)  # type: ignore[type-var]
    return changed


def load_module(path: str) -> SigLIP2Module:
    """Returns the towers, tokenizer and patchifier of a checkpoint, without the scaffolding that trained them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ours, or its patchifier is not installed.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint["siglip2"]
    model, plugin = ours["recipe"].get("model", {}), _patchifier_plugin(path, ours["recipe"].get("plugins", {}))
    tokenizer = Tokenizer.from_state(ours["text"])
    # nothing is initialised only to be overwritten; timm's towers have buffers that no file holds
    with nullcontext() if model.get("timm") else torch.device("meta"):
        module = SigLIP2Module(
            [plugin],
            tokenizer,
            size=model["size"],
            vision=ShapeOptions(**model.get("vision", {})),
            text=ShapeOptions(**model.get("text", {})),
            timm=model.get("timm"),
            fused_attention=model.get("fused_attention", True),
        )
    weights = {name: x for name, x in checkpoint["state_dict"].items() if name.startswith("model.")}
    product = {"siglip2": ours, "state_dict": weights}
    module.on_load_checkpoint(product)
    module.load_state_dict(product["state_dict"], assign=True)
    return module


def _patchifier_plugin(path: str, plugins: dict[str, Any]) -> Plugin:
    known = catalogue()
    named = [n for n in plugins if n in known and hasattr(known[n].cls, "patchifier") and plugins[n] is not None]
    if len(named) != 1:
        raise ValueError(
            f"{path} was trained with the plugins {', '.join(plugins) or 'none'}, of which {len(named)} installed ones "
            f"make patches, expected one: install the package that has the recipe's patchifier"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(plugins_class(named), "plugins")
    chosen = parser.parse_object({"plugins": {named[0]: plugins[named[0]]}})
    return in_order(parser.instantiate_classes(chosen).plugins)[0]
