"""Attention: one function for all of it, the mask of rows that several images share, and timm's modules over both."""

# B batch, R packed rows, N tokens, Q queries of a pool, D width, h heads, d width of a head, q k queries and keys

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

ALIGNED = 32  # numbers in bf16 of one AVX-512 register
LEAST_FLEX_WIDTH = 16  # of a head: the compiled kernel refuses narrower ones


def attend(q_Bhqd: Tensor, k_Bhkd: Tensor, v_Bhkd: Tensor, mask: Tensor | BlockMask | None, *, fused: bool) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) v, [B, h, q, d].

    Args:
        q_Bhqd: queries.
        k_Bhkd: keys.
        v_Bhkd: values.
        mask: bool, true where a query may look, broadcasts to [B, h, q, k], and every query may look at something; or
            what `image_blocks` made; None lets all look at all.
        fused: through torch's fused kernel; the matrices multiplied out are about twice as fast in bf16 on a CPU.
    """
    if isinstance(mask, BlockMask):
        return _flex(q_Bhqd)(q_Bhqd, k_Bhkd, v_Bhkd, block_mask=mask)
    if fused:
        return F.scaled_dot_product_attention(q_Bhqd, k_Bhkd, v_Bhkd, attn_mask=mask)
    num_keys, spare = k_Bhkd.shape[-2], _spare_keys(k_Bhkd)
    if spare:
        k_Bhkd, v_Bhkd = (F.pad(x, (0, 0, 0, spare)) for x in (k_Bhkd, v_Bhkd))
    scores = q_Bhqd * q_Bhqd.shape[-1] ** -0.5 @ k_Bhkd.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~F.pad(mask, (0, spare)), float("-inf"))
    elif spare:
        scores[..., num_keys:] = float("-inf")
    return scores.softmax(dim=-1) @ v_Bhkd


def _spare_keys(k: Tensor) -> int:
    """How many keys to add so that a softmax in bf16 on a CPU has whole vectors: what is left over takes as long."""
    return -k.shape[-2] % ALIGNED if k.device.type == "cpu" and k.dtype == torch.bfloat16 else 0


def _flex(q: Tensor) -> Callable[..., Any]:
    if torch.compiler.is_compiling() or not q.is_cuda:  # a graph of the whole step compiles it with the rest
        return flex_attention
    return _compiled_flex()


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)  # uncompiled it would write all scores down


def image_blocks(owner_RN: Tensor, *, flex: bool) -> Tensor | BlockMask:
    """Returns the mask with which tokens look at those of the same image only, for every layer of a forward pass.

    Padding looks at padding, so that no query is left without a key.

    Args:
        owner_RN: number of the image in its row, integer; -1 where padded.
        flex: as a `BlockMask` of flex attention, which skips the blocks in which no two tokens share an image; else as
            a bool tensor [R, 1, N, N].
    """
    if not flex:
        return (owner_RN[:, :, None] == owner_RN[:, None, :])[:, None]

    def same_image(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owner_RN[row, query] == owner_RN[row, key]

    rows, length = owner_RN.shape
    return create_block_mask(same_image, rows, None, length, length, device=owner_RN.device)


def slot_mask(owner_RN: Tensor, slots: int) -> Tensor:
    """Returns the mask with which the query of each slot looks at its own image, bool [R, 1, slots, N].

    A slot without image looks at the whole row: a query without keys would be NaN, and its gradient too.

    Args:
        owner_RN: number of the image in its row, integer; -1 where padded.
        slots: images that a row has room for.
    """
    own = owner_RN[:, None, None, :] == torch.arange(slots, device=owner_RN.device)[:, None]
    return own | ~own.any(dim=-1, keepdim=True)


class SelfAttention(Attention):
    """timm's attention, without its dropout and norms, under any mask that `attend` takes."""

    def forward(self, x: Tensor, attn_mask: Tensor | BlockMask | None = None, is_causal: bool = False) -> Tensor:
        """Returns [B, N, D]; `is_causal` is what timm's block hands on, and never true here."""
        assert not is_causal
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(_joined(attend(q, k, v, attn_mask, fused=self.fused_attn)))
        return out

    def takes_blocks(self, x: Tensor) -> bool:
        """Says whether flex attention runs where `x` lies: on a GPU, unless the matrices are multiplied out."""
        return x.is_cuda and self.fused_attn and self.head_dim >= LEAST_FLEX_WIDTH


class MAPHead(AttentionPoolLatent):
    """timm's attention pool, with as many copies of its query in a row as the row has images."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Returns one vector per row, [B, D].

        Args:
            x: tokens [B, N, D].
            attn_mask: bool [B, 1, 1, N], false at padding; None where nothing is.
        """
        return self.each(x, attn_mask, count=1)[:, 0]

    def each(self, x_RND: Tensor, mask: Tensor | None, *, count: int) -> Tensor:
        """Returns `count` vectors per row, [R, Q, D].

        Args:
            x_RND: tokens.
            mask: bool [R, 1, Q, N], which tokens each of them reads; None for all.
            count: Q.
        """
        q = self.q(self.latent.expand(x_RND.shape[0], count, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x_RND).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(_joined(attend(q, k, v, mask, fused=self.fused_attn)))
        assert isinstance(self.mlp, nn.Module)  # None only for a pool that stops before its projection
        out: Tensor = x + self.mlp(self.norm(x))
        return out


def _joined(x_BhNd: Tensor) -> Tensor:
    return x_BhNd.transpose(1, 2).flatten(2)  # -> [B, N, D]
