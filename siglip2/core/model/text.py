"""The text tower: token ids in, tokens and one embedding out."""

# B batch, T text tokens, D width, E embedding dimension

from typing import NamedTuple

import torch
from torch import Tensor, nn

from siglip2.core.model.blocks import LayerNorm, lecun_normal_, make_blocks, normal_table
from siglip2.core.model.sizes import Shape


class TextOutput(NamedTuple):
    """Tokens [B, T, D] after the final norm, the vector [B, D] at the last position, and its projection [B, E]."""

    tokens: Tensor
    pooled: Tensor
    projected: Tensor


class TextTower(nn.Module):
    """Bidirectional text transformer without any mask, pooled at its last position whatever token stands there.

    Source: google-research/big_vision, models/proj/image_text/text_transformer.py with pool_type="last".

    Args:
        shape: width, depth, MLP width, heads.
        vocab_size: rows of the token table.
        context_length: tokens of every text, padding included; 64 in SigLIP 2.
        embed_dim: E, the dimension of the shared embedding space.
    """

    def __init__(self, shape: Shape, *, vocab_size: int, context_length: int, embed_dim: int):
        super().__init__()
        self.shape, self.width, self.context_length = shape, shape.width, context_length
        self.token_embed = nn.Embedding(vocab_size, shape.width)
        self.pos_embed = normal_table(context_length, shape.width)
        self.blocks = make_blocks(shape)
        self.norm = LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, embed_dim)
        nn.init.normal_(self.token_embed.weight, std=shape.width**-0.5)
        lecun_normal_(self.head)

    def forward(self, ids_BT: Tensor) -> TextOutput:
        """Encodes token ids, integer [B, T] with T = context_length."""
        if ids_BT.shape[1] != self.context_length:
            raise ValueError(
                f"expected {self.context_length} ids per text, padded on the right, found {ids_BT.shape[1]}: the tower "
                f"pools its last position, so another length is another function"
            )
        x = self.token_embed(ids_BT.to(torch.long)) + self.pos_embed  # [B, T] -> [B, T, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = x[:, -1]  # usually a pad token: attention is unmasked, so it has read the whole caption
        return TextOutput(x, pooled, self.head(pooled))
