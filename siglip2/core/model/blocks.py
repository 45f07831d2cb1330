"""Transformer blocks and attention pool as SigLIP has them, built from timm's, and the published initialisation."""

import math
from functools import partial
from typing import Any, cast

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from siglip2.core.model.attention import MAPHead, SelfAttention
from siglip2.core.model.sizes import Gelu, Shape

# flax's epsilon, in every published SigLIP. Any: timm asks for a class where it takes what makes a module
LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)
GELUS: dict[Gelu, type[nn.Module]] = {"tanh": GELUTanh, "exact": nn.GELU}


def _mlp_ratio(shape: Shape) -> float:
    ratio = (shape.mlp_dim + 0.5) / shape.width  # timm takes int(width * ratio): half a channel survives rounding
    assert int(shape.width * ratio) == shape.mlp_dim
    return ratio


def make_blocks(shape: Shape) -> nn.ModuleList:
    """Returns `depth` pre-norm blocks with biases and LayerNorm eps 1e-6, initialised as published."""
    make = partial(
        Block,
        shape.width,
        shape.num_heads,
        _mlp_ratio(shape),
        qkv_bias=True,
        act_layer=GELUS[shape.gelu],
        norm_layer=LayerNorm,
        attn_layer=SelfAttention,
    )
    blocks = nn.ModuleList(make() for _ in range(shape.depth))
    for block in cast(Any, blocks):  # timm's attributes have no useful types
        xavier_split_(block.attn.qkv, parts=3)
        xavier_split_(block.attn.proj, parts=1)
        init_mlp_(block.mlp)
    return blocks


def make_pool(shape: Shape) -> MAPHead:
    """Returns the MAP head: one learned query attends to all tokens, then a residual MLP.

    Source: google-research/big_vision, models/vit.py, MAPHead.
    """
    pool = MAPHead(
        shape.width,
        num_heads=shape.num_heads,
        mlp_ratio=_mlp_ratio(shape),
        norm_layer=LayerNorm,
        act_layer=GELUS[shape.gelu],
    )
    bound = math.sqrt(6 / (1 + shape.width))  # Xavier uniform with fan_in 1, fan_out width
    nn.init.uniform_(pool.latent, -bound, bound)
    xavier_split_(cast(nn.Linear, pool.q), parts=1)  # Identity only for q_proj=False
    xavier_split_(pool.kv, parts=2)
    xavier_split_(pool.proj, parts=1)
    init_mlp_(pool.mlp)
    return pool


def xavier_split_(linear: nn.Linear, *, parts: int) -> None:
    """Initialises a packed projection [parts * d, d] as `parts` separate Xavier-uniform d x d matrices; bias 0."""
    for matrix in linear.weight.chunk(parts):  # one 3d x d matrix would have the limit sqrt(6 / 4d), not sqrt(6 / 2d)
        nn.init.xavier_uniform_(matrix)
    nn.init.zeros_(linear.bias)


def init_mlp_(mlp: nn.Module) -> None:
    """Initialises the two layers of a timm Mlp: Xavier uniform weights, biases N(0, 1e-6)."""
    for linear in cast(tuple[nn.Linear, ...], (mlp.fc1, mlp.fc2)):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)


def lecun_normal_(linear: nn.Linear) -> None:
    """Initialises a Linear as flax's Dense: normal of std 1/sqrt(fan_in), truncated at two sigma; bias 0."""
    std = linear.in_features**-0.5 / 0.87962566103423978  # the truncation takes that share of the std away
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)


def normal_table(*shape: int) -> nn.Parameter:
    """Returns an embedding table [..., width] drawn from N(0, 1/sqrt(width))."""
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


def key_mask(valid_BN: Tensor | None) -> Tensor | None:
    """Returns the attention mask [B, 1, 1, N] bool that hides padded keys; None if nothing is padded."""
    return None if valid_BN is None else valid_BN[:, None, None, :]
