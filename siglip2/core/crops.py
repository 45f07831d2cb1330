"""Views of crops: random parts of the picture, resized, flipped and changed in colour, all copies at once."""

# C copies, N patches, P patch values

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from siglip2.core.augment import DINO_GLOBAL, DINO_LOCAL, Photometric, augment, draw
from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify
from siglip2.core.views import Context

if TYPE_CHECKING:
    from siglip2.core.data.fields import Sample

RATIO = (3 / 4, 4 / 3)  # width / height of a crop, torchvision's RandomResizedCrop
TRIES = 10  # as there


def draw_boxes(
    rng: np.random.Generator, copies: int, *, height: int, width: int, scale: tuple[float, float]
) -> NDArray[np.int64]:
    """Draws where to crop, as torchvision's RandomResizedCrop does: area uniform, aspect ratio log-uniform.

    A copy for which none of ten draws fits into the picture gets the largest centred crop with an aspect ratio in
    3/4 to 4/3, whatever its area.

    Args:
        rng: random numbers; as many are taken for any picture.
        copies: how many boxes.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        scale: smallest and largest share of the picture's area. (1, 1) is the whole picture, of any aspect ratio.

    Returns:
        (top, left, height, width) in pixels, int64 [copies, 4].
    """
    area = height * width * rng.uniform(scale[0], scale[1], (copies, TRIES))
    ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (copies, TRIES)))
    corner = rng.random((copies, 2))
    if scale[0] == 1:
        return np.tile((0, 0, height, width), (copies, 1))
    picture = np.array((height, width))
    tried = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1).round().astype(np.int64)
    fits: NDArray[np.bool_] = np.all((tried > 0) & (tried <= picture), axis=-1)  # [copies, TRIES]
    found = fits.any(axis=1, keepdims=True)
    sizes = np.where(found, tried[np.arange(copies), fits.argmax(axis=1)], _largest(height, width))
    room = picture - sizes
    corners = np.where(found, corner * (room + 1), room // 2).astype(np.int64)
    return np.concatenate([corners, sizes], axis=1)


def _largest(height: int, width: int) -> tuple[int, int]:
    """Returns (height, width) of the largest part of a picture with an aspect ratio in `RATIO`; at least 1 x 1."""
    narrow, broad = RATIO
    return min(height, max(1, round(width / narrow))), min(width, max(1, round(height * broad)))


@dataclass(frozen=True)
class CropView:
    """Random crops of the image: patches [C, N, P] uint8, all of one square size.

    Args:
        name: the key under which the step finds it.
        copies: crops per sample, C.
        scale: smallest and largest share of the picture's area; (1, 1) takes the whole picture.
        size: side of a crop in pixels; None follows the recipe's patchifier. Pixels beyond the last whole patch are
            dropped.
        share: with size None, side of a crop as a share of the patchifier's full grid, to the nearest whole patch.
        flip: probability that a copy is mirrored left to right.
        photometric: how colours are changed.

    Raises:
        ValueError: if there are no copies, not 0 < scale[0] <= scale[1] <= 1, or `flip` is no probability; when
            called, if `size` is smaller than a patch. The same if not 0 < share <= 1.
    """

    name: str
    copies: int
    scale: tuple[float, float]
    size: int | None = None
    share: float = 1.0
    flip: float = 0.5
    photometric: Photometric = DINO_GLOBAL

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # a list, as YAML has it, cannot be hashed
        if self.copies < 1:
            raise ValueError(f"view '{self.name}': copies is {self.copies}, expected at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"view '{self.name}': scale is {self.scale}, expected 0 < smallest <= largest <= 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"view '{self.name}': share is {self.share}, expected a share of the side in (0, 1]")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"view '{self.name}': flip is {self.flip}, expected a probability in [0, 1]")

    def __call__(self, sample: "Sample", context: Context) -> Patches:
        patch_size = context.patchifier.patch_size
        grid = self._grid(patch_size, context.patchifier.grid)
        whole = (grid[0] * patch_size, grid[1] * patch_size)
        size = whole if self.size is None else (self.size, self.size)
        crops = augment(self._crop(sample.image(), size, context.rng), draw(context.rng, self.copies, self.photometric))
        return Patches(patchify(crops, patch_size), grid_coords(*grid)[None], None, grid)

    def _grid(self, patch_size: int, full: tuple[int, int]) -> tuple[int, int]:
        if self.size is None:
            rows, columns = (max(1, round(side * self.share)) for side in full)
            return rows, columns
        if self.size < patch_size:
            raise ValueError(
                f"view '{self.name}': crops of {self.size} pixels hold no patch of {patch_size}; expected a size of at "
                f"least {patch_size}, a multiple of it if no pixel should be dropped"
            )
        return self.size // patch_size, self.size // patch_size

    def _crop(self, image: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
        """Returns geometrically changed copies of an image [3, H, W] uint8: [C, 3, *size] uint8."""
        boxes = draw_boxes(rng, self.copies, height=image.shape[1], width=image.shape[2], scale=self.scale)
        crops = torch.stack(
            [
                resized_crop(image, *box, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
                for box in boxes.tolist()
            ]
        )
        flipped = torch.from_numpy(rng.random(self.copies) < self.flip)
        return torch.where(flipped[:, None, None, None], crops.flip(-1), crops)


# One global and eight local crops with these areas: SILC, https://arxiv.org/abs/2310.13355, which has DINO's defaults.
# SigLIP 2 has one global view and does not say whether it is cropped; scale=(1.0, 1.0) is the other reading.
GLOBAL = CropView("global", 1, (0.4, 1.0))
# 96 of 256 pixels: DINO's size, at the image size of SigLIP 2, which does not publish its own.
LOCAL = CropView("local", 8, (0.05, 0.4), share=0.375, photometric=DINO_LOCAL)
