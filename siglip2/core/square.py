"""Images squashed to a square, whatever their aspect ratio, as patches of one grid."""

# N patches, P patch values, H W pixels

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify

FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def square_patches(image: Tensor, side: int, patch_size: int, *, filter: str, antialias: bool) -> Patches:
    """Returns an image [3, H, W] uint8 squashed to a square (SigLIP 2, section 2.1), as patches [1, N, P] uint8.

    Args:
        image: of any size.
        side: of the square, in pixels; those beyond the last whole patch are dropped.
        patch_size: side of a patch, in pixels.
        filter: of the resize, a key of `FILTERS`.
        antialias: whether the resize is antialiased.
    """
    square = resize(image, [side, side], interpolation=FILTERS[filter], antialias=antialias)
    grid = (side // patch_size, side // patch_size)
    return Patches(patchify(square, patch_size)[None], grid_coords(*grid)[None], None, grid)
