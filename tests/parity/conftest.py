"""Random towers and inputs that the libraries are compared on."""

import pytest
import torch

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import TwoTowers, build_two_towers

GRID = (4, 4)


@pytest.fixture
def make_towers():
    """Builds towers of 48 (vision) and `text_width` channels, three blocks each, every parameter off its start."""

    def make(text_width: int = 48) -> TwoTowers:
        torch.manual_seed(0)
        model = build_two_towers(
            "tiny/16",
            patch_size=16,
            grid=GRID,
            vocab_size=60,
            context_length=10,
            vision=ShapeOptions(width=48, depth=3, mlp_dim=80, num_heads=4),
            text=ShapeOptions(width=text_width, depth=3, mlp_dim=56, num_heads=2),
            logit_bias=-2.0,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases at 0 would hide a wrong mapping
        return model.eval()

    return make


@pytest.fixture
def pixels():
    """Six images [6, 3, 64, 64] uint8."""
    return torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def images(pixels):
    """The same images as patches."""
    return Patches(patchify(pixels, 16), grid_coords(*GRID)[None], None, GRID)


@pytest.fixture
def ids():
    """Six texts of ten ids, half of them padded with 0."""
    ids = torch.randint(2, 60, (6, 10), generator=torch.Generator().manual_seed(2))
    ids[::2, 4:] = 0
    return ids
