"""SigLIP trunks of timm, `vit_*_siglip_*` and `naflexvit_*_siglip`: the vision tower alone.

Source: huggingface/pytorch-image-models, timm/models/vision_transformer.py and naflexvit.py; checked against 1.0.31.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import GELU, GELUTanh
from torch import Tensor, nn

from siglip2.core.interop.contracts import read_contract
from siglip2.core.interop.files import read_json, write_json, write_safetensors
from siglip2.core.interop.names import (
    CONVOLUTION,
    ONE_CELLS,
    ONE_ROW,
    Entry,
    depth_of,
    expanded,
    linear,
    read_names,
    write_names,
)
from siglip2.core.interop.published import heads_of, known_trunk, nearest, nearest_to
from siglip2.core.interop.weights import (
    Sizes,
    Weights,
    assemble,
    check_pixels,
    compare,
    exact_gelu,
    measure,
    native_pixels,
    square_pixels,
)
from siglip2.core.model.sizes import Gelu

FIXED, NATIVE = "vit_base_patch16_siglip_224", "naflexvit_base_patch16_siglip"  # entries that any shape is told to
MODEL_FILE = "model.safetensors"
EPSILON = 1e-6
ACT_LAYER: dict[Gelu, str] = {"tanh": "gelu_tanh", "exact": "gelu"}


class Trunk(NamedTuple):
    """What a configuration tells: heads and GELU, which no tensor does (tanh where nothing says), and the shape.

    Args:
        heads: attention heads.
        gelu: of blocks and pool.
        shape: `depth`, `width`, `mlp_dim` and `patch_size`; empty if nothing describes the trunk.
    """

    heads: int
    gelu: Gelu = "tanh"
    shape: Mapping[str, int] = {}


def table(*, native: bool, prefix: str = "") -> list[Entry]:
    """Returns the names of timm's `NaFlexVit` (native) or `VisionTransformer`.

    Args:
        native: which of the two.
        prefix: of all their names, `visual.trunk.` in open_clip.
    """
    ours, theirs = "vision.blocks.{i}", f"{prefix}blocks.{{i}}"
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    pool = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    embed = f"{prefix}embeds" if native else f"{prefix}patch_embed"
    kernel = Entry(("vision.embed.weight",), (f"{embed}.proj.weight",))
    positions = Entry(("vision.pos_embed",), (f"{prefix}embeds.pos_embed",), ONE_ROW)  # [1, R, C, D]
    if not native:
        kernel = Entry(kernel.ours, kernel.theirs, CONVOLUTION)
        positions = Entry(("vision.pos_embed",), (f"{prefix}pos_embed",), ONE_CELLS)
    return [
        kernel,
        Entry(("vision.embed.bias",), (f"{embed}.proj.bias",)),
        positions,
        *(entry for part in parts for entry in linear(f"{ours}.{part}", f"{theirs}.{part}")),
        *linear("vision.norm", f"{prefix}norm"),
        Entry(("vision.pool.latent",), (f"{prefix}attn_pool.latent",)),
        *(entry for part in pool for entry in linear(f"vision.pool.{part}", f"{prefix}attn_pool.{part}")),
    ]


def is_native(theirs: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Says whether the tensors are those of a NaFlexVit."""
    return f"{prefix}embeds.proj.weight" in theirs


def trunk_named(name: str, arguments: Mapping[str, Any] | None = None) -> Trunk | None:
    """Asks timm what a model of that name is; None if it is not one of its own, local names.

    Args:
        name: architecture.
        arguments: that it is created with.

    Raises:
        ValueError: if it has no MAP head, its activation is no GELU, or its norms have another epsilon.
    """
    if ":" in name or not timm.is_model(name):
        return None
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **(arguments or {}))
    pool, embed = getattr(model, "attn_pool", None), getattr(model, "patch_embed", getattr(model, "embeds", None))
    if pool is None or embed is None or not getattr(model, "blocks", None):
        raise ValueError(f"timm's '{name}' is no vision transformer with a MAP head, as every SigLIP has")
    block = model.blocks[0]
    act = block.mlp.act
    if not isinstance(act, GELU | GELUTanh | nn.GELU):
        raise ValueError(
            f"timm's '{name}' has the activation {type(act).__name__}, expected a GELU, as every SigLIP has"
        )
    tanh = isinstance(act, GELUTanh) or getattr(act, "approximate", "none") == "tanh"
    for norm in (block.norm1, block.norm2, model.norm, pool.norm):
        if not abs(getattr(norm, "eps", EPSILON) - EPSILON) <= 1e-9:
            raise ValueError(f"timm's '{name}' has norms of eps {norm.eps}, every SigLIP has {EPSILON}")
    shape = {"depth": len(model.blocks), "width": model.embed_dim, "mlp_dim": block.mlp.fc1.out_features}
    shape |= {"patch_size": embed.patch_size[0]}
    return Trunk(block.attn.num_heads, "tanh" if tanh else "exact", shape)


def trunk_configured(config: Mapping[str, Any]) -> Trunk | None:
    """Asks timm what the model of its `config.json` is; None if it has no such architecture."""
    return trunk_named(str(config.get("architecture", "")), config.get("model_args"))


