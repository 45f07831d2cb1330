"""Packing: every image in one place, no two in the same, none left out, and little room wasted."""

import math

import numpy as np
import pytest
import torch

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords
from siglip2.core.packing import Place, pack, pack_groups, packed, rows_for, spread


def lengths_of(count, *, seed, low=1, high=40):
    return np.random.default_rng(seed).integers(low, high + 1, count).tolist()


def resolutions(count, *, drop=False, seed=0):
    """Patches of 16 px of images with a side drawn from 64 to 256, half of them dropped if `drop`."""
    rng = np.random.default_rng(seed)
    lengths = (rng.uniform(64, 256, count) / 16) ** 2
    if drop:  # NaViT, appendix A.4, mean 0.5 and at most 0.9
        m, weight = 0.5 / 0.9, 1 / 0.3 - 1
        lengths *= 1 - 0.9 * rng.beta(m * weight, (1 - m) * weight, count)
    return np.maximum(1, lengths.astype(int)).tolist()


def padding(places, *, rows, seq_len):
    return 1 - sum(place.length for place in places) / (rows * seq_len)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows", [3, 7, 12])  # too few for all patches, hardly enough, plenty
def test_every_image_has_a_stretch_of_a_row_to_itself(seed, rows):
    lengths = lengths_of(12, seed=seed)
    places = pack(lengths, rows=rows, seq_len=40, slots=5)
    taken = np.zeros((rows, 40), dtype=int)
    for place in places:
        assert place.offset + place.length <= 40
        taken[place.row, place.offset : place.offset + place.length] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(place.length for place in places)
    for row in range(rows):
        slots = sorted(place.slot for place in places if place.row == row)
        assert slots == list(range(len(slots)))  # numbered from 0 without gaps
        assert len(slots) <= 5
    assert all(1 <= place.length <= length for place, length in zip(places, lengths, strict=True))


def test_images_that_fit_lose_nothing():
    assert [place.length for place in pack([30, 20, 10, 9, 8, 3], rows=2, seq_len=40, slots=4)] == [30, 20, 10, 9, 8, 3]


@pytest.mark.parametrize("seed", range(5))
def test_images_that_do_not_fit_lose_the_same_share(seed):
    lengths = lengths_of(24, seed=seed, low=10, high=40)
    places = pack(lengths, rows=8, seq_len=40, slots=8)
    assert sum(lengths) > 8 * 40
    kept = np.array([place.length for place in places])
    share = kept.sum() / sum(lengths)
    assert (np.abs(kept - share * np.array(lengths)) <= 1).all()  # to whole patches, and the share is that of the sum
    assert padding(places, rows=8, seq_len=40) < 0.1  # and no more than they have to


def test_as_many_images_as_there_are_slots_still_fit():
    places = pack([40] * 15, rows=3, seq_len=40, slots=5)
    assert sorted((place.row, place.slot) for place in places) == [(row, slot) for row in range(3) for slot in range(5)]
    assert {place.length for place in places} == {8}


def test_packing_is_the_same_at_every_call_and_ties_keep_their_order():
    lengths = [10, 10, 10, 10]
    assert pack(lengths, rows=2, seq_len=20, slots=2) == pack(lengths, rows=2, seq_len=20, slots=2)
    assert pack(lengths, rows=2, seq_len=20, slots=2) == [Place(r, s, 10 * s, 10) for r in range(2) for s in range(2)]


def test_no_images_need_no_place():
    assert pack([], rows=0, seq_len=16, slots=2) == []


def test_too_many_images_are_an_error_with_numbers():
    with pytest.raises(ValueError, match="7 images do not go into 2 rows of 40 patches with 3 images .* allow 4"):
        pack([1] * 7, rows=2, seq_len=40, slots=3)


@pytest.mark.parametrize("lengths", [[5, 41], [0, 5]])
def test_an_image_that_no_row_can_take_is_an_error(lengths):
    with pytest.raises(ValueError, match=rf"images of {min(lengths)} to {max(lengths)} patches .* expected 1 to 40"):
        pack(lengths, rows=2, seq_len=40, slots=3)


@pytest.mark.parametrize(("drop", "empty"), [(False, 0.058), (True, 0.012)])
def test_rows_can_be_as_full_as_those_of_first_fit_over_64_open_rows(drop, empty):
    lengths = resolutions(1024, drop=drop)
    rows = math.ceil(sum(lengths) / (1 - empty) / 256)  # first fit opens as many as it needs; here they are given
    places = pack(lengths, rows=rows, seq_len=256, slots=16)
    assert padding(places, rows=rows, seq_len=256) < empty + 0.01
    assert sum(place.length for place in places) > 0.99 * sum(lengths)


