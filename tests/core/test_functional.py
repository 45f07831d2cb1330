"""The sigmoid loss is the paper's equation, patches are where they should be, and positions resize as torch resizes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from siglip2.core.functional import (
    grid_coords,
    pair_logits,
    patchify,
    resample_grid,
    resize_weights,
    sigmoid_loss,
    unpatchify,
)
from siglip2.testing import no_host_sync

GRIDS = np.random.default_rng(0).integers(1, 65, size=(200, 4)).tolist()  # table rows, columns -> rows, columns


def embeddings(num_images, num_texts, *, width=8, seed=0):
    """Random unit-norm rows, a temperature and a bias, all leaves."""
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(n, width, generator=generator), dim=-1) for n in (num_images, num_texts)]
    leaves = [*rows, torch.tensor([math.log(7.0)]), torch.tensor([-3.0])]
    return [leaf.requires_grad_() for leaf in leaves]


def in_float64(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def equation(image, text, scale, bias, offset=0):
    """SigLIP, eq. 1, as loops over pairs."""
    total = 0.0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            sign = 1 if j == offset + i else -1
            total += np.log(1 + np.exp(-sign * (np.exp(scale[0]) * (x @ y) + bias[0])))
    return total / len(image)


def closed_form_gradients(image, text, scale, bias, offset=0):
    """dL/dx, dL/dy, dL/dt', dL/db through G = (sigmoid(A) - 1[pair]) / B."""
    logits = np.exp(scale) * image @ text.T + bias
    pairs = np.eye(len(image), len(text), k=offset)
    g = (1 / (1 + np.exp(-logits)) - pairs) / len(image)
    return np.exp(scale) * g @ text, np.exp(scale) * g.T @ image, (g * (logits - bias)).sum(), g.sum()


@pytest.mark.parametrize(
    ("num_images", "num_texts", "offset"), [(1, 1, 0), (6, 6, 0), (4, 12, 0), (4, 12, 4), (4, 12, 8)]
)
def test_sigmoid_loss_is_the_equation(num_images, num_texts, offset):
    image, text, scale, bias = embeddings(num_images, num_texts)
    loss = sigmoid_loss(image, text, scale=scale, bias=bias, offset=offset)
    expected = equation(*in_float64(image, text, scale, bias), offset=offset)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # float32 sums against float64


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_sigmoid_loss_has_the_closed_form_gradients(offset):
    leaves = embeddings(4, 12, seed=1)
    image, text, scale, bias = leaves
    sigmoid_loss(image, text, scale=scale, bias=bias, offset=offset).backward()
    expected = closed_form_gradients(*in_float64(*leaves), offset=offset)
    for leaf, gradient in zip(leaves, expected, strict=True):
        np.testing.assert_allclose(leaf.grad.squeeze(), np.squeeze(gradient), rtol=1e-5, atol=1e-6)  # float32


def test_mean_over_ranks_of_the_gathered_loss_is_the_loss_of_one_process():
    leaves = embeddings(12, 12)
    image, text, scale, bias = leaves
    whole = sigmoid_loss(image, text, scale=scale, bias=bias)
    shares = [sigmoid_loss(image[r : r + 4], text, scale=scale, bias=bias, offset=r) for r in (0, 4, 8)]
    mean = torch.stack(shares).mean()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(whole, leaves), torch.autograd.grad(mean, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(256, 10.012), (1024, 10.046), (4096, 10.186), (16384, 10.744), (32768, 11.488)]
)
def test_loss_at_initialisation_has_the_published_value(batch_size, expected):
    """With similarities of 0: softplus(10) + (B - 1) softplus(-10), on the share of a rank with 16 images."""
    scale, bias = torch.tensor([math.log(10)]), torch.tensor([-10.0])
    loss = sigmoid_loss(torch.zeros(16, 1), torch.zeros(batch_size, 1), scale=scale, bias=bias, offset=16)
    assert loss.item() == pytest.approx(math.log1p(math.e**10) + (batch_size - 1) * math.log1p(math.e**-10), rel=1e-5)
    assert loss.item() == pytest.approx(expected, abs=5e-4)  # the printed digits


def test_sigmoid_loss_stays_finite_for_huge_logits():
    image, text = torch.eye(3), -torch.eye(3)
    scale = torch.tensor([math.log(1000.0)], requires_grad=True)
    loss = sigmoid_loss(image, text, scale=scale, bias=torch.zeros(1))
    loss.backward()
    assert loss.item() == pytest.approx(1000 + 2 * math.log(2))  # log(sigmoid(-1000)) would be -inf
    assert scale.grad.isfinite().all()


