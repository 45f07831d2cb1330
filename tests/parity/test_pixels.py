"""`fixed` makes the pixels of transformers' SigLIP image processors, on torchvision and on PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipImageProcessorPil

from siglip2.core.functional import unpatchify
from siglip2.core.model.vision import to_unit_range
from siglip2.core.views import IMAGE
from siglip2.plugins.fixed import Fixed

pytestmark = pytest.mark.parity

GREY_LEVEL = 2 / 255  # on [-1, 1]
SIZES = np.random.default_rng(0).integers(20, 500, size=(20, 2)).tolist()
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photo(rng, height, width):
    """Smooth colours with a hard edge and some noise: an image that a wrong filter would show on."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * rng.uniform(0.02, 0.3) + y * rng.uniform(0.02, 0.3)) for _ in range(3)]
    image = 127 + 80 * np.stack(waves, axis=-1) + 40 * (x > y)[..., None] + rng.normal(0, 8, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("filter", "processor", "levels"),
    [
        ("bilinear", SiglipImageProcessor, 0),  # torchvision as well: the same numbers
        ("bicubic", SiglipImageProcessor, 0),
        ("bilinear", SiglipImageProcessorPil, 1),  # both round to uint8 twice, with other weights
    ],
)
def test_fixed_pixels_are_those_of_the_siglip_image_processor(filter, processor, levels):
    patchifier = Fixed(image_size=224, patch_size=14, filter=filter).patchifier()
    theirs = processor(size={"height": 224, "width": 224}, resample=RESAMPLE[filter])
    rng = np.random.default_rng(1)
    for height, width in SIZES:
        image = photo(rng, height, width)
        patches = patchifier(torch.from_numpy(image).permute(2, 0, 1), IMAGE, patchifier.layout(0))
        found = to_unit_range(unpatchify(patches.patches, patchifier.grid))
        expected = theirs(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        assert (found - expected).abs().max() < GREY_LEVEL * (levels + 0.01), (height, width)
