"""`fixed` and `naflex` make the pixels of other libraries: the same ones where both resize with torchvision."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq
from torch.nn.functional import interpolate
from transformers import (
    Siglip2ImageProcessor,
    Siglip2ImageProcessorPil,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
)
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from siglip2.core.functional import unpatchify
from siglip2.core.layout import Layout
from siglip2.core.model.vision import to_unit_range
from siglip2.core.native import native_grid
from siglip2.core.views import IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex

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


def photos():
    rng = np.random.default_rng(1)
    for height, width in SIZES:
        image = photo(rng, height, width)
        yield image, torch.from_numpy(image).permute(2, 0, 1)


def squashed(patchifier, pixels):
    """What the vision tower sees of an image, [1, 3, H, W] in [-1, 1]."""
    patches = patchifier(pixels, IMAGE, patchifier.layout(0))
    return to_unit_range(unpatchify(patches.patches, patchifier.grid))


@pytest.mark.parametrize(
    ("options", "resample", "processor", "levels"),
    [
        ({}, "bilinear", SiglipImageProcessor, 0),  # torchvision as well: the same numbers
        ({"protocol": "transformers"}, "bilinear", SiglipImageProcessor, 0),
        ({"protocol": "transformers", "filter": "bicubic"}, "bicubic", SiglipImageProcessor, 0),
        ({"protocol": "open_clip"}, "bicubic", SiglipImageProcessor, 0),
        ({}, "bilinear", SiglipImageProcessorPil, 1),  # both round to uint8 twice, with other weights
    ],
)
def test_fixed_pixels_are_those_of_the_siglip_image_processor(options, resample, processor, levels):
    patchifier = Fixed(image_size=224, patch_size=14, **options).patchifier()
    theirs = processor(size={"height": 224, "width": 224}, resample=RESAMPLE[resample])
    for image, pixels in photos():
        expected = theirs(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        assert (squashed(patchifier, pixels) - expected).abs().max() < GREY_LEVEL * (levels + 0.01), image.shape


def test_open_clip_protocol_makes_the_pixels_of_open_clip():
    patchifier = Fixed(image_size=224, patch_size=16, protocol="open_clip").patchifier()
    half = (0.5, 0.5, 0.5)
    theirs = open_clip.image_transform(
        224, is_train=False, mean=half, std=half, resize_mode="squash", interpolation="bicubic"
    )
    for image, pixels in photos():
        difference = (squashed(patchifier, pixels)[0] - theirs(Image.fromarray(image))).abs() / GREY_LEVEL
        # PIL and torch both round after each axis, not always in the same order; bicubic weights are partly negative
        assert difference.max() < 3.01, image.shape
        assert difference.mean() < 0.3, image.shape  # bilinear: 0.9 to 1.3


def test_big_vision_protocol_is_a_plain_bilinear_resize():
    patchifier = Fixed(image_size=224, patch_size=32, protocol="big_vision").patchifier()
    for image, pixels in photos():
        floats = pixels[None].float()
        exact = interpolate(floats, (224, 224), mode="bilinear", align_corners=False, antialias=False) / 127.5 - 1
        assert (squashed(patchifier, pixels) - exact).abs().max() < GREY_LEVEL, image.shape


@pytest.mark.parametrize(("patch_size", "budget"), [(16, 64), (16, 256), (14, 576), (16, 1024), (32, 100)])
def test_grids_are_those_of_transformers_and_timm(patch_size, budget):
    for height, width in np.random.default_rng(2).integers(1, 3000, size=(500, 2)).tolist():
        grid = native_grid(height, width, patch_size=patch_size, max_patches=budget)
        found = grid[0] * patch_size, grid[1] * patch_size
        assert found == get_image_size_for_max_num_patches(height, width, patch_size, budget), (height, width)
        assert found == get_image_size_for_seq((height, width), patch_size, budget)[1], (height, width)


def test_largest_scale_is_timms_where_it_binds_and_else_changes_nothing():
    for height, width in np.random.default_rng(3).integers(1, 700, size=(500, 2)).tolist():
        grid = native_grid(height, width, patch_size=16, max_patches=256, max_scale=1.0)
        expected = get_image_size_for_seq((height, width), 16, 256, max_ratio=1.0)[1]
        assert (grid[0] * 16, grid[1] * 16) == expected, (height, width)


@pytest.mark.parametrize(("processor", "levels"), [(Siglip2ImageProcessor, 0), (Siglip2ImageProcessorPil, 1)])
@pytest.mark.parametrize("budget", [128, 256, 1024])
def test_naflex_patches_are_those_of_the_siglip2_image_processor(processor, levels, budget):
    patchifier = NaFlex(eval_seq_len=budget).patchifier()
    theirs = processor(patch_size=16, max_num_patches=budget)
    for image, pixels in photos():
        found = patchifier(pixels, IMAGE, patchifier.eval_layout(1))
        expected = theirs(Image.fromarray(image), return_tensors="pt")
        assert torch.equal(found.valid.int(), expected["pixel_attention_mask"]), image.shape
        assert found.sizes[:, 0].tolist() == expected["spatial_shapes"].tolist(), image.shape
        difference = (to_unit_range(found.patches) - expected["pixel_values"])[found.valid]
        assert difference.abs().max() < GREY_LEVEL * (levels + 0.01), image.shape


def test_square_image_of_a_square_budget_has_the_same_patches_in_fixed_and_naflex():
    fixed, naflex = Fixed().patchifier(), NaFlex().patchifier()
    pixels = torch.from_numpy(photo(np.random.default_rng(4), 300, 300)).permute(2, 0, 1)
    squash, native = fixed(pixels, IMAGE, Layout(256, 1)), naflex(pixels, IMAGE, Layout(256, 1))
    assert torch.equal(squash.patches, native.patches)
    assert torch.equal(squash.coords, native.coords)
