"""Towers small enough to read, and images for them."""

import pytest
import torch

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import TwoTowers, build_two_towers


@pytest.fixture
def towers() -> TwoTowers:
    """Two-block towers: 32 wide, patches of 16 px on a 4 x 4 grid, 8 tokens of 50; every parameter random."""
    torch.manual_seed(0)
    narrow = ShapeOptions(width=32, mlp_dim=48, num_heads=4)
    model = build_two_towers(
        "tiny/16", patch_size=16, grid=(4, 4), vocab_size=50, context_length=8, vision=narrow, text=narrow
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases at 0 would hide mistakes
    return model.eval()


@pytest.fixture
def images():
    """Makes images of one whole grid; `images(rows, columns)`."""

    def make(rows=4, columns=4, *, batch_size=3, seed=0) -> Patches:
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randint(0, 256, (batch_size, rows * columns, 768), generator=generator, dtype=torch.uint8)
        return Patches(patches, grid_coords(rows, columns)[None], None, (rows, columns))

    return make
