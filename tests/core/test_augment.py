"""Photometric augmentation against torchvision, one change at a time, and the odds with which changes are drawn."""

import colorsys
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from siglip2.core.augment import UNCHANGED, Draws, Photometric, augment, draw, gaussian_kernels
from siglip2.core.functional import unpatchify
from siglip2.core.views import IMAGE
from siglip2.testing.tiny import fake_batch

MANY = 20_000


@pytest.fixture(scope="module")
def pictures():
    """Four drawn pictures and four of noise, [8, 3, 32, 32] uint8."""
    drawn = unpatchify(fake_batch([IMAGE]).views["image"].patches, (2, 2))
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.cat([drawn, noise])


def draws(copies=8, **changes):
    """Returns draws that change nothing but what is named."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 0.0}
    return Draws(**{name: np.broadcast_to(float(v), copies) for name, v in (neutral | changes).items()})


def levels_apart(a, b):
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.3, 1.4])
@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
def test_factor_does_what_torchvision_does(pictures, change, factor):
    expected = getattr(tv, f"adjust_{change}")(pictures, factor)
    assert levels_apart(augment(pictures, draws(**{change: factor})), expected) <= 2


def test_result_is_rounded_to_the_nearest_level(pictures):
    exact = np.clip(0.77 * pictures.numpy().astype(np.float64), 0, 255)
    assert abs(augment(pictures, draws(brightness=0.77)).numpy() - exact).max() < 0.501


def test_saturation_of_zero_is_torchvisions_grey(pictures):
    grey = augment(pictures, draws(saturation=0, hue=0.07))
    assert levels_apart(grey, tv.rgb_to_grayscale(pictures, num_output_channels=3)) <= 2
    assert levels_apart(grey[:, 0], grey[:, 1]) == 0


def test_grey_is_taken_after_the_factors(pictures):
    by_torchvision = tv.rgb_to_grayscale(tv.adjust_brightness(pictures, 0.8), num_output_channels=3)
    assert levels_apart(augment(pictures, draws(brightness=0.8, saturation=0)), by_torchvision) <= 2


def test_brightness_contrast_and_saturation_together_do_what_torchvision_does_in_any_order(pictures):
    dim = pictures // 2 + 40  # nothing reaches black or white, where torchvision's order starts to matter
    one = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(dim, 0.9), 0.8), 0.85)
    other = tv.adjust_brightness(tv.adjust_contrast(tv.adjust_saturation(dim, 0.85), 0.8), 0.9)
    ours = augment(dim, draws(brightness=0.9, contrast=0.8, saturation=0.85))
    assert max(levels_apart(ours, one), levels_apart(ours, other)) <= 3  # they round three times, we once


@pytest.mark.parametrize("hue", [-0.1, 0.05, 0.5])
def test_hue_rotates_the_chroma_that_the_standard_library_finds(hue):
    pixels = torch.tensor([[200, 90, 60], [40, 120, 90], [110, 100, 160]], dtype=torch.uint8)
    turned = augment(pixels.T[None, :, None, :].contiguous(), draws(1, hue=hue))[0, :, 0].T
    for before, after in zip(pixels.tolist(), turned.tolist(), strict=True):
        y, i, q = colorsys.rgb_to_yiq(*before)
        chroma = complex(i, q) * np.exp(-2j * np.pi * hue)
        # colorsys cuts off what is not in [0, 1]
        expected = 255 * np.array(colorsys.yiq_to_rgb(y / 255, chroma.real / 255, chroma.imag / 255))
        assert abs(np.array(after) - expected).max() <= 2.5


@pytest.mark.parametrize("hue", [-0.1, 0.1])
def test_hue_turns_red_the_way_torchvision_does(hue):
    red = torch.tensor([180, 80, 80], dtype=torch.uint8).view(1, 3, 1, 1)
    ours, theirs = augment(red, draws(1, hue=hue))[0], tv.adjust_hue(red, hue)[0]
    assert (ours[1] > ours[2]) == (theirs[1] > theirs[2])  # towards yellow, or towards magenta


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.0, 2.0])
def test_blur_does_what_torchvision_does(pictures, sigma):
    reach = int(np.ceil(3 * sigma))
    expected = tv.gaussian_blur(pictures, kernel_size=[2 * reach + 1] * 2, sigma=[sigma, sigma])
    assert levels_apart(augment(pictures, draws(sigma=sigma)), expected) <= 2


def test_each_copy_is_changed_by_its_own_draws(pictures):
    options, rng = Photometric(blur=0.5), np.random.default_rng(0)
    drawn = draw(rng, 8, options)
    together = augment(pictures, drawn)
    for i in range(8):
        alone = augment(pictures[i : i + 1], Draws(*(values[i : i + 1] for values in drawn)))[0]
        assert levels_apart(together[i], alone) <= 1  # the kernel of a lone copy may be shorter
    assert levels_apart(together, pictures) > 40


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (5, 64)])
def test_tiny_pictures_are_augmented_too(size):
    flat = torch.full((2, 3, *size), 100, dtype=torch.uint8)
    assert torch.equal(augment(flat, draws(2, sigma=2.0)), flat)
    assert augment(flat, draws(2, sigma=2.0, brightness=1.4))[0, 0, 0, 0] == 140


def test_blur_of_nothing_leaves_every_bit(pictures):
    mixed = Draws(*draws()[:4], sigma=np.array([0.0, 2.0] * 4))
    assert torch.equal(augment(pictures, mixed)[::2], pictures[::2])
    assert not torch.equal(augment(pictures, mixed)[1::2], pictures[1::2])


def test_unchanged_leaves_every_bit(pictures):
    assert torch.equal(augment(pictures, draw(np.random.default_rng(0), 8, UNCHANGED)), pictures)


def test_kernels_are_gaussians_that_sum_to_one():
    kernels = gaussian_kernels(np.array([0.0, 1.0]), 3)
    expected = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    torch.testing.assert_close(kernels[1], torch.tensor(expected / expected.sum()).float())
    assert kernels[0].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_draws_are_those_of_dino():
    drawn = draw(np.random.default_rng(0), MANY, Photometric())
    jittered = drawn.brightness != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.02)
    assert np.array_equal(jittered, drawn.hue != 0)
    assert (drawn.saturation == 0).mean() == pytest.approx(0.2, abs=0.02)
    for values, middle, reach in [
        (drawn.brightness, 1, 0.4),
        (drawn.contrast, 1, 0.4),
        (drawn.saturation[drawn.saturation > 0], 1, 0.2),
        (drawn.hue, 0, 0.1),
        (drawn.sigma, 1.05, 0.95),
    ]:
        np.testing.assert_allclose((values.min(), values.max()), (middle - reach, middle + reach), atol=0.01)
        assert values.mean() == pytest.approx(middle, abs=0.02)


def test_changes_are_drawn_independently():
    drawn = draw(np.random.default_rng(0), MANY, Photometric(jitter=1, grey=0))
    assert abs(np.corrcoef(np.stack(drawn)) - np.eye(5)).max() < 0.03


def test_whether_a_copy_is_jittered_grey_or_blurred_is_drawn_independently():
    drawn = draw(np.random.default_rng(0), MANY, Photometric(blur=0.5))
    switches = np.stack([drawn.brightness != 1, drawn.saturation == 0, drawn.sigma > 0])
    assert abs(np.corrcoef(switches) - np.eye(3)).max() < 0.03


def test_blur_is_drawn_for_its_share_of_the_copies():
    drawn = draw(np.random.default_rng(0), MANY, Photometric(blur=0.5))
    assert (drawn.sigma > 0).mean() == pytest.approx(0.5, abs=0.02)


def test_switching_one_change_off_leaves_the_others_as_they_were():
    full = draw(np.random.default_rng(0), 100, Photometric())
    dull = draw(np.random.default_rng(0), 100, Photometric(grey=0, blur=0))
    assert np.array_equal(full.brightness, dull.brightness)
    assert np.array_equal(full.hue, dull.hue)


@pytest.mark.parametrize("options", [{"jitter": 1.2}, {"blur": -0.1}, {"hue": 2.0}, {"contrast": -1.0}])
def test_option_outside_of_zero_and_one_is_an_error(options):
    with pytest.raises(ValueError, match=f"photometric: {next(iter(options))} is .*, expected a number in"):
        Photometric(**options)


@pytest.mark.parametrize("sigma", [(0.0, 1.0), (2.0, 1.0)])
def test_blur_without_a_range_is_an_error(sigma):
    with pytest.raises(ValueError, match="expected 0 < smallest <= largest, in pixels"):
        Photometric(sigma=sigma)


def test_draws_for_other_copies_are_an_error(pictures):
    with pytest.raises(ValueError, match="expected draws for 8 images, found 3"):
        augment(pictures, draws(3))


def test_options_travel_to_a_worker():
    assert pickle.loads(pickle.dumps(Photometric(blur=0.5))) == Photometric(blur=0.5)
