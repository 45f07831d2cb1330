"""`.npz` files of big_vision: both layouts of layers, both kinds of patch kernel.

Source: google-research/big_vision, models/vit.py, models/proj/image_text/{two_towers,text_transformer,naflex_vit}.py.
"""

# D width, H heads, h width of a head, P patch values, p patch size

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip2.core.interop.contracts import read_contract, read_tokenizer_files
from siglip2.core.interop.files import write_npz
from siglip2.core.interop.names import ONE_CELLS, ONE_ROW, Entry, Form, depth_of, expanded, read_names, write_names
from siglip2.core.interop.published import nearest, nearest_to, undescribed
from siglip2.core.interop.weights import NO_HEAD, Weights, assemble, identity_head, measure, native_pixels

PREFIX, LAYERS, LAYER = "params/", "/encoderblock/", "/encoderblock_"
ATTENTION = "MultiHeadDotProductAttention_0"
KERNEL, HEAD = "img/embedding/kernel", "txt/head"
TANH_ALONE = (
    "the {} tower was trained with the exact GELU, and big_vision has its tanh approximation alone: about 1e-4 away"
)


def _patch_kernel(weight_DP: Tensor) -> Tensor:
    side = round((weight_DP.shape[1] / 3) ** 0.5)
    return weight_DP.T.unflatten(0, (side, side, 3))  # [p, p, 3, D]


DENSE = Form(lambda t, _: t.T, lambda t: t.T, 2)
PATCHES = Form(lambda t, _: _patch_kernel(t), lambda t: t.flatten(0, 2).T, 4)
HEADS_IN = Form(lambda t, heads: t.T.unflatten(1, (heads, -1)), lambda t: t.flatten(1).T, 3)  # [D, D] <-> [D, H, h]
HEADS_BIAS = Form(lambda t, heads: t.unflatten(0, (heads, -1)), lambda t: t.flatten(), 2)
HEADS_OUT = Form(lambda t, heads: t.T.unflatten(0, (heads, -1)), lambda t: t.flatten(0, 1).T, 3)  # [D, D] <-> [H, h, D]


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry((f"{ours}.weight",), (f"{theirs}/scale",)), Entry((f"{ours}.bias",), (f"{theirs}/bias",))]


def _dense(ours: str, theirs: str, form: Form = DENSE) -> list[Entry]:
    return [Entry((f"{ours}.weight",), (f"{theirs}/kernel",), form), Entry((f"{ours}.bias",), (f"{theirs}/bias",))]


def _attention(ours: tuple[str, ...], out: str, theirs: str, parts: tuple[int, ...] = (1,)) -> list[Entry]:
    packed = []
    for kind, name, form in (("weight", "kernel", HEADS_IN), ("bias", "bias", HEADS_BIAS)):
        names = tuple(f"{theirs}/{ATTENTION}/{part}/{name}" for part in ("query", "key", "value"))
        packed.append(Entry(tuple(f"{o}.{kind}" for o in ours), names, form, parts))
    return [*packed, *_dense(out, f"{theirs}/{ATTENTION}/out", HEADS_OUT)]


def _mlp(ours: str, theirs: str) -> list[Entry]:
    return [e for n in (0, 1) for e in _dense(f"{ours}.mlp.fc{n + 1}", f"{theirs}/MlpBlock_0/Dense_{n}")]


def _transformer(tower: str, theirs: str) -> list[Entry]:
    ours, block = f"{tower}.blocks.{{i}}", f"{theirs}{LAYER}{{i}}"
    return [
        *_norm(f"{ours}.norm1", f"{block}/LayerNorm_0"),
        *_attention((f"{ours}.attn.qkv",), f"{ours}.attn.proj", block),
        *_norm(f"{ours}.norm2", f"{block}/LayerNorm_1"),
        *_mlp(ours, block),
        *_norm(f"{tower}.norm", f"{theirs}/encoder_norm"),
    ]


def table(*, native: bool) -> list[Entry]:
    """Returns the names without `params/`, in the layout of one group of arrays per layer."""
    pool = "img/MAPHead_0"
    embed = _dense("vision.embed", "img/embedding", DENSE if native else PATCHES)
    return [
        Entry(("logit_scale",), ("t",)),
        Entry(("logit_bias",), ("b",)),
        *embed,
        Entry(("vision.pos_embed",), ("img/pos_embedding",), *(() if native else (ONE_CELLS,))),
        *_transformer("vision", "img/Transformer"),
        Entry(("vision.pool.latent",), (f"{pool}/probe",)),
        *_attention(("vision.pool.q", "vision.pool.kv"), "vision.pool.proj", pool, (1, 2)),
        *_norm("vision.pool.norm", f"{pool}/LayerNorm_0"),
        *_mlp("vision.pool", pool),
        Entry(("text.token_embed.weight",), ("txt/Embed_0/embedding",)),
        Entry(("text.pos_embed",), ("txt/pos_embedding",), ONE_ROW),
        *_transformer("text", "txt/Encoder_0"),
        *_dense("text.head", "txt/head"),
    ]


