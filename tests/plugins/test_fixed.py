"""`fixed` squashes every image to one square grid, and says so in its contract."""

import pickle

import pytest
import torch

from siglip2.core.functional import grid_coords, patchify
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Layout
from siglip2.core.views import IMAGE
from siglip2.plugins.fixed import Fixed


def patchifier_of(**options):
    return build_manager([Fixed(**options)]).hook.patchifier()


def image(height, width):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 200), (500, 17), (1, 1)])
def test_images_of_any_shape_become_the_same_square_grid(height, width):
    patchifier = patchifier_of(image_size=64, patch_size=16, batch_size=8)
    patches = patchifier(image(height, width), IMAGE, patchifier.layout(0))
    assert patches.patches.shape == (1, 16, 16 * 16 * 3)
    assert patches.patches.dtype == torch.uint8
    assert torch.equal(patches.coords, grid_coords(4, 4)[None])
    assert patches.valid is None
    assert patches.grid == (4, 4)


def test_an_image_of_the_right_size_keeps_its_pixels():
    patchifier = patchifier_of(image_size=32, patch_size=8)
    patches = patchifier(image(32, 32), IMAGE, patchifier.layout(0))
    assert torch.equal(patches.patches[0], patchify(image(32, 32), 8))


def test_the_whole_image_is_squashed_and_nothing_cropped():
    wide = torch.zeros(3, 8, 32, dtype=torch.uint8)
    wide[..., 16:] = 255  # right half white
    patchifier = patchifier_of(image_size=16, patch_size=8)
    left, right = patchifier(wide, IMAGE, patchifier.layout(0)).patches[0, :2].float().mean(-1)
    assert left < 20
    assert right > 235


def test_384_pixels_at_patch_14_have_a_grid_of_27():
    patchifier = patchifier_of(image_size=384, patch_size=14)
    assert patchifier.grid == (27, 27)
    assert patchifier.layout(0).seq_len == 729
    assert patchifier(image(40, 60), IMAGE, patchifier.layout(0)).patches.shape == (1, 729, 14 * 14 * 3)


def test_antialias_averages_what_a_plain_bilinear_resize_skips():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::8] = 255  # one column in eight: 32 of 255 on average
    smooth, skipping = (
        patchifier_of(image_size=8, patch_size=8, antialias=antialias)(stripes, IMAGE, Layout(1, 1)).patches.float()
        for antialias in (True, False)
    )
    assert smooth.mean().item() == pytest.approx(255 / 8, abs=6)  # the border columns see fewer stripes
    assert skipping.mean().item() == 0


def test_filters_are_told_apart():
    bilinear, bicubic = (
        patchifier_of(image_size=16, patch_size=16, filter=filter)(image(40, 50), IMAGE, Layout(1, 1)).patches
        for filter in ("bilinear", "bicubic")
    )
    assert not torch.equal(bilinear, bicubic)


@pytest.mark.parametrize(
    ("options", "filter", "antialias"),
    [
        ({}, "bilinear", True),
        ({"protocol": "transformers"}, "bilinear", True),
        ({"protocol": "big_vision"}, "bilinear", False),
        ({"protocol": "open_clip"}, "bicubic", True),
        ({"protocol": "open_clip", "filter": "bilinear"}, "bilinear", True),
        ({"protocol": "open_clip", "antialias": False}, "bicubic", False),
        ({"protocol": "big_vision", "filter": "bicubic", "antialias": True}, "bicubic", True),
        ({"filter": "bicubic", "antialias": False}, "bicubic", False),
    ],
)
def test_protocol_names_filter_and_antialias_and_either_overrides_it(options, filter, antialias):
    contract = patchifier_of(**options).contract()
    assert (contract["filter"], contract["antialias"]) == (filter, antialias)
    assert "protocol" not in contract  # the same pixels by another name are the same pixels


@pytest.mark.parametrize(
    ("image_size", "patch_size", "side"), [(224, 14, 16), (384, 14, 27), (256, 16, 16), (100, 16, 6), (224, 32, 7)]
)
def test_any_size_and_patch_have_as_many_patches_as_fit_whole(image_size, patch_size, side):
    patchifier = patchifier_of(image_size=image_size, patch_size=patch_size)
    found = patchifier(image(50, 90), IMAGE, patchifier.layout(0))
    assert found.grid == patchifier.grid == (side, side)
    assert found.patches.shape == (1, side * side, patch_size * patch_size * 3)


def test_every_batch_has_the_same_layout_on_every_rank():
    patchifier = patchifier_of(image_size=256, patch_size=16, batch_size=96)
    elsewhere = pickle.loads(pickle.dumps(patchifier))
    layouts = {p.layout(index) for p in (patchifier, elsewhere) for index in (0, 1, 10**9, 0)}
    assert layouts == {Layout(seq_len=256, batch_size=96)}


def test_the_same_image_gives_the_same_patches_whatever_the_view_or_the_random_state():
    patchifier = patchifier_of(image_size=32, patch_size=16)
    first = patchifier(image(50, 70), IMAGE, patchifier.layout(0))
    state = torch.random.get_rng_state()
    second = patchifier(image(50, 70), IMAGE, patchifier.layout(7))
    assert torch.equal(first.patches, second.patches)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_contract_names_everything_that_decides_the_pixels():
    patchifier = patchifier_of(image_size=224, patch_size=14, batch_size=512, filter="bicubic", antialias=False)
    assert patchifier.contract() == {
        "patchifier": "fixed",
        "image_size": 224,
        "patch_size": 14,
        "filter": "bicubic",
        "antialias": False,
        "mean": 0.5,
        "std": 0.5,
    }


def test_defaults_are_the_papers():
    patchifier = patchifier_of()
    assert patchifier.layout(0) == Layout(seq_len=256, batch_size=32768)
    assert patchifier.contract()["filter"] == "bilinear"
    assert patchifier.contract()["antialias"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "fixed: expected 0 < patch_size <= image_size .* found image_size=256, patch_size=0"),
        ({"patch_size": 16, "image_size": 8}, "found image_size=8, patch_size=16"),
        ({"image_size": -256}, "found image_size=-256"),
        ({"batch_size": 0}, "batch_size >= 1, found .* batch_size=0"),
        ({"filter": "lanczos"}, "fixed: no resize filter called 'lanczos', expected one of bilinear, bicubic"),
        (
            {"protocol": "bigvision"},
            "fixed: no protocol called 'bigvision', did you mean 'big_vision'\\? expected one of transformers, "
            "big_vision, open_clip",
        ),
        ({"protocol": "jpeg"}, "fixed: no protocol called 'jpeg', expected one of transformers, big_vision, open_clip"),
        ({"start": 0.5, "stop": 0.5}, "plugin 'fixed': expected 0 <= start < stop <= 1, .* found start=0.5, stop=0.5"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        Fixed(**options)
