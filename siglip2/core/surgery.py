"""Weights of one image or patch size made into those of another: position tables and patch embeddings."""

# R rows, C columns, D width, P patch values (row, column, channel; channel fastest), p q patch sizes

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.core.functional import grid_coords, resample_grid

CHANNELS = 3
FILTERS = ("bilinear", "bicubic")


def resize_positions(table_RCD: Tensor, grid: tuple[int, int], *, corners: bool = False) -> Tensor:
    """Returns a position table resized to another grid.

    Args:
        table_RCD: learned positions, [R, C, D].
        grid: (rows, columns) of the new table.
        corners: whether corner cells stay corner cells, as in `resample_posemb` of google-research/big_vision,
            models/vit.py, for fixed resolutions; else bilinear and antialiased, as the tower resamples its table.

    Returns:
        [rows, columns, D] in the dtype of the table, calculated in float32; the table itself where it has that grid.
    """
    if table_RCD.shape[:2] == grid:
        return table_RCD
    coords = grid_coords(*grid).to(table_RCD.device)
    return resample_grid(table_RCD, coords, grid=grid, corners=corners).unflatten(0, grid)


def resize_kernel(weight_DP: Tensor, patch_size: int, *, filter: str = "bilinear", antialias: bool = False) -> Tensor:
    """Returns the weight of a patch embedding for another patch size, by PI-resize.

    With R the linear map that resizes a patch x, the new weight w' minimises E (<x, w> - <R x, w'>)^2 over white noise
    x: w' = pinv(R^T) w, for each channel and each output feature. Enlarging (q >= p) is exact: <R x, w'> = <x, w> for
    every x. Shrinking is the best there is, and loses: chained resizes do not lead back. The bias stays as it is.

    Source: FlexiViT, https://arxiv.org/abs/2212.08013, section 3.4; google-research/big_vision,
    models/proj/flexi/vit.py, whose R is bilinear and not antialiased, hence the defaults.

    Args:
        weight_DP: [D, p * p * 3] of the Linear over flattened patches.
        patch_size: q, the side of the new patches in pixels.
        filter: bilinear or bicubic, by which patches are thought to be resized.
        antialias: whether that resize is antialiased; matters where patches shrink.

    Returns:
        [D, q * q * 3] in the dtype of the weight, calculated in float64; the weight itself where its patches have that
        size.

    Raises:
        ValueError: if P is not 3 p^2 for a whole p, the patch size is not positive, or the filter is unknown.
    """
    values = weight_DP.shape[1]
    side = round((values / CHANNELS) ** 0.5)
    if side * side * CHANNELS != values:
        raise ValueError(f"expected the weight of a patch embedding, [D, p * p * 3], found {list(weight_DP.shape)}")
    if patch_size < 1:
        raise ValueError(f"expected a patch size of at least 1, found {patch_size}")
    if filter not in FILTERS:
        raise ValueError(f"no resize filter called '{filter}', expected one of {', '.join(FILTERS)}")
    if side == patch_size:
        return weight_DP
    resize_qp = _resize_axis(side, patch_size, filter=filter, antialias=antialias)
    inverse_qp = torch.linalg.pinv(resize_qp.T).to(weight_DP.device)
    # R resizes rows, then columns: the Kronecker product of a matrix with itself, and so is its pseudo-inverse
    kernel = weight_DP.double().unflatten(1, (side, side, CHANNELS))
    resized = torch.einsum("yr,xs,drsc->dyxc", inverse_qp, inverse_qp, kernel)
    return resized.flatten(1).to(weight_DP.dtype)


def _resize_axis(source: int, size: int, *, filter: str, antialias: bool) -> Tensor:
    """The linear map of torch's resize along one axis, [size, source] float64: the basis vectors, resized."""
    basis = torch.eye(source, dtype=torch.float64)[:, None, None]  # rows of pixels: [source, 1, 1, source]
    return F.interpolate(basis, size=(1, size), mode=filter, antialias=antialias, align_corners=False)[:, 0, 0].T