def one_by_one(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns arrays that a scan over layers has stacked (`encoderblock/`) under the names of each layer."""
    out: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if LAYERS in name and array.ndim:
            out |= {name.replace(LAYERS, f"{LAYER}{i}/"): layer for i, layer in enumerate(array)}
        else:
            out[name] = array
    return out


def stacked(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the arrays of all layers stacked along a first axis, as a scan over layers has them."""
    layers: dict[str, list[Tensor]] = {}
    for name, array in arrays.items():  # in order of their numbers
        layers.setdefault(re.sub(rf"{LAYER}\d+/", LAYERS, name), []).append(array)
    return {name: torch.stack(found) if LAYERS in name else found[0] for name, found in layers.items()}


def read(arrays: Mapping[str, Tensor], place: str, folder: Path | None = None) -> Weights:
    """Returns the weights in the arrays of an npz file.

    Args:
        arrays: all of them, with `params/` or without.
        place: what messages call the file.
        folder: that we wrote, with tokenizer and contracts; None for a file alone.

    Raises:
        ValueError: if they are of another architecture, or incomplete.
    """
    named = one_by_one({n.removeprefix(PREFIX): t for n, t in arrays.items()})
    depths = {
        "vision": depth_of(named, f"img/Transformer{LAYER}{{i}}/"),
        "text": depth_of(named, f"txt/Encoder_0{LAYER}{{i}}/"),
    }
    like = _like(named, depths["vision"])
    if KERNEL not in named or f"img/MAPHead_0/{ATTENTION}/query/bias" not in named:
        raise ValueError(f"{place} does not hold the two towers of a SigLIP of big_vision. {like}")
    native = named[KERNEL].ndim == 2
    contract = read_contract(folder) if folder else {}
    depths |= contract.get("depth") or {}
    notes: tuple[str, ...] = ("an npz file says nothing of texts and pixels",)
    if f"{HEAD}/kernel" not in named and "txt/Encoder_0/encoder_norm/bias" in named:
        head = identity_head(named["txt/Encoder_0/encoder_norm/bias"])
        named |= {f"{HEAD}/kernel": head["weight"], f"{HEAD}/bias": head["bias"]}
        notes = (*notes, NO_HEAD)
    state = read_names(named, expanded(table(native=native), depths), place=place, like=like)
    first = f"{LAYER}0/{ATTENTION}/query/bias"  # [H, h]
    heads = {"vision": len(named[f"img/Transformer{first}"]), "text": len(named[f"txt/Encoder_0{first}"])}
    sizes = measure(state, place)
    if not contract.get("depth"):
        towers = {"vision": sizes.vision, "text": sizes.text or sizes.vision}
        notes += tuple(note for name, tower in towers.items() for note in undescribed(name, tower.width, tower.depth))
    found: dict[str, Any] = {
        "pixels": native_pixels(sizes.patch_size, sizes.grid[0]) if native else None,
        "tokenizer": None,
        "gelus": contract.get("gelu"),  # which big_vision itself does not have
    }
    if folder is not None and (pixels := contract.get("pixels")):
        tokenizer, about = read_tokenizer_files(folder, rows=sizes.vocab_size, length=sizes.context_length)
        found, notes = {**found, "pixels": pixels, "tokenizer": tokenizer}, (*notes[1:], *about)
    return assemble("big_vision", state, place=place, heads=heads, native=native, notes=notes, **found)


def _like(named: Mapping[str, Tensor], depth: int) -> str:
    """The nearest released shape, of arrays that may be of anything."""
    kernel = named.get(KERNEL)
    if kernel is None or kernel.ndim not in (2, 4) or not kernel.numel():
        return nearest_to(named)
    patch = kernel.shape[0] if kernel.ndim == 4 else round((kernel.shape[0] / 3) ** 0.5)
    return nearest(kernel.shape[-1], depth or None, patch)


def arrays_of(weights: Weights, *, scan: bool = True) -> dict[str, Tensor]:
    """Returns the arrays that big_vision would have saved.

    Args:
        weights: of two towers.
        scan: layers stacked, as in the released SigLIP 2 files; else one by one, as in those of SigLIP 1.
    """
    weights.needs_text("big_vision")
    named = write_names(weights.state, expanded(table(native=weights.native), weights.depths), weights.heads)
    return {f"{PREFIX}{n}": t for n, t in (stacked(named) if scan else named).items()}


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes `model.npz`, with the tokenizer file beside it; returns notes.

    Raises:
        ValueError: if there is no text tower, or the position table is no square.
    """
    write_npz(folder / "model.npz", arrays_of(weights))
    notes = [TANH_ALONE.format(tower) for tower, gelu in weights.gelus.items() if gelu == "exact"]
    if weights.tokenizer is None:
        return [*notes, "there is no tokenizer"]
    file = weights.tokenizer.file
    if isinstance(file, bytes):
        (folder / "tokenizer.model").write_bytes(file)
    else:
        (folder / "tokenizer.json").write_text(file, encoding="utf-8")
    return notes