@pytest.mark.parametrize("drop", [False, True])
def test_the_rows_that_first_fit_opens_are_enough(drop):
    lengths = resolutions(128, drop=drop)
    room: list[int] = []  # first fit in the order of arrival, a new row where none has room
    for length in lengths:
        at = next((row for row, left in enumerate(room) if left >= length), len(room))
        room[at : at + 1] = [(room[at] if at < len(room) else 256) - length]
    places = pack(lengths, rows=len(room), seq_len=256, slots=16)
    assert [place.length for place in places] == lengths


def test_groups_are_packed_each_for_itself_whatever_follows():
    lengths = lengths_of(22, seed=3)
    options = {"group": 8, "rows": 5, "seq_len": 40, "slots": 8}
    places = pack_groups(lengths, **options)
    assert places[:16] == pack_groups(lengths[:16], **options)
    assert places[8:16] == [place._replace(row=place.row + 5) for place in pack_groups(lengths[8:16], **options)]
    assert {place.row for place in places[:8]} <= set(range(5))
    assert {place.row for place in places[16:]} <= set(range(10, 14))  # 6 of 8 images: 3.75 rows, rounded up
    assert rows_for(22, group=8, rows=5) == 14


@pytest.mark.parametrize("count", range(1, 18))
def test_a_group_that_is_not_full_has_room_for_its_images(count):
    places = pack_groups([40] * count, group=8, rows=2, seq_len=40, slots=4)
    assert len(places) == count
    assert max(place.row for place in places) < rows_for(count, group=8, rows=2)


@pytest.mark.parametrize("share", [0.25, 0.48, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 13), (13, 8), (5, 24), (21, 12), (1, 200), (200, 1)])
def test_a_thinned_image_keeps_patches_from_all_over(rows, columns, share):
    kept = round(share * rows * columns)
    which = spread(grid_coords(rows, columns), kept)
    assert which.tolist() == sorted(set(which.tolist()))
    assert len(which) == kept
    grid = torch.zeros(rows * columns).index_fill_(0, which, 1).reshape(rows, columns)
    assert (grid.sum(0) - rows * share).abs().max() <= 3  # each column; every second patch would leave all or none
    assert (grid.sum(1) - columns * share).abs().max() <= 3  # each row


def test_an_image_that_keeps_all_patches_keeps_their_order():
    assert spread(grid_coords(3, 4), 12).tolist() == list(range(12))


def picture(rows, columns, *, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(1, 256, (1, rows * columns, 12), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([rows, columns], dtype=torch.int16).reshape(1, 1, 2)
    return Patches(patches, grid_coords(rows, columns)[None], sizes=sizes)


def test_packed_patches_are_found_where_packing_says():
    images = [picture(2, 3, seed=0), picture(3, 3, seed=1), picture(1, 4, seed=2)]
    places = [Place(1, 1, 9, 6), Place(1, 0, 0, 9), Place(0, 0, 0, 4)]
    rows = packed(images, places, rows=2, seq_len=16, slots=3, longest=10)
    assert rows.patches.shape == (2, 16, 12)
    assert rows.num_images == 3
    assert (rows.packing.slots, rows.packing.longest) == (3, 10)
    lengths = [6, 9, 4]
    assert rows.packing.length.tolist() == rows.token_mask.sum(1).tolist() == lengths
    for image, start, length in zip(images, rows.packing.start.tolist(), lengths, strict=True):
        assert torch.equal(rows.patches.flatten(0, 1)[start : start + length], image.patches[0])
        assert torch.equal(rows.coords.flatten(0, 1)[start : start + length], image.coords[0])
        assert torch.equal(rows.sizes.flatten(0, 1)[start : start + length], image.sizes[0].expand(length, 2))
    assert rows.packing.owner.tolist() == [[0] * 4 + [-1] * 12, [0] * 9 + [1] * 6 + [-1]]
    nothing = rows.packing.owner < 0
    assert not rows.patches[nothing].any()
    assert not rows.coords[nothing].any()
    assert (rows.sizes[nothing] == 1).all()


def test_packed_patches_of_a_thinned_image_keep_pixels_and_coordinates_together():
    image = picture(4, 5, seed=0)
    rows = packed([image], [Place(0, 0, 0, 7)], rows=1, seq_len=8, slots=2, longest=8)
    which = spread(grid_coords(4, 5), 7)
    assert torch.equal(rows.patches[0, :7], image.patches[0, which])
    assert torch.equal(rows.coords[0, :7], grid_coords(4, 5)[which])
    assert (rows.sizes[0, :7] == torch.tensor([4, 5])).all()
