"""Small random weights as every format is tested with."""

import pytest
import torch

from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.testing import tiny_tokenizer


@pytest.fixture
def make_weights():
    """Builds weights of towers that differ in everything that may differ, every parameter off its start."""

    def make(*, native=False, patch_size=16, dtype=torch.float32, text_width=32):
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        model = build_two_towers(
            "tiny/16" if patch_size == 16 else "So400m/14",
            patch_size=patch_size,
            grid=(4, 4),
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.contract.length,
            vision=ShapeOptions(width=48, depth=3, mlp_dim=82, num_heads=4),
            text=ShapeOptions(width=text_width, depth=2, mlp_dim=56, num_heads=2),
            logit_bias=-2.0,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases at 0 would hide a wrong mapping
        squares = square_pixels(4 * patch_size + 6, patch_size, filter="bilinear")  # six pixels beyond the last patch
        return assemble(
            "siglip2",
            {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()},
            place="test",
            heads={"vision": 4, "text": 2},
            native=native,
            pixels=native_pixels(patch_size, 4) if native else squares,
            tokenizer=tokenizer,
        )

    return make


@pytest.fixture(params=[False, True], ids=["fixed", "naflex"])
def weights(request, make_weights):
    """Small random weights of either kind."""
    return make_weights(native=request.param)