def read_trunk(
    theirs: Mapping[str, Tensor], trunk: Trunk | None, *, place: str, prefix: str = ""
) -> tuple[dict[str, Tensor], Trunk, list[str]]:
    """Returns the vision tower's tensors under our names, what no tensor tells of it, and notes.

    Args:
        theirs: all tensors of the trunk, and no others.
        trunk: what its configuration says; None to look its shape up among the released ones.
        place: what messages call the file.
        prefix: of the trunk's names.

    Raises:
        ValueError: if it is not such a trunk, or nothing says how many heads it has.
    """
    native, depth = is_native(theirs, prefix), depth_of(theirs, f"{prefix}blocks.{{i}}.")
    kernel = theirs.get(f"{prefix}embeds.proj.weight" if native else f"{prefix}patch_embed.proj.weight")
    if kernel is None or kernel.ndim != (2 if native else 4) or not kernel.numel() or depth == 0:
        raise ValueError(f"{place} does not hold a vision transformer of timm. {nearest_to(theirs)}")
    patch = round((kernel.shape[1] / 3) ** 0.5) if native else kernel.shape[-1]
    like = nearest(kernel.shape[0], depth, patch)
    if f"{prefix}attn_pool.latent" not in theirs:
        raise ValueError(f"{place} has no MAP head (`attn_pool`), as timm's siglip_gap variants; expected one. {like}")
    # not as many as are there, where a configuration says: a file may have lost its last ones
    depths = {"vision": trunk.shape.get("depth", depth) if trunk else depth}
    entries = expanded(table(native=native, prefix=prefix), depths)
    state = read_names(theirs, entries, place=place, like=like)
    heads = heads_of(kernel.shape[0], depth)
    if trunk is None and heads is None:
        raise ValueError(
            f"{place} does not say how many attention heads it has, and no tensor does: put the config.json of the "
            f"model beside it. {like}"
        )
    found = trunk or Trunk(heads or 0)
    return state, found, [exact_gelu("vision")] if found.gelu == "exact" else []


def compare_trunk(trunk: Trunk, sizes: Sizes, place: str) -> None:
    """Raises ValueError if the configuration of a trunk says another shape than its tensors have."""
    vision, patch = sizes.vision, sizes.patch_size
    measured = {"width": vision.width, "mlp_dim": vision.mlp_dim, "patch_size": patch}
    found = {key: value for key, value in measured.items() if key in trunk.shape}
    like = nearest(vision.width, vision.depth, patch)
    compare(place, "its configuration", "vision", said=trunk.shape, found=found, like=like)


def read(folder: Path | None, theirs: Mapping[str, Tensor], place: str) -> Weights:
    """Returns the vision tower of a timm checkpoint.

    Args:
        folder: with a `config.json` of timm, or None.
        theirs: its tensors; those of a classifier are left out.
        place: what messages call the file.

    Raises:
        ValueError: if it is no SigLIP trunk.
    """
    described = folder / "config.json" if folder else None
    config = read_json(described) if described and described.is_file() else {}
    head = [name for name in theirs if name.startswith(("head.", "fc_norm."))]
    body = {name: t for name, t in theirs.items() if name not in head}
    state, trunk, notes = read_trunk(body, trunk_configured(config), place=place)
    if head:
        notes.append(f"a classifier was left out ({', '.join(head)})")
    native, sizes = is_native(theirs), measure(state, place)
    compare_trunk(trunk, sizes, place)
    processed = _read_pixels(place, config, sizes, native=native)
    pixels = (read_contract(folder).get("pixels") if folder else None) or processed
    found: dict[str, Any] = {"heads": {"vision": trunk.heads}, "gelus": {"vision": trunk.gelu}, "pixels": pixels}
    return assemble("timm", state, place=place, native=native, notes=(*notes,), **found)


def _read_pixels(place: str, config: Mapping[str, Any], sizes: Sizes, *, native: bool) -> dict[str, Any] | None:
    found = config.get("pretrained_cfg", config)
    check_pixels(place, found, {"mean": 0.5, "std": 0.5})
    patch_size, side = sizes.patch_size, sizes.grid[0]
    if native:
        return native_pixels(patch_size, side)
    size, filter = found.get("input_size"), found.get("interpolation")
    if size is None or filter not in ("bilinear", "bicubic") or "mean" not in found:
        return None
    return square_pixels(side * patch_size, patch_size, filter=filter)


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes a folder that `timm.create_model("local-dir:...", pretrained=True)` loads; returns notes."""
    entries = expanded(table(native=weights.native), {"vision": weights.vision.depth})
    write_safetensors(folder / MODEL_FILE, write_names(weights.state, entries, weights.heads))
    write_json(folder / "config.json", config_of(weights))
    return ["timm has the vision tower alone: the text tower was left out"] if weights.text else []


def config_of(weights: Weights) -> dict[str, Any]:
    """Returns the content of timm's `config.json`: an architecture of its own, with every argument of the shape."""
    known = known_trunk(weights.vision, patch_size=weights.patch_size, grid=weights.grid, native=weights.native)
    side = weights.grid[0] * weights.patch_size  # 378 where our squares of 384 px lose six pixels to the last patch
    pixels = weights.pixels or {}
    return {
        "architecture": known.timm if known else NATIVE if weights.native else FIXED,
        "num_classes": 0,
        "num_features": weights.vision.width,
        "global_pool": "map",
        "model_args": arguments_of(weights),
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": not weights.native,
            "interpolation": pixels.get("filter", "bilinear"),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 0,
        },
    }


def arguments_of(weights: Weights) -> dict[str, Any]:
    """Returns the arguments with which timm's entries get the tower's shape and activation."""
    shape = weights.vision
    arguments: dict[str, Any] = {
        "patch_size": weights.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": (shape.mlp_dim + 0.5) / shape.width,  # timm takes int(width * ratio)
        "act_layer": ACT_LAYER[shape.gelu],
    }
    if weights.native:
        return arguments | {"pos_embed_grid_size": list(weights.grid), "pos_embed_interp_mode": "bilinear"}
    return arguments | {"img_size": weights.grid[0] * weights.patch_size}
