"""The grid of an image within a budget is the published one, and its pixels fill that grid and nothing else."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from siglip2.core.functional import grid_coords, unpatchify
from siglip2.core.native import native_grid, native_patches, padded

# (height, width), patch size, budget -> pixels of the target
PUBLISHED = [  # of big_vision's own test
    ((48, 48), 3, 121, (33, 33)),
    ((112, 109), 7, 225, (105, 105)),
    ((176, 176), 11, 64, (88, 88)),
    ((256, 64), 16, 12, (96, 32)),
    ((256, 64), 8, 15, (56, 16)),
    ((63, 241), 16, 16, (32, 128)),
    ((16, 512), 16, 16, (16, 256)),
]
COMPUTED = [  # with big_vision's function
    ((2853, 1000), 16, 1024, (848, 304)),
    ((1000, 2853), 16, 1024, (304, 848)),
    ((10, 10), 16, 1024, (512, 512)),
]
RATIOS = [(1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1)]  # width : height
GRIDS = {  # budget -> grids of these at patch 16
    128: ["11x11", "9x12", "9x14", "8x15", "8x16", "6x18"],
    256: ["16x16", "14x18", "13x19", "12x21", "11x22", "9x27"],
    576: ["24x24", "21x27", "19x29", "18x32", "17x33", "14x41"],
    784: ["28x28", "24x32", "23x34", "21x37", "20x39", "16x48"],
    1024: ["32x32", "27x36", "26x39", "24x42", "22x44", "18x54"],
}


def image(height, width, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("size", "patch_size", "budget", "target"), PUBLISHED + COMPUTED)
def test_target_is_the_published_one(size, patch_size, budget, target):
    rows, columns = native_grid(*size, patch_size=patch_size, max_patches=budget)
    assert (rows * patch_size, columns * patch_size) == target


@pytest.mark.parametrize("budget", GRIDS)
def test_common_aspect_ratios_have_the_published_grids(budget):
    sizes = [(720 * height, 720 * width) for width, height in RATIOS]
    found = [native_grid(*size, patch_size=16, max_patches=budget) for size in sizes]
    assert [f"{rows}x{columns}" for rows, columns in found] == GRIDS[budget]


def largest_grid(height, width, *, patch_size, max_patches):
    """The closed form in exact fractions: the best scale lies where one of the sides is a whole number of patches.

    Returns the grid, and whether no larger scale is feasible within `slack` of it: else a bisection may stop short.
    """
    scales = {Fraction(k * patch_size, side) for k in range(1, max_patches + 1) for side in (height, width)}
    grids = {s: (math.ceil(s * height / patch_size), math.ceil(s * width / patch_size)) for s in scales if s <= 100}
    fits = sorted(s for s, grid in grids.items() if math.prod(grid) <= max_patches)
    sure = len(fits) < 2 or fits[-1] - fits[-2] > Fraction(2, 100_000)
    return grids[fits[-1]], sure


def test_bisection_finds_the_closed_form():
    rng = np.random.default_rng(0)
    compared = 0
    for height, width in rng.integers(20, 3000, size=(200, 2)).tolist():
        for patch_size, budget in ((16, 128), (14, 256)):
            expected, sure = largest_grid(height, width, patch_size=patch_size, max_patches=budget)
            if sure:
                assert native_grid(height, width, patch_size=patch_size, max_patches=budget) == expected
                compared += 1
    assert compared > 350


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 200), (1, 200)),  # any larger, and a second row of 201 would not fit
        ((200, 1), (200, 1)),
        ((100, 20_000), (1, 200)),
        ((100, 40_000), (1, 256)),
        ((1, 100_000), (1, 256)),
        ((1, 1), (7, 7)),  # the largest scale of 100 is 100 px: 7 patches
        ((1, 2), (7, 13)),
        ((256, 256), (16, 16)),
        ((257, 255), (16, 16)),
    ],
)
def test_extreme_sides_keep_at_least_one_patch_and_the_budget(size, grid):
    assert native_grid(*size, patch_size=16, max_patches=256) == grid


def test_budget_of_one_patch_is_one_patch():
    assert native_grid(37, 5000, patch_size=16, max_patches=1) == (1, 1)


def test_turned_image_has_the_turned_grid():
    for height, width in np.random.default_rng(1).integers(1, 2000, size=(100, 2)).tolist():
        rows, columns = native_grid(height, width, patch_size=16, max_patches=576)
        assert native_grid(width, height, patch_size=16, max_patches=576) == (columns, rows)


@pytest.mark.parametrize(
    ("size", "max_scale", "grid"),
    [
        ((100, 100), 1.0, (7, 7)),  # 6.25 patches, rounded up
        ((96, 32), 1.0, (6, 2)),
        ((96, 32), 2.0, (12, 4)),
        ((10, 10), 1.0, (1, 1)),
        ((1, 1), 1000.0, (7, 7)),  # the published bound of 100 stays
        ((1000, 500), 1.0, (22, 11)),  # made smaller anyway
        ((1000, 500), None, (22, 11)),
        ((1000, 500), 0.1, (7, 4)),
    ],
)
def test_images_are_not_enlarged_beyond_the_largest_scale(size, max_scale, grid):
    assert native_grid(*size, patch_size=16, max_patches=256, max_scale=max_scale) == grid


def test_patches_are_the_pixels_resized_to_the_grid_in_row_major_order():
    found = native_patches(image(50, 90), (3, 5), 8)
    assert found.patches.shape == (1, 15, 192)
    assert found.patches.dtype == torch.uint8
    exact = interpolate(image(50, 90)[None].double(), (24, 40), mode="bilinear", antialias=True, align_corners=False)
    assert (unpatchify(found.patches, (3, 5)).double() - exact).abs().max() <= 1  # rounded once along each axis
    assert torch.equal(found.coords, grid_coords(3, 5)[None])
    assert found.sizes.tolist() == [[[3, 5]]]
    assert found.valid is None
    assert found.grid is None


def test_image_of_the_right_size_keeps_its_pixels():
    found = native_patches(image(32, 48), (2, 3), 16)
    assert torch.equal(unpatchify(found.patches, (2, 3))[0], image(32, 48))


def test_padding_is_marked_and_nothing_else_changes():
    plain = native_patches(image(50, 90), (3, 5), 8)
    found = padded(plain, 20)
    assert torch.equal(found.patches[:, :15], plain.patches)
    assert torch.equal(found.coords[:, :15], plain.coords)
    assert found.valid.tolist() == [[True] * 15 + [False] * 5]
    assert found.patches[:, 15:].eq(0).all()
    assert found.coords[:, 15:].eq(0).all()
    assert (found.patches.dtype, found.coords.dtype) == (torch.uint8, torch.int16)
    assert torch.equal(found.sizes, plain.sizes)


def test_full_image_is_padded_by_nothing_but_has_a_mask_like_the_others_of_its_batch():
    found = padded(native_patches(image(50, 90), (3, 5), 8), 15)
    assert found.patches.shape == (1, 15, 192)
    assert found.valid.all()
