"""Weights of another image or patch size do as nearly as can be what the old ones did."""

# D width, P patch values, C channels, p q patch sizes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed

from siglip2.core.functional import patchify
from siglip2.core.surgery import resize_kernel, resize_positions

GRIDS = [(24, 24), (7, 9), (32, 16), (1, 5), (64, 3)]
SIZES = [(16, 32), (8, 16), (16, 14), (14, 16), (16, 5)]
RESIZES = [("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True)]


def table(rows, columns, width=6, *, dtype=torch.float32):
    return torch.rand(rows, columns, width, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


def weight(patch_size, width=4, *, seed=1):
    """A random kernel [D, P] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, patch_size**2 * 3, generator=generator, dtype=torch.float64)


def resized(patches_BP, patch_size, **how):
    """Flattened patches, each resized by torch as an image of its own."""
    side = round((patches_BP.shape[1] / 3) ** 0.5)
    images = patches_BP.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    return F.interpolate(images, size=(patch_size, patch_size), **how).permute(0, 2, 3, 1).flatten(1)


def smooth(patch_size, count, *, seed):
    """Patches [count, P] in float64 with little but low frequencies: 4 x 4 random values, enlarged bicubically."""
    return resized(weight(4, count, seed=seed), patch_size, mode="bicubic")


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_resized_as_torch_does(grid):
    old = table(16, 12)
    image = old.double().permute(2, 0, 1)[None]
    expected = F.interpolate(image, size=grid, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(resize_positions(old, grid).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_resized_with_their_corners_kept(grid):
    old = table(16, 12)
    image = old.double().permute(2, 0, 1)[None]
    expected = F.interpolate(image, size=grid, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(resize_positions(old, grid, corners=True).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_resized_as_scipy_does_for_the_older_checkpoints(grid):
    """google-research/big_vision, models/vit.py, resample_posemb."""
    ndimage = pytest.importorskip("scipy.ndimage")
    old = table(16, 12)
    zoom = [new / size for new, size in zip((*grid, 6), old.shape, strict=True)]
    expected = ndimage.zoom(old.double().numpy(), zoom, order=1)
    np.testing.assert_allclose(resize_positions(old, grid, corners=True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("corners", [False, True])
def test_positions_of_the_same_grid_stay_bit_for_bit(dtype, corners):
    old = table(5, 7, dtype=dtype)
    assert resize_positions(old, (5, 7), corners=corners) is old


def test_positions_keep_their_dtype_and_are_calculated_in_float32():
    old = table(4, 4, dtype=torch.bfloat16)
    new = resize_positions(old, (6, 5))
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, resize_positions(old.float(), (6, 5)).bfloat16())


@pytest.mark.parametrize(("filter", "antialias"), RESIZES)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_kernel_is_timms_in_float64(old, new, filter, antialias, monkeypatch):
    monkeypatch.setattr("timm.layers.patch_embed.DTYPE_INTERMEDIATE", torch.float64)
    kernel = weight(old)
    convolution = kernel.unflatten(1, (old, old, 3)).permute(0, 3, 1, 2)
    theirs = resample_patch_embed(convolution, [new, new], interpolation=filter, antialias=antialias)
    ours = resize_kernel(kernel, new, filter=filter, antialias=antialias)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1).flatten(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("filter", "antialias"), RESIZES)
@pytest.mark.parametrize(("old", "new"), [(16, 32), (8, 16), (14, 16)])
def test_enlarged_kernel_says_of_an_enlarged_patch_what_it_said_before(old, new, filter, antialias):
    kernel, patches = weight(old), weight(old, 32, seed=2)
    enlarged = resized(patches, new, mode=filter, antialias=antialias)
    found = enlarged @ resize_kernel(kernel, new, filter=filter, antialias=antialias).T
    torch.testing.assert_close(found, patches @ kernel.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(16, 14), (8, 16)])
def test_kernel_is_the_least_squares_solution_of_least_norm(old, new):
    """<R x, w'> = <x, w> for all x is R^T w' = w, which numpy solves as nearly as can be; one channel."""
    basis = torch.eye(old * old, dtype=torch.float64).unflatten(1, (1, old, old))
    transposed = F.interpolate(basis, size=(new, new), mode="bilinear").flatten(1).numpy()  # R^T [p^2, q^2]
    kernel = weight(old)
    expected, *_ = np.linalg.lstsq(transposed, kernel.unflatten(1, (-1, 3))[..., 0].T.numpy())
    found = resize_kernel(kernel, new).unflatten(1, (-1, 3))[..., 0].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_smooth_patches_lose_far_less_than_under_a_resized_kernel():
    kernel, patches = smooth(16, 8, seed=3), smooth(16, 256, seed=4)
    shrunk, expected = resized(patches, 14, mode="bilinear"), patches @ kernel.T

    def error(new):
        return ((shrunk @ new.T - expected).norm() / expected.norm()).item()

    plain = resized(kernel, 14, mode="bilinear")
    assert error(plain) == pytest.approx(0.25, abs=0.03)  # it sums over fewer pixels
    assert error(plain * (16 / 14) ** 2) == pytest.approx(0.045, abs=0.02)
    assert error(resize_kernel(kernel, 14)) < 1e-3


def test_white_noise_loses_half_when_its_patches_shrink():
    kernel, patches = weight(16, 16), weight(16, 4096, seed=5)
    expected = patches @ kernel.T
    found = resized(patches, 14, mode="bilinear") @ resize_kernel(kernel, 14).T
    assert ((found - expected).norm() / expected.norm()).item() == pytest.approx(0.53, abs=0.05)


def test_enlarged_kernel_reads_an_enlarged_picture_patch_by_patch():
    """Each patch of 8 px enlarged to 16 px in its place: the embeddings of the picture are the same, in order."""
    generator = torch.Generator().manual_seed(6)
    picture = torch.rand(3, 16, 24, generator=generator, dtype=torch.float64)
    patches = patchify(picture, 8)  # [6, P]
    images = patches.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    enlarged = F.interpolate(images, size=(16, 16), mode="bilinear").unflatten(0, (2, 3))  # [2, 3, C, 16, 16]
    large = enlarged.permute(2, 0, 3, 1, 4).reshape(3, 32, 48)
    kernel = weight(8)
    torch.testing.assert_close(patchify(large, 16) @ resize_kernel(kernel, 16).T, patches @ kernel.T)


def test_shrinking_does_not_lead_back():
    kernel = weight(32)
    back = resize_kernel(resize_kernel(kernel, 8), 32)
    assert (back - kernel).norm() > 0.5 * kernel.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_keeps_its_dtype_and_is_calculated_in_float64(dtype):
    kernel = weight(16).to(dtype)
    assert torch.equal(resize_kernel(kernel, 14), resize_kernel(kernel.double(), 14).to(dtype))
    assert resize_kernel(kernel, 16) is kernel


@pytest.mark.parametrize(
    ("shape", "patch_size", "filter", "message"),
    [
        ((4, 768), 14, "nearest", "no resize filter called 'nearest', expected one of bilinear, bicubic"),
        ((4, 768), 0, "bilinear", "a patch size of at least 1, found 0"),
        ((4, 256), 14, "bilinear", r"\[D, p \* p \* 3\], found \[4, 256\]"),
    ],
)
def test_what_cannot_be_resized_is_an_error(shape, patch_size, filter, message):
    with pytest.raises(ValueError, match=message):
        resize_kernel(torch.zeros(shape), patch_size, filter=filter)
