"""Views of masks: which patches of the full grid are hidden from the student."""

# C copies, N patches of the grid, M masked patches

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip2.core.views import Context

if TYPE_CHECKING:
    from siglip2.core.data.fields import Sample

MIN_BLOCK = 4  # patches, the default of the mask generators of BEiT and DINOv2
BLOCK_RATIO = (0.3, 1 / 0.3)  # height / width of a block; BEiT, https://arxiv.org/abs/2106.08254, algorithm 1


def num_masked(ratio: float, grid: tuple[int, int]) -> int:
    """Returns M, the number of masked patches: the nearest to ratio * N that leaves some masked and some not.

    Raises:
        ValueError: if the grid has fewer than two patches.
    """
    num_patches = grid[0] * grid[1]
    if num_patches < 2:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} cannot be masked in part: expected at least 2 patches")
    return min(max(round(ratio * num_patches), 1), num_patches - 1)


def random_mask(rng: np.random.Generator, grid: tuple[int, int], count: int) -> NDArray[np.int64]:
    """Draws `count` patches of a grid, each set of them equally likely; returns sorted indices."""
    return np.sort(rng.permutation(grid[0] * grid[1])[:count])


def block_mask(rng: np.random.Generator, grid: tuple[int, int], count: int) -> NDArray[np.int64]:
    """Draws rectangles until exactly `count` patches of a grid lie in one; returns sorted indices.

    Source: BEiT, https://arxiv.org/abs/2106.08254, algorithm 1: areas uniform from 4 patches to those that are
    missing, aspect ratios log-uniform in 0.3 to 1 / 0.3. There the position is uniform and the count approximate. Here
    each rectangle covers a patch drawn among those that are still seen, so each adds one and the loop ends on any
    grid; what leaves the grid is cut off; and the last one loses its lower end, so that the count is exact.
    """
    masked = np.zeros(grid, dtype=bool)
    while missing := count - int(masked.sum()):
        inside = np.zeros(grid, dtype=bool)
        inside[_rectangle(rng, rng.choice(np.argwhere(~masked)), max(missing, MIN_BLOCK))] = True
        new = np.flatnonzero(inside & ~masked)[:missing]
        masked.flat[new] = True
    return np.flatnonzero(masked)


def _rectangle(rng: np.random.Generator, patch: NDArray[np.int64], max_area: int) -> tuple[slice, slice]:
    """Draws a rectangle of 4 to `max_area` patches that covers `patch` (row, column); it may leave the grid."""
    area, ratio = rng.uniform(MIN_BLOCK, max_area), math.exp(rng.uniform(*np.log(BLOCK_RATIO)))
    sides = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
    first = [int(at - rng.integers(side)) for at, side in zip(patch, sides, strict=True)]
    rows, columns = (slice(max(a, 0), a + side) for a, side in zip(first, sides, strict=True))
    return rows, columns


PATTERNS: dict[str, Callable[[np.random.Generator, tuple[int, int], int], NDArray[np.int64]]] = {
    "random": random_mask,
    "block": block_mask,
}


@dataclass(frozen=True)
class MaskView:
    """Which patches of the patchifier's full grid are masked: sorted indices, int32 [C, M].

    Args:
        name: the key under which the step finds it.
        copies: masks per sample, C.
        ratio: share of the patches that is masked, in (0, 1); M = round(ratio * N), but at least 1 and at most N - 1.
        pattern: `random` (any patch is as likely as another) or `block` (rectangles).

    Raises:
        ValueError: if there are no copies, the ratio is outside (0, 1), or there is no such pattern; when called, if
            the grid has fewer than two patches.
    """

    name: str = "mask"
    copies: int = 1
    ratio: float = 0.5
    pattern: str = "random"

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"view '{self.name}': copies is {self.copies}, expected at least 1")
        if not 0 < self.ratio < 1:
            raise ValueError(f"view '{self.name}': mask ratio is {self.ratio}, expected a share between 0 and 1")
        if self.pattern not in PATTERNS:
            close = get_close_matches(self.pattern, PATTERNS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(PATTERNS)}"
            raise ValueError(f"view '{self.name}': no mask pattern called '{self.pattern}', {hint}")

    def __call__(self, sample: "Sample", context: Context) -> Tensor:
        grid = context.patchifier.grid
        count = num_masked(self.ratio, grid)
        masks = [PATTERNS[self.pattern](context.rng, grid, count) for _ in range(self.copies)]
        return torch.from_numpy(np.stack(masks).astype(np.int32))


MASK = MaskView()
