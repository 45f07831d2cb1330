"""Batches: copies-major rows survive collation and curation."""

from dataclasses import replace

import pytest
import torch

from siglip2.core.batch import Batch, Packing, Patches, collate

SAMPLES, COPIES = 3, 2


def numbered(sample):
    """A view of two copies whose every value is 10 * copy + sample."""
    return torch.tensor([[10.0 * copy + sample] for copy in range(COPIES)])


def crop(sample, *, grid=None, valid=None):
    patches = torch.full((COPIES, 4, 3), sample, dtype=torch.uint8)
    coords = torch.full((COPIES, 4, 2), sample, dtype=torch.int16)
    return Patches(patches, coords, valid, grid)


def native(sample, *, rows=2, columns=1):
    """Two copies of an image with a grid of its own; the rest of its four patches is padding."""
    valid = (torch.arange(4) < rows * columns).expand(COPIES, -1)
    sizes = torch.tensor([rows, columns], dtype=torch.int16).expand(COPIES, 1, 2)
    return replace(crop(sample, valid=valid), sizes=sizes)


def packed():
    """Five images of 3, 1, 2, 2 and 4 patches in two rows of seven; patch j of image i is 10 i + j."""
    owners = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [0, 0, 1, 1, 1, 1, -1]], dtype=torch.int16)
    values = torch.tensor([[0, 1, 2, 10, 20, 21, 255], [30, 31, 40, 41, 42, 43, 255]], dtype=torch.uint8)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 4, 7, 9], [3, 1, 2, 2, 4]))
    packing = Packing(owners, starts, lengths, slots=3, longest=4)
    coords, sizes = torch.zeros(2, 7, 2, dtype=torch.int16), torch.ones(2, 7, 2, dtype=torch.int16)
    return Patches(values[..., None], coords, owners >= 0, sizes=sizes, packing=packing)


def patches_of(images, number):
    """The values of one image out of shared rows, found by its start and length."""
    start, length = int(images.packing.start[number]), int(images.packing.length[number])
    return images.patches.flatten()[start : start + length].tolist()


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


@pytest.mark.parametrize("name", ["patches", "coords", "valid", "sizes"])
def test_to_moves_every_tensor_of_a_view(name):
    moved = batch(crop=native(0), real=torch.zeros(SAMPLES)).to("meta")
    assert getattr(moved.views["crop"], name).is_meta


@pytest.mark.parametrize("name", ["owner", "start", "length"])
def test_to_moves_every_tensor_of_a_packing(name):
    moved = batch(image=packed()).to("meta").views["image"].packing
    assert getattr(moved, name).is_meta
    assert (moved.slots, moved.longest) == (3, 4)


def test_images_with_grids_of_their_own_keep_them_through_collation_and_selection():
    grids = [(2, 2), (1, 3), (4, 1)]
    views = collate([{"image": native(i, rows=r, columns=c)} for i, (r, c) in enumerate(grids)])
    images = views["image"]
    assert images.sizes[:, 0].tolist() == [list(grid) for grid in grids] * COPIES
    assert images.valid.sum(1).tolist() == [4, 3, 4] * COPIES
    assert images.token_mask is images.valid
    kept = batch(image=images).select(torch.tensor([2, 1])).views["image"]
    assert kept.sizes[:, 0].tolist() == [[4, 1], [1, 3]] * COPIES
    assert kept.patches[:, 0, 0].tolist() == [2, 1] * COPIES
    assert kept.valid.sum(1).tolist() == [4, 3] * COPIES
    assert kept.grid is None


def test_packed_images_are_counted_by_image_and_masked_by_length():
    images = packed()
    assert images.num_images == 5
    assert images.token_mask.tolist() == [[j < n for j in range(4)] for n in (3, 1, 2, 2, 4)]


def test_selected_packed_images_are_found_where_they_were():
    images = packed()
    kept = Batch({"image": images}, size=5, index=0).select(torch.tensor([4, 1])).views["image"]
    assert kept.num_images == 2
    assert [patches_of(kept, i) for i in range(2)] == [[40, 41, 42, 43], [10]]
    assert kept.token_mask.sum(1).tolist() == [4, 1]
    assert (kept.packing.slots, kept.packing.longest) == (3, 4)  # shapes do not depend on who was kept
    assert torch.equal(kept.patches, images.patches)


def test_collate_hands_only_unpadded_images_to_the_packer():
    handed = []

    def pack(images):
        handed.extend(images)
        return packed()

    plain = [replace(native(i), valid=None) for i in range(SAMPLES)]
    square, cropped = crop(0, grid=(2, 2)), native(0)
    views = collate([{"image": image, "square": square, "cropped": cropped} for image in plain], pack)
    assert len(handed) == SAMPLES
    assert all(one is other for one, other in zip(handed, plain, strict=True))
    assert views["image"].packing is not None
    assert views["square"].packing is views["cropped"].packing is None
    assert views["square"].patches.shape[0] == views["cropped"].patches.shape[0] == COPIES * SAMPLES


@pytest.mark.parametrize("images", [native(0), packed()])
def test_pinning_reaches_every_tensor_of_a_view(images, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # needs no accelerator
    pinned = batch(image=images).pin_memory().views["image"]
    packing = pinned.packing
    found = [pinned.patches, pinned.coords, pinned.valid, pinned.sizes]
    found += [packing.owner, packing.start, packing.length] if packing else []
    assert all(tensor.is_meta for tensor in found)


def test_images_travel_as_bytes():
    assert batch(crop=crop(7)).to("meta").views["crop"].patches.dtype == torch.uint8
