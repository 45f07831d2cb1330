"""The decoder of CapPa: a transformer that writes text while looking at the tokens of an image."""

# B images, C sequences per image, R = C * B sequences (copies-major), T tokens, N image tokens, D width, V vocabulary,
# h heads, d width of a head

from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from siglip2.core.model.attention import attend
from siglip2.core.model.blocks import LayerNorm, key_mask, lecun_normal_, normal_table
from siglip2.core.model.sizes import Shape

START = 0  # pad id of the published vocabulary, which stands in front of every sequence

Norm = partial(LayerNorm, bias=False)


class Cache(NamedTuple):
    """Keys and values of one block while it writes token by token: of the text so far, and of the image."""

    keys_BhTd: Tensor
    values_BhTd: Tensor
    image_BhNd: tuple[Tensor, Tensor]


def _dense(width_in: int, width_out: int) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    lecun_normal_(linear)
    linear.bias = None  # type: ignore[assignment]  # attention has no biases here
    return linear


class SelfAttention(nn.Module):
    """Attention among the tokens of one sequence, without biases."""

    def __init__(self, shape: Shape, *, fused: bool):
        super().__init__()
        self.num_heads, self.fused = shape.num_heads, fused
        self.qkv = _dense(shape.width, 3 * shape.width)
        self.proj = _dense(shape.width, shape.width)

    def forward(self, x_RTD: Tensor, mask: Tensor) -> Tensor:
        return self._joined(attend(*self._project(x_RTD), mask, fused=self.fused))

    def step(self, x_B1D: Tensor, cache: Cache, position: int) -> Tensor:
        """Returns what the token at `position` reads from those up to it, and puts its key and value into the cache."""
        q, k, v = self._project(x_B1D)
        cache.keys_BhTd[:, :, position] = k[:, :, 0]
        cache.values_BhTd[:, :, position] = v[:, :, 0]
        seen = slice(position + 1)
        return self._joined(
            attend(q, cache.keys_BhTd[:, :, seen], cache.values_BhTd[:, :, seen], None, fused=self.fused)
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (_split(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return q, k, v

    def _joined(self, x_RhTd: Tensor) -> Tensor:
        out: Tensor = self.proj(x_RhTd.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention from tokens of text to those of the image, without biases.

    All C sequences of an image read the same keys and values, so these are made once and the sequences' tokens are
    joined into one long row of queries.
    """

    def __init__(self, shape: Shape, *, memory_width: int, fused: bool):
        super().__init__()
        self.num_heads, self.fused = shape.num_heads, fused
        self.q = _dense(shape.width, shape.width)
        self.kv = _dense(memory_width, 2 * shape.width)
        self.proj = _dense(shape.width, shape.width)

    def read(self, memory_BNM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the image tokens, each [B, h, N, d]."""
        k, v = (_split(part, self.num_heads) for part in self.kv(memory_BNM).chunk(2, dim=-1))
        return k, v

    def forward(self, x_RTD: Tensor, image: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        num_images, length = image[0].shape[0], x_RTD.shape[1]
        q = self.q(x_RTD).unflatten(0, (-1, num_images)).transpose(0, 1).flatten(1, 2)  # [C * B, T, D] -> [B, C * T, D]
        seen = attend(_split(q, self.num_heads), *image, mask, fused=self.fused)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out.unflatten(1, (-1, length)).transpose(0, 1).flatten(0, 1)  # [B, C * T, D] -> [C * B, T, D]


def _split(x_RTD: Tensor, num_heads: int) -> Tensor:
    return x_RTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [R, T, D] -> [R, h, T, d]


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each after a norm and beside a residual; none of them has biases."""

    def __init__(self, shape: Shape, *, memory_width: int, fused: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = Norm(shape.width), Norm(shape.width), Norm(shape.width)
        self.self_attn = SelfAttention(shape, fused=fused)
        self.cross_attn = CrossAttention(shape, memory_width=memory_width, fused=fused)
        self.mlp = Mlp(shape.width, shape.mlp_dim, act_layer=GELUTanh, bias=False)
        for linear in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)

    def forward(self, x: Tensor, memory_BNM: Tensor, *, mask: Tensor, image_mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), mask)
        return self._look(x, self.cross_attn.read(memory_BNM), image_mask)

    def step(self, x_B1D: Tensor, cache: Cache, *, position: int, image_mask: Tensor | None) -> Tensor:
        """Returns what `forward` gives at one position, once the positions before it are in the cache."""
        x = x_B1D + self.self_attn.step(self.norm1(x_B1D), cache, position)
        return self._look(x, cache.image_BhNd, image_mask)

    def _look(self, x: Tensor, image: tuple[Tensor, Tensor], image_mask: Tensor | None) -> Tensor:
        x = x + self.cross_attn(self.norm2(x), image, image_mask)
        out: Tensor = x + self.mlp(self.norm3(x))
        return out


class Decoder(nn.Module):
    """Text decoder with cross-attention to un-pooled image tokens.

    Source: google-research/big_vision, models/proj/cappa/cappa.py, with decoder_bias=False as in its pretrain config;
    in SigLIP 2 (section 2.2) it has the shape of the text tower and half its layers.

    Args:
        shape: width, depth, MLP width, heads.
        vocab_size: V; the token table has one row more, the mask token of parallel prediction.
        length: T, rows of the position table.
        memory_width: width of the image tokens.
        fused_attention: attention through torch's fused kernel.
    """

    def __init__(self, shape: Shape, *, vocab_size: int, length: int, memory_width: int, fused_attention: bool = True):
        super().__init__()
        self.length, self.mask_id = length, vocab_size
        self.token_embed = nn.Embedding(vocab_size + 1, shape.width)  # N(0, 1), torch's default and CapPa's
        self.pos_embed = normal_table(length, shape.width)
        make = partial(DecoderBlock, shape, memory_width=memory_width, fused=fused_attention)
        self.blocks: Any = nn.ModuleList(make() for _ in range(shape.depth))
        self.norm = LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, vocab_size)
        nn.init.zeros_(self.out.weight)  # so that training begins at log V
        nn.init.zeros_(self.out.bias)

    def forward(
        self, inputs_RT: Tensor, memory_BNM: Tensor, *, parallel_R: Tensor, valid_BN: Tensor | None = None
    ) -> Tensor:
        """Returns the normed tokens [R, T, D] from which `out` makes logits.

        Args:
            inputs_RT: token ids, integer in [0, V], copies-major: row c * B + i reads image i; T may be less than
                `length`, for the beginning of sequences.
            memory_BNM: image tokens [B, N, memory_width].
            parallel_R: bool, true where every token sees the whole sequence, false where only itself and those before.
            valid_BN: bool, false where an image token is padding; None where none is.
        """
        length = inputs_RT.shape[1]
        x = self.token_embed(inputs_RT) + self.pos_embed[:length]  # [R, T] -> [R, T, D]
        mask, image_mask = attention_mask(parallel_R, length), key_mask(valid_BN)
        for block in self.blocks:
            x = block(x, memory_BNM, mask=mask, image_mask=image_mask)
        out: Tensor = self.norm(x)
        return out

    def start(self, memory_BNM: Tensor) -> list[Cache]:
        """Returns an empty cache for each block, with the keys and values of the images."""
        caches = []
        for block in self.blocks:
            k, v = block.cross_attn.read(memory_BNM)
            batch_size, num_heads, _, width = k.shape
            written = k.new_zeros(2, batch_size, num_heads, self.length, width)
            caches.append(Cache(written[0], written[1], (k, v)))
        return caches

    def step(self, inputs_B: Tensor, caches: list[Cache], *, position: int, valid_BN: Tensor | None = None) -> Tensor:
        """Returns the logits [B, V] of the next token, when `inputs_B` is the input at `position`."""
        x = (self.token_embed(inputs_B) + self.pos_embed[position])[:, None]  # [B] -> [B, 1, D]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, cache, position=position, image_mask=key_mask(valid_BN))
        logits: Tensor = self.out(self.norm(x[:, 0]))
        return logits


def attention_mask(parallel_R: Tensor, length: int) -> Tensor:
    """Returns who may look at whom, bool [R, 1, T, T]: all at all where parallel, else each at itself and before."""
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=parallel_R.device).tril()
    return causal_TT | parallel_R[:, None, None, None]


def decoder_inputs(ids_RT: Tensor, targets_RT: Tensor, parallel_R: Tensor, *, mask_id: int) -> Tensor:
    """Returns what the decoder reads while it predicts `ids_RT`, int64 [R, T].

    Source: big_vision, models/proj/cappa/cappa.py: the sequence moved one to the right behind a 0 or, in parallel,
    the mask token everywhere and nothing moved. A prefix stays readable in parallel too: ours, not published.

    Args:
        ids_RT: the sequences, integer.
        targets_RT: not 0 where a token counts in the loss; what stands before the first such token is the prefix.
        parallel_R: bool.
        mask_id: id of the mask token.
    """
    ids = ids_RT.long()
    moved = F.pad(ids[:, :-1], (1, 0), value=START)
    prefix = (targets_RT != 0).cumsum(dim=1) == 0
    hidden = torch.where(prefix, ids, mask_id)
    return torch.where(parallel_R[:, None], hidden, moved)


def mean_weights(targets_RT: Tensor) -> Tensor:
    """Returns the weight of each token when a loss is its mean over tokens, then over sequences, float32 [R, T].

    A sequence without targets counts as one of loss 0: the divisor is always R, so that a mean over ranks or over
    micro-batches is the mean over all their sequences.

    Args:
        targets_RT: not 0 where a token counts.
    """
    counted = (targets_RT != 0).float()
    return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / counted.shape[0]
