"""The vision tower: patches in, un-pooled tokens and one pooled vector out."""

# B images, R packed rows, S patches of a row, N patches of an image, P patch values, D width

import difflib
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from siglip2.core.batch import Packing, Patches
from siglip2.core.functional import resample_grid, unpatchify
from siglip2.core.model.attention import SelfAttention, image_blocks, slot_mask
from siglip2.core.model.blocks import LayerNorm, key_mask, lecun_normal_, make_blocks, make_pool, normal_table
from siglip2.core.model.sizes import Shape


class VisionOutput(NamedTuple):
    """Tokens [B, N, D] after the final norm, as decoders read them, and their pooled vector [B, D]."""

    tokens: Tensor
    pooled: Tensor


def to_unit_range(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps uint8 pixels to [-1, 1] (mean and std 0.5), computed in float32 and rounded to the weights' `dtype`."""
    return (pixels.float() / 127.5 - 1).to(dtype)


class VisionTower(nn.Module):
    """ViT of SigLIP 2 over `Patches`: no class token, a learned position grid, MAP pooling.

    Source: google-research/big_vision, models/vit.py and models/proj/image_text/naflex_vit.py.

    Args:
        shape: width, depth, MLP width, heads.
        patch_size: side of a patch in pixels.
        grid: (rows, columns) of the position table; other grids are resampled from it (bilinear, antialiased).
    """

    def __init__(self, shape: Shape, *, patch_size: int, grid: tuple[int, int]):
        super().__init__()
        self.width, self.patch_size = shape.width, patch_size
        self.embed = nn.Linear(patch_size * patch_size * 3, shape.width)  # a convolution with kernel = stride
        self.pos_embed = normal_table(*grid, shape.width)
        self.blocks = make_blocks(shape)
        self.norm = LayerNorm(shape.width)
        self.pool = make_pool(shape)
        lecun_normal_(self.embed)

    def forward(
        self,
        images: Patches,
        *,
        masked_BN: Tensor | None = None,
        mask_token_D: Tensor | None = None,
        pool: bool = True,
    ) -> VisionOutput:
        """Encodes uint8 patches [B, N, P], or packed ones [R, S, P]: an image is read alone, wherever it lies.

        Args:
            images: the patches.
            masked_BN: bool, true where the embedded patch is replaced by the mask token; it keeps its position.
            mask_token_D: what stands there instead, [D].
            pool: whether the pooled vector is wanted; else it is empty, and the pool does not run.

        Returns:
            Tokens and pooled vectors of the B images. Packed images have N = `images.packing.longest` tokens, and where
            `images.token_mask` is false an image's last token stands once more.

        Raises:
            ValueError: if patches of packed images are to be masked.
        """
        packing = images.packing
        if packing is not None and masked_BN is not None:
            raise ValueError("patches cannot be masked where images share rows: use a patchifier that does not pack")
        x = self.embed(to_unit_range(images.patches, self.pos_embed.dtype))  # [B, N, P] -> [B, N, D]
        if masked_BN is not None and mask_token_D is not None:
            x = torch.where(masked_BN[..., None], mask_token_D.to(x.dtype), x)
        x = x + self._positions(images)
        mask = key_mask(images.valid) if packing is None else image_blocks(packing.owner, flex=self._takes_blocks(x))
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        x = self.norm(x)
        if not pool and packing is None:
            return VisionOutput(x, x.new_empty(0))
        if packing is None:
            return VisionOutput(x, self.pool(x, key_mask(images.valid)))
        pooled_RQD = self.pool.each(x, slot_mask(packing.owner, packing.slots), count=packing.slots)
        return unpacked(x, pooled_RQD, packing)

    def _takes_blocks(self, x: Tensor) -> bool:
        return all(m.takes_blocks(x) for m in self.blocks.modules() if isinstance(m, SelfAttention))

    def _positions(self, images: Patches) -> Tensor:
        rows, columns, _ = self.pos_embed.shape
        if images.grid == (rows, columns):  # the table's own grid, row-major: nothing to resample
            return self.pos_embed.flatten(0, 1)
        if images.grid is not None:
            return resample_grid(self.pos_embed, images.coords, grid=images.grid)
        if images.sizes is None:
            raise ValueError("images without a common `grid` need the `sizes` of their own")
        return resample_grid(self.pos_embed, images.coords, grid=(images.sizes[..., 0], images.sizes[..., 1]))


def unpacked(tokens_RSD: Tensor, pooled_RQD: Tensor, packing: Packing) -> VisionOutput:
    """Returns the tokens [B, N, D] and the vector [B, D] of each image, taken out of the rows it lies in.

    Args:
        tokens_RSD: of all rows.
        pooled_RQD: of the Q slots of all rows, those without image included.
        packing: where the images are; N is its `longest`.
    """
    places = torch.arange(packing.longest, device=packing.length.device)
    # behind the end of an image its last token: whatever reads too far reads no neighbour
    index_BN = packing.start[:, None] + torch.minimum(places, packing.length[:, None] - 1)
    tokens = tokens_RSD.flatten(0, 1).index_select(0, index_BN.flatten()).unflatten(0, index_BN.shape)
    row = torch.div(packing.start, packing.owner.shape[1], rounding_mode="floor")
    slot = packing.owner.flatten().index_select(0, packing.start)
    pooled = pooled_RQD.flatten(0, 1).index_select(0, row * packing.slots + slot)
    return VisionOutput(tokens, pooled)


class TimmVisionTower(nn.Module):
    """Any timm vision transformer as the vision tower, for fixed square grids.

    Args:
        name: timm model name, for example `vit_small_patch16_224`; its head is dropped, its own pooling kept.
        grid: (rows, columns) of patches that the patchifier makes.
        patch_size: side of a patch in pixels.

    Raises:
        ValueError: if timm has no such model, or it does not give one token [D] per patch.
    """

    def __init__(self, name: str, *, patch_size: int, grid: tuple[int, int]):
        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models("vit_*"), n=1, cutoff=0.5)
            hint = f", did you mean '{close[0]}'?" if close else "."
            raise ValueError(f"timm has no model called '{name}'{hint} See timm.list_models('*vit*').")
        size = (grid[0] * patch_size, grid[1] * patch_size)
        try:
            trunk = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
        except TypeError as error:
            raise ValueError(f"timm's '{name}' takes no img_size, so it is not a ViT: choose a vit_* model") from error
        self.trunk = cast(Any, trunk)  # what timm's vision transformers have in common has no type of its own
        self.width, self.patch_size = int(self.trunk.num_features), patch_size
        self._check_tokens(name, grid, size)

    @torch.no_grad()
    def _check_tokens(self, name: str, grid: tuple[int, int], size: tuple[int, int]) -> None:
        self.trunk.eval()  # neither dropout nor running statistics
        found = tuple(self.trunk.forward_features(torch.zeros(1, 3, *size)).shape[1:])
        self.trunk.train()
        prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        expected = (grid[0] * grid[1] + prefix, self.width)
        if found != expected:
            raise ValueError(
                f"timm's '{name}' makes tokens of shape {found} from {size[0]} x {size[1]} px, expected {expected}: "
                f"one per patch of {self.patch_size} px. Choose a vit_* model with that patch size, or set patch_size."
            )

    def forward(self, images: Patches) -> VisionOutput:
        """Encodes uint8 patches [B, N, P] of one full grid."""
        if images.grid is None:
            raise ValueError(
                "a timm vision tower needs whole images: use a patchifier of one fixed grid or drop `model.timm`"
            )
        pixels = to_unit_range(
            unpatchify(images.patches, images.grid), next(self.trunk.parameters()).dtype
        )  # [B, N, P] -> [B, 3, H, W]
        tokens = self.trunk.forward_features(pixels)
        prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        return VisionOutput(tokens[:, prefix:], self.trunk.forward_head(tokens, pre_logits=True))