def test_too_few_texts_are_an_error():
    image, text, scale, bias = embeddings(4, 7)
    with pytest.raises(ValueError, match="a text for each of 4 images from row 4 on, found 7 texts"):
        sigmoid_loss(image, text, scale=scale, bias=bias, offset=4)


def test_logits_are_float32_under_bfloat16_autocast():
    image, text, scale, bias = embeddings(5, 5)
    outside = pair_logits(image, text, scale=scale, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pair_logits(image, text, scale=scale, bias=bias)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_patches_are_row_major_and_run_over_row_column_channel():
    image = torch.arange(3 * 6 * 4).reshape(3, 6, 4)
    expected = [
        [image[c, 2 * row + y, 2 * column + x].item() for y in range(2) for x in range(2) for c in range(3)]
        for row in range(3)
        for column in range(2)
    ]
    assert patchify(image, 2).tolist() == expected


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    ("size", "patch_size", "grid"), [((32, 48), 16, (2, 3)), ((28, 14), 14, (2, 1)), ((5, 7), 1, (5, 7))]
)
def test_unpatchify_inverts_patchify(lead, size, patch_size, grid):
    image = torch.randint(0, 256, (*lead, 3, *size), dtype=torch.uint8)
    patches = patchify(image, patch_size)
    assert patches.shape == (*lead, grid[0] * grid[1], patch_size**2 * 3)
    assert torch.equal(unpatchify(patches, grid), image)


def test_384_pixels_at_patch_14_are_27_x_27_patches():
    image = torch.randint(0, 256, (3, 384, 384), dtype=torch.uint8)
    patches = patchify(image, 14)
    assert patches.shape == (27 * 27, 14 * 14 * 3)
    assert torch.equal(unpatchify(patches, (27, 27)), image[:, :378, :378])


@pytest.mark.parametrize(("side", "patch_size"), [(32, 8), (38, 14)])
def test_linear_on_patches_is_the_convolution_with_kernel_equal_to_stride(side, patch_size):
    image = torch.randn(2, 3, side, side)
    kernel, bias = torch.randn(5, 3, patch_size, patch_size), torch.randn(5)
    expected = F.conv2d(image, kernel, bias, stride=patch_size).flatten(2).mT  # [B, D, h, w] -> [B, N, D]
    found = F.linear(patchify(image, patch_size), kernel.permute(0, 2, 3, 1).flatten(1), bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # sums of up to 588 products


def test_grid_coords_are_y_x_in_row_major_order():
    coords = grid_coords(2, 3)
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert coords.dtype == torch.int16


def interpolated(table, rows, columns):
    """torch's own resize of a table [r, c, D] in float64, row-major [rows * columns, D].

    Resized lying down if it has one column: torch 2.9 on CPU repeats the first value in such a column (4 x 1 -> 3 x 1).
    """
    if columns == 1 < rows:
        return interpolated(table.transpose(0, 1), 1, rows)
    image = table.double().permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=(rows, columns), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].flatten(1).T


def random_tables(seed):
    """200 tables of values in [-1, 1] and the grids they are resized to."""
    generator = torch.Generator().manual_seed(seed)
    for table_rows, table_columns, rows, columns in GRIDS:
        yield torch.rand(table_rows, table_columns, 2, generator=generator) * 2 - 1, (rows, columns)


def test_resample_grid_is_the_antialiased_bilinear_interpolation():
    for table, grid in random_tables(seed=0):
        found = resample_grid(table, grid_coords(*grid), grid=grid).double()
        torch.testing.assert_close(found, interpolated(table, *grid), rtol=0, atol=1e-6)  # float32 against float64


