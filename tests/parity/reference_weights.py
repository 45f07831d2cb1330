"""Our parameters under the names and in the shapes of other libraries; linear, so that gradients convert as well."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK_IN_HF = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
POOL_IN_HF = {
    "latent": "probe",
    "proj.weight": "attention.out_proj.weight",
    "proj.bias": "attention.out_proj.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
TEXT_IN_HF = {
    "token_embed.weight": "embeddings.token_embedding.weight",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm.weight": "final_layer_norm.weight",
    "norm.bias": "final_layer_norm.bias",
}


def to_transformers(ours: Mapping[str, Tensor], *, convolution: bool) -> dict[str, Tensor]:
    """Returns parameters or gradients of `TwoTowers` as those of `SiglipModel` (convolution) or `Siglip2Model`."""
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        tower, _, rest = name.partition(".")
        if tower in ("logit_scale", "logit_bias"):
            theirs[name] = value
        elif block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", rest):
            prefix = f"{tower}_model.encoder.layers.{block[1]}"
            theirs |= {f"{prefix}.{k}.{block[3]}": v for k, v in _block(block[2], value).items()}
        elif rest.startswith("pool."):
            theirs[f"vision_model.head.{_pool_name(rest.removeprefix('pool.'))}"] = value
        elif tower == "text":
            theirs[f"text_model.{TEXT_IN_HF.get(rest, rest)}"] = value
        else:
            theirs |= {f"vision_model.{k}": v for k, v in _vision(rest, value, convolution=convolution).items()}
    return _joined(theirs)


def _block(part: str, value: Tensor) -> dict[str, Tensor]:
    if part != "attn.qkv":
        return {BLOCK_IN_HF[part]: value}
    return dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), value.chunk(3), strict=True))


def _pool_name(rest: str) -> str:
    return POOL_IN_HF.get(rest, rest)  # q and kv keep their names until `_joined`


def _vision(rest: str, value: Tensor, *, convolution: bool) -> dict[str, Tensor]:
    if rest.startswith("norm."):
        return {rest.replace("norm", "post_layernorm"): value}
    if rest == "pos_embed":
        return {"embeddings.position_embedding.weight": value.flatten(0, 1)}
    if rest == "embed.weight" and convolution:
        value = _as_convolution(value)
    return {rest.replace("embed.", "embeddings.patch_embedding."): value}


def _joined(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    head = "vision_model.head"
    for kind in ("weight", "bias"):
        packed = [theirs.pop(f"{head}.q.{kind}"), theirs.pop(f"{head}.kv.{kind}")]
        theirs[f"{head}.attention.in_proj_{kind}"] = torch.cat(packed)
    return theirs


def _as_convolution(linear: Tensor) -> Tensor:
    side = int((linear.shape[1] // 3) ** 0.5)
    return linear.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)  # [D, row, column, channel] -> [D, 3, p, p]


def to_timm(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns parameters or gradients of `VisionTower` as those of timm's `VisionTransformer`."""
    theirs = {name.replace("pool.", "attn_pool."): value for name, value in ours.items()}
    theirs["patch_embed.proj.weight"] = _as_convolution(theirs.pop("embed.weight"))
    theirs["patch_embed.proj.bias"] = theirs.pop("embed.bias")
    theirs["pos_embed"] = theirs["pos_embed"].flatten(0, 1)[None]
    return theirs
