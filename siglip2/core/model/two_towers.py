"""The product: image and text encoders that share one embedding space."""

# B batch, N patches, T text tokens, D width, E embedding dimension

import math
from typing import NamedTuple

import torch
from timm.layers import Attention, AttentionPoolLatent
from torch import Tensor, nn

from siglip2.core.batch import Patches
from siglip2.core.functional import pair_logits
from siglip2.core.model.sizes import ShapeOptions, size_named
from siglip2.core.model.text import TextTower
from siglip2.core.model.vision import TimmVisionTower, VisionTower


class ImageFeatures(NamedTuple):
    """Tokens [B, N, D], pooled vector [B, D], unit-norm embedding [B, E], and valid [B, N] bool or None."""

    tokens: Tensor
    pooled: Tensor
    embedding: Tensor
    valid: Tensor | None


class TextFeatures(NamedTuple):
    """Tokens [B, T, D], pooled vector [B, D], unit-norm embedding [B, E]."""

    tokens: Tensor
    pooled: Tensor
    embedding: Tensor


def unit_norm(x: Tensor) -> Tensor:
    """Returns x / (|x| + 1e-8) over the last dimension, in float32.

    Source: google-research/big_vision, models/proj/image_text/two_towers.py.
    """
    x = x.float()
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


class TwoTowers(nn.Module):
    """A vision tower and a text tower with a learned temperature and bias.

    Args:
        vision: gives tokens and the pooled vector, which is the image embedding before its norm.
        text: gives the projected text embedding.
        logit_scale: initial log of the temperature factor; log 10 in the paper (SigLIP, section 3.2).
        logit_bias: initial logit bias; -10 in the paper, for batches of 32 768.
        fused_attention: attention through torch's fused kernel; false multiplies the matrices out. Decoders follow it.
    """

    def __init__(
        self,
        vision: VisionTower | TimmVisionTower,
        text: TextTower,
        *,
        logit_scale: float = math.log(10),
        logit_bias: float = -10.0,
        fused_attention: bool = True,
    ):
        super().__init__()
        self.vision, self.text, self.fused_attention = vision, text, fused_attention
        for module in self.modules():
            if isinstance(module, Attention | AttentionPoolLatent):
                module.fused_attn = fused_attention  # type: ignore[misc]  # Final in timm for TorchScript only
        self.logit_scale = nn.Parameter(torch.tensor([float(logit_scale)]))  # [1]: FSDP2 cannot shard 0-D
        self.logit_bias = nn.Parameter(torch.tensor([float(logit_bias)]))

    @property
    def embed_dim(self) -> int:
        """E, the dimension of the shared embedding space."""
        return self.vision.width

    def encode_image(self, images: Patches) -> ImageFeatures:
        """Encodes uint8 patches [B, N, P]."""
        return image_features(self.vision, images)

    def encode_text(self, ids: Tensor) -> TextFeatures:
        """Encodes token ids, integer [B, T]."""
        tokens, pooled, projected = self.text(ids)
        return TextFeatures(tokens, pooled, unit_norm(projected))

    def logits(self, z_image: Tensor, z_text: Tensor) -> Tensor:
        """Returns the logits of all pairs of unit-norm embeddings, [B images, B' texts] float32."""
        return pair_logits(z_image, z_text, scale=self.logit_scale, bias=self.logit_bias)


def image_features(vision: nn.Module, images: Patches) -> ImageFeatures:
    """Returns what a vision tower (the student's, a teacher's) makes of images."""
    tokens, pooled = vision(images)
    return ImageFeatures(tokens, pooled, unit_norm(pooled), images.token_mask)


def build_two_towers(
    size: str,
    *,
    patch_size: int,
    grid: tuple[int, int],
    vocab_size: int,
    context_length: int,
    vision: ShapeOptions = ShapeOptions(),  # noqa: B008 - frozen
    text: ShapeOptions = ShapeOptions(),  # noqa: B008 - frozen
    timm_name: str | None = None,
    logit_scale: float = math.log(10),
    logit_bias: float = -10.0,
    fused_attention: bool = True,
) -> TwoTowers:
    """Builds freshly initialised towers of a named size.

    Args:
        size: name of the size, for example `B/16`.
        patch_size: side of a patch that the recipe's patchifier makes, in pixels.
        grid: (rows, columns) of the position table.
        vocab_size: rows of the token table.
        context_length: tokens of every text.
        vision: changes to the vision tower's shape.
        text: changes to the text tower's shape.
        timm_name: a timm ViT to use as the vision tower instead.
        logit_scale: initial log temperature factor.
        logit_bias: initial logit bias.
        fused_attention: attention through torch's fused kernel; false multiplies the matrices out.

    Raises:
        ValueError: if the size is unknown, or its patch size is not the patchifier's.
    """
    named = size_named(size)
    if named.patch_size != patch_size and timm_name is None:
        raise ValueError(
            f"model size '{size}' has patches of {named.patch_size} px, the recipe's patchifier makes {patch_size} px: "
            f"set its patch_size to {named.patch_size} or choose another size"
        )
    tower: VisionTower | TimmVisionTower
    if timm_name is None:
        tower = VisionTower(vision.applied_to(named.vision), patch_size=patch_size, grid=grid)
    else:
        tower = TimmVisionTower(timm_name, patch_size=patch_size, grid=grid)
    text_tower = TextTower(
        text.applied_to(named.text), vocab_size=vocab_size, context_length=context_length, embed_dim=tower.width
    )
    return TwoTowers(tower, text_tower, logit_scale=logit_scale, logit_bias=logit_bias, fused_attention=fused_attention)
