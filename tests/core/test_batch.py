"""Batches: copies-major rows survive collation and curation."""

import pytest
import torch

from siglip2.core.batch import Batch, Patches, collate

SAMPLES, COPIES = 3, 2


def numbered(sample):
    """A view of two copies whose every value is 10 * copy + sample."""
    return torch.tensor([[10.0 * copy + sample] for copy in range(COPIES)])


def crop(sample, *, grid=None, valid=None):
    patches = torch.full((COPIES, 4, 3), sample, dtype=torch.uint8)
    coords = torch.full((COPIES, 4, 2), sample, dtype=torch.int16)
    return Patches(patches, coords, valid, grid)


def batch(**views):
    return Batch(views, size=SAMPLES, index=0)


def test_collate_puts_one_copy_of_every_sample_together():
    views = collate([{"crop": numbered(i)} for i in range(SAMPLES)])
    assert views["crop"][:, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_select_keeps_the_same_samples_in_every_copy():
    views = collate([{"crop": numbered(i), "one": numbered(i)[:1]} for i in range(SAMPLES)])
    kept = batch(**views).select(torch.tensor([2, 0]))
    assert kept.views["crop"][:, 0].tolist() == [2, 0, 12, 10]
    assert kept.views["one"][:, 0].tolist() == [2, 0]
    assert kept.size == 2


def test_select_keeps_patches_with_their_coordinates_and_padding():
    valid = torch.tensor([[True, True, True, False]] * COPIES)
    views = collate([{"crop": crop(i, valid=valid)} for i in range(SAMPLES)])
    kept = batch(**views).select(torch.tensor([1])).views["crop"]
    assert kept.patches.unique().tolist() == kept.coords.unique().tolist() == [1]
    assert kept.patches.shape[0] == kept.coords.shape[0] == kept.valid.shape[0] == COPIES


def test_images_of_one_grid_share_their_coordinates():
    views = collate([{"crop": crop(0, grid=(2, 2))} for _ in range(SAMPLES)])
    kept = batch(**views).select(torch.tensor([1, 2])).views["crop"]
    assert kept.coords.shape == (1, 4, 2)
    assert kept.grid == (2, 2)


def test_selecting_every_row_changes_nothing():
    views = collate([{"crop": numbered(i)} for i in range(SAMPLES)])
    assert torch.equal(batch(**views).select(torch.arange(SAMPLES)).views["crop"], views["crop"])


def test_select_follows_rows_that_only_fill_up():
    real = torch.tensor([True, True, False])
    kept = Batch({"one": torch.zeros(SAMPLES)}, SAMPLES, 0, real=real).select(torch.tensor([2, 1]))
    assert kept.real.tolist() == [False, True]


@pytest.mark.parametrize("name", ["patches", "coords", "valid"])
def test_to_moves_every_tensor_of_a_view(name):
    valid = torch.ones(COPIES, 4, dtype=torch.bool)
    moved = batch(crop=crop(0, valid=valid), real=torch.zeros(SAMPLES)).to("meta")
    assert getattr(moved.views["crop"], name).is_meta


def test_images_travel_as_bytes():
    assert batch(crop=crop(7)).to("meta").views["crop"].patches.dtype == torch.uint8