def test_resample_grid_has_the_gradient_of_the_interpolation():
    for table, grid in random_tables(seed=1):
        table.requires_grad_()
        cotangent = torch.rand(grid[0] * grid[1], 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
        (found,) = torch.autograd.grad(resample_grid(table, grid_coords(*grid), grid=grid), table, cotangent)
        (expected,) = torch.autograd.grad(interpolated(table, *grid), table, cotangent.double())
        # a cell of a small table sums up to 64 x 64 cotangents, hence relative to what it sums
        collected = max(1.0, grid[0] * grid[1] / (table.shape[0] * table.shape[1]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * collected)


def interpolated_by_corners(table, rows, columns):
    """torch's resize with corners aligned of a table [r, c, D] in float64, row-major [rows * columns, D]."""
    image = table.double().permute(2, 0, 1)[None]
    return F.interpolate(image, size=(rows, columns), mode="bilinear", align_corners=True)[0].flatten(1).T


FILTERS = [
    pytest.param(False, interpolated, id="antialiased"),
    pytest.param(True, interpolated_by_corners, id="corners"),
]


def mixed_grids():
    """A table 16 x 16, coordinates [5, 256, 2] of five grids, padded with (0, 0), and their sizes [5, 1, 2]."""
    table = torch.rand(16, 16, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    grids = [(7, 9), (16, 16), (1, 64), (64, 1), (5, 5)]
    coords = torch.zeros(len(grids), 256, 2, dtype=torch.int16)
    for row, grid in zip(coords, grids, strict=True):
        row[: grid[0] * grid[1]] = grid_coords(*grid)
    return table, coords, torch.tensor(grids, dtype=torch.int16)[:, None]


@pytest.mark.parametrize(("corners", "reference"), FILTERS)
def test_resample_grid_takes_a_grid_per_image(corners, reference):
    table, coords, sizes = mixed_grids()
    found = resample_grid(table, coords, grid=(sizes[..., 0], sizes[..., 1]), corners=corners).double()
    for positions, (grid,) in zip(found, sizes.tolist(), strict=True):
        torch.testing.assert_close(positions[: grid[0] * grid[1]], reference(table, *grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("corners", "reference"), FILTERS)
def test_resample_grid_takes_a_grid_per_patch(corners, reference):
    """Three images of different grids in one row, as packing lays them out."""
    table = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1
    grids = [(2, 9), (7, 3), (6, 4)]
    coords = torch.cat([grid_coords(*grid) for grid in grids])[None]
    sizes = torch.cat([torch.tensor([grid] * math.prod(grid)) for grid in grids])[None]
    found = resample_grid(table, coords, grid=(sizes[..., 0], sizes[..., 1]), corners=corners)[0].double()
    expected = torch.cat([reference(table, *grid) for grid in grids])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_resample_grid_by_corners_is_the_interpolation_that_aligns_them():
    for table, grid in random_tables(seed=4):
        found = resample_grid(table, grid_coords(*grid), grid=grid, corners=True).double()
        torch.testing.assert_close(found, interpolated_by_corners(table, *grid), rtol=0, atol=1e-6)


def test_resample_grid_by_corners_runs_straight_from_corner_to_corner():
    """big_vision's rule (scipy.ndimage.zoom of order 1), by numpy: linear along each axis over evenly spaced points."""
    for table, grid in random_tables(seed=5):
        expected = table.double().numpy()
        for axis, size in enumerate(grid):
            source = expected.shape[axis]
            points = np.linspace(0, source - 1, size)
            expected = np.apply_along_axis(partial(np.interp, points, range(source)), axis, expected)
        found = resample_grid(table, grid_coords(*grid), grid=grid, corners=True)
        np.testing.assert_allclose(found, expected.reshape(-1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("corners", [False, True])
def test_positions_are_resampled_without_waiting_for_the_device(corners):
    table, coords, sizes = mixed_grids()
    table.requires_grad_()
    with no_host_sync():
        resample_grid(table, coords, grid=(sizes[..., 0], sizes[..., 1]), corners=corners).sum().backward()
    assert table.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # which torch 2.9's tracer does
def test_positions_are_resampled_in_one_graph():
    table, coords, sizes = mixed_grids()
    table.requires_grad_()
    compiled = torch.compile(resample_grid, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for function in (compiled, resample_grid):
        positions = function(table, coords, grid=(sizes[..., 0], sizes[..., 1]))
        results.append((positions, *torch.autograd.grad(positions.square().sum(), table)))
    torch.testing.assert_close(results[0], results[1])


def test_resampling_treats_rows_and_columns_alike():
    table = torch.randn(5, 9, 3)
    upright = resample_grid(table, grid_coords(7, 1), grid=(7, 1))
    lying = resample_grid(table.transpose(0, 1), grid_coords(1, 7), grid=(1, 7))
    torch.testing.assert_close(upright, lying)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16), (27, 27), (64, 64)])
def test_resampling_a_table_to_its_own_grid_changes_nothing(grid):
    table = torch.randn(*grid, 3)
    assert torch.equal(resample_grid(table, grid_coords(*grid), grid=grid), table.flatten(0, 1))


@pytest.mark.parametrize(("size", "source"), [(3, 64), (64, 3), (7, 7), (1, 5), (5, 1)])
def test_resize_weights_of_a_cell_sum_to_one(size, source):
    weights = resize_weights(torch.arange(size), size=size, source=source)
    assert weights.shape == (size, source)
    torch.testing.assert_close(weights.sum(-1), torch.ones(size))


def test_positions_are_resampled_in_float32_under_bfloat16_autocast():
    table = torch.randn(4, 4, 8)
    outside = resample_grid(table, grid_coords(5, 3), grid=(5, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample_grid(table, grid_coords(5, 3), grid=(5, 3))
    assert torch.equal(inside, outside)
    assert resample_grid(table.bfloat16(), grid_coords(5, 3), grid=(5, 3)).dtype == torch.bfloat16
