"""Mask views: exact counts on any grid, both patterns, and nothing but the context's random numbers."""

import pickle
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch

from siglip2.core.masks import MASK, MaskView, block_mask, num_masked, random_mask
from siglip2.core.views import Context
from siglip2.testing.tiny import PATCHIFIER, TinySource, tiny_tokenizer

GRIDS = [(16, 16), (14, 14), (2, 2), (1, 2), (1, 9), (7, 3), (27, 27)]
PATTERNS = ["random", "block"]
SAMPLE = TinySource().read(0)


@dataclass(frozen=True)
class Grid:
    """Of a patchifier only what masks look at."""

    grid: tuple[int, int]
    patch_size: int = 16


def make(view, grid=(16, 16), position=0):
    context = Context((0, position, 7), Grid(grid), PATCHIFIER.layout(0), tiny_tokenizer())
    return view(SAMPLE, context)


def as_grid(mask_1M, grid):
    cells = np.zeros(grid, dtype=bool)
    cells.flat[mask_1M[0].numpy()] = True
    return cells


def masked_neighbours(view, grid, draws):
    """Mean number of masked patches above, below, left and right of a masked one."""
    total = 0.0
    for position in range(draws):
        cells = np.pad(as_grid(make(view, grid, position), grid), 1)
        around = np.roll(cells, 1, 0).astype(int) + np.roll(cells, -1, 0) + np.roll(cells, 1, 1) + np.roll(cells, -1, 1)
        total += around[cells].mean()
    return total / draws


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_mask_has_the_same_exact_number_of_distinct_patches(grid, ratio, pattern):
    view, num_patches = MaskView(ratio=ratio, pattern=pattern), grid[0] * grid[1]
    expected = min(max(round(ratio * num_patches), 1), num_patches - 1)
    for position in range(15):
        mask = make(view, grid, position)
        assert mask.shape == (1, expected)
        assert mask.dtype == torch.int32
        assert 0 <= mask.min() <= mask.max() < num_patches
        assert (mask.diff() > 0).all()  # sorted, none twice


def test_default_masks_half_of_256_patches_at_random():
    assert (MASK.name, MASK.copies, MASK.ratio, MASK.pattern) == ("mask", 1, 0.5, "random")
    assert make(MASK).shape == (1, 128)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_depend_on_the_position_and_on_nothing_else(pattern):
    view = MaskView(pattern=pattern, copies=2)
    first = make(view)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, make(view))
    assert first.shape == (2, 128)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, make(view, position=1))


def test_random_mask_hides_every_patch_equally_often():
    rng, draws = np.random.default_rng(0), 4000
    counts = np.bincount(np.concatenate([random_mask(rng, (4, 4), 8) for _ in range(draws)]), minlength=16)
    assert abs(counts / draws - 0.5).max() < 5 * 0.5 / draws**0.5  # five standard deviations


def test_random_mask_hides_neighbours_no_more_often_than_chance():
    grid, share = (16, 16), 127 / 255
    expected = share * (4 * 14 * 14 + 3 * 4 * 14 + 2 * 4) / 256
    assert masked_neighbours(MASK, grid, 100) == pytest.approx(expected, abs=0.05)


def test_block_mask_is_more_clustered_than_a_random_one():
    assert masked_neighbours(MaskView(pattern="block"), (16, 16), 50) > 2.7
    assert masked_neighbours(MASK, (16, 16), 50) < 2.0


def test_block_mask_prefers_no_side_of_the_grid():
    rng, draws = np.random.default_rng(0), 300
    hidden = np.bincount(np.concatenate([block_mask(rng, (16, 16), 128) for _ in range(draws)])).reshape(16, 16) / draws
    margins = [hidden[:4].mean(), hidden[-4:].mean(), hidden[:, :4].mean(), hidden[:, -4:].mean()]
    assert max(margins) - min(margins) < 0.06


def test_block_mask_can_hide_every_patch():
    seen = sum(as_grid(make(MaskView(pattern="block"), (6, 6), i), (6, 6)).astype(int) for i in range(100))
    assert seen.min() > 0


def test_grid_of_one_patch_is_refused():
    with pytest.raises(ValueError, match="1 x 1 cannot be masked in part: expected at least 2 patches"):
        make(MASK, (1, 1))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5])
def test_ratio_outside_of_zero_and_one_is_an_error(ratio):
    with pytest.raises(ValueError, match=f"mask ratio is {ratio}, expected a share between 0 and 1"):
        MaskView(ratio=ratio)


@pytest.mark.parametrize(("pattern", "hint"), [("blocks", "did you mean 'block'"), ("x", "one of random, block")])
def test_unknown_pattern_names_those_that_exist(pattern, hint):
    with pytest.raises(ValueError, match=f"no mask pattern called '{pattern}'.*{hint}"):
        MaskView(pattern=pattern)


def test_no_copies_are_an_error():
    with pytest.raises(ValueError, match="copies is 0, expected at least 1"):
        MaskView(copies=0)


def test_number_of_masked_patches_leaves_some_masked_and_some_not():
    assert [num_masked(ratio, (2, 2)) for ratio in (0.01, 0.5, 0.99)] == [1, 2, 3]


def test_view_is_frozen_and_travels_to_a_worker():
    assert pickle.loads(pickle.dumps(MASK)) == MASK
    with pytest.raises(FrozenInstanceError):
        MASK.ratio = 0.4
