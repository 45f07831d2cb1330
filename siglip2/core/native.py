"""Images at their own aspect ratio: the largest grid within a number of patches, and the pixels that fill it."""

# N patches, P patch values, H W pixels

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify

TOLERANCE = 1e-5  # of the scale; with the bounds below as in the published search
LARGEST_SCALE = 100.0


def native_grid(
    height: int, width: int, *, patch_size: int, max_patches: int, max_scale: float | None = None
) -> tuple[int, int]:
    """Returns the (rows, columns) of the largest image of about the same aspect ratio within `max_patches`.

    The largest scale s for which ceil(s H / p) ceil(s W / p) <= max_patches, with at least one patch on each side,
    found by bisection.

    Source: google-research/big_vision, pp/proj/image_text/ops_naflex.py (SigLIP 2, section 2.4.2); the same bounds and
    tolerance, so the same grids.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch_size: side of a patch, in pixels.
        max_patches: the budget, at least 1.
        max_scale: images are not enlarged beyond this factor, then rounded up to whole patches; None enlarges small
            ones until the budget is full (up to 100 times), as published.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(scale * side / patch_size)) for side in (height, width))
        return rows, columns

    low, high = TOLERANCE / 10, LARGEST_SCALE
    while high - low >= TOLERANCE:
        scale = (low + high) / 2
        if math.prod(grid(scale)) <= max_patches:
            low = scale
        else:
            high = scale
    return grid(low if max_scale is None else min(low, max_scale))


def native_patches(image: Tensor, grid: tuple[int, int], patch_size: int) -> Patches:
    """Returns an image [3, H, W] uint8 resized to a grid (bilinear, antialiased) as unpadded patches [1, N, P] uint8.

    The resize rounds to whole grey levels, as transformers' image processor does.
    """
    size = [grid[0] * patch_size, grid[1] * patch_size]
    resized = resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    sizes = torch.tensor(grid, dtype=torch.int16).reshape(1, 1, 2)
    return Patches(patchify(resized, patch_size)[None], grid_coords(*grid)[None], sizes=sizes)


def padded(images: Patches, seq_len: int) -> Patches:
    """Returns unpadded patches [1, n, P] filled up with zeros to [1, seq_len, P], and `valid`.

    Padding has the coordinates (0, 0), as in big_vision and transformers; what it holds is never read.
    """
    count = images.patches.shape[1]
    missing = seq_len - count
    return Patches(
        pad(images.patches, (0, 0, 0, missing)),
        pad(images.coords, (0, 0, 0, missing)),
        (torch.arange(seq_len) < count)[None],
        sizes=images.sizes,
    )
