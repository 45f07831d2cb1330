"""Several images in one row: which image goes where, and the rows that come of it."""

# B images, R rows, S patches of a row, P patch values

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2.core.batch import Packing, Patches

SHARES = 1024  # steps in which the kept share is searched: a row of that many patches is off by one at most
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1  # as far from fractions as numbers can be


class Place(NamedTuple):
    """Where an image lies: its row, its number within the row, its first patch there, and how many it keeps."""

    row: int
    slot: int
    offset: int
    length: int


def pack(lengths: Sequence[int], *, rows: int, seq_len: int, slots: int) -> list[Place]:
    """Returns a place for every image, in the order of `lengths`, the same at every call.

    The longest image first, each into the fullest row that has room for all of it. If one then finds none, all images
    lose the same share of their patches, the smallest share with which everything fits (to 1 / 1024, and each keeps at
    least one patch): which images meet decides how many patches they have, but no image is left out.

    Ours: NaViT (https://arxiv.org/abs/2307.06304, section 2.3 and appendix A.3) takes images as they come, into the
    first row with room, and drops those beyond the last row.

    Args:
        lengths: patches of each image, in 1..seq_len.
        rows: how many there are, however full.
        seq_len: patches that a row has room for.
        slots: images that a row has room for.

    Raises:
        ValueError: if the images are too many for the rows, or one is too long.
    """
    if len(lengths) > rows * min(slots, seq_len):
        raise ValueError(
            f"{len(lengths)} images do not go into {rows} rows of {seq_len} patches with {slots} images at most: use "
            f"more rows, or allow {math.ceil(len(lengths) / rows)} images in each"
        )
    if lengths and not 1 <= min(lengths) <= max(lengths) <= seq_len:
        raise ValueError(
            f"images of {min(lengths)} to {max(lengths)} patches do not go into rows of {seq_len}: expected 1 to "
            f"{seq_len} patches"
        )

    def keeping(share: int) -> list[Place] | None:
        kept = [max(1, (length * share + SHARES // 2) // SHARES) for length in lengths]  # to the nearest
        return _placed(kept, rows=rows, seq_len=seq_len, slots=slots)

    low, high, found = 0, SHARES, keeping(SHARES)
    if found is not None:
        return found
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeping(middle) is None else (middle, high)
    found = keeping(low)
    assert found is not None  # one patch of each image always fits
    return found


def _placed(lengths: Sequence[int], *, rows: int, seq_len: int, slots: int) -> list[Place] | None:
    room = [(seq_len, row) for row in range(rows)]  # of rows that may take another image, the fullest first
    counts = [0] * rows
    places: dict[int, Place] = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(room, (lengths[number],))
        if at == len(room):
            return None
        left, row = room.pop(at)
        places[number] = Place(row, counts[row], seq_len - left, lengths[number])
        counts[row] += 1
        if counts[row] < slots:
            insort(room, (left - lengths[number], row))
    return [places[number] for number in range(len(lengths))]


def pack_groups(lengths: Sequence[int], *, group: int, rows: int, seq_len: int, slots: int) -> list[Place]:
    """Returns a place for every image, each group of consecutive images in rows of its own.

    So what an image meets depends on its group, not on how a batch is cut, as long as no group is. `rows_for` says how
    many rows there are in all.

    Args:
        lengths: patches of each image, in 1..seq_len.
        group: images that are packed together; the last may be fewer.
        rows: of a whole group.
        seq_len: patches that a row has room for.
        slots: images that a row has room for.

    Raises:
        ValueError: if the images are too many for the rows, or one is too long.
    """
    places: list[Place] = []
    for first in range(0, len(lengths), group):
        part = lengths[first : first + group]
        above = rows_for(first, group=group, rows=rows)
        here = rows_for(len(part), group=group, rows=rows)
        found = pack(part, rows=here, seq_len=seq_len, slots=slots)
        places += [place._replace(row=above + place.row) for place in found]
    return places


def rows_for(count: int, *, group: int, rows: int) -> int:
    """Returns the number of rows of `count` images: `rows` for each whole group, and as many in proportion."""
    whole, rest = divmod(count, group)
    return whole * rows + math.ceil(rest * rows / group)


def spread(coords: Tensor, kept: int) -> Tensor:
    """Returns which `kept` patches stay when an image is thinned out, int64 [kept] in rising order.

    Evenly over rows and columns of the grid, by a pattern whose steps fit into no period: of every second patch whole
    columns would be left.

    Args:
        coords: (y, x) of each patch, integer [N, 2].
        kept: how many stay, in 1..N.
    """
    y, x = coords.double().unbind(-1)
    order = (y * SILVER + x * GOLDEN).frac().argsort(stable=True)
    return order[:kept].sort().values


def packed(
    images: Sequence[Patches], places: Iterable[Place], *, rows: int, seq_len: int, slots: int, longest: int
) -> Patches:
    """Returns the images in their places as packed patches [R, S, P] uint8, zero where nothing lies.

    An image that keeps fewer patches than it has is thinned out evenly.

    Args:
        images: unpadded, [1, n, P] each, with `sizes`.
        places: of each image.
        rows: R.
        seq_len: S.
        slots: images that a row has room for.
        longest: patches that an image has at most.
    """
    places = list(places)
    patches = torch.zeros(rows, seq_len, images[0].patches.shape[-1], dtype=torch.uint8)
    coords = torch.zeros(rows, seq_len, 2, dtype=torch.int16)
    sizes = torch.ones(rows, seq_len, 2, dtype=torch.int16)  # of padding too: a grid without cells has no positions
    owner = torch.full((rows, seq_len), -1, dtype=torch.int16)
    for image, place in zip(images, places, strict=True):
        assert image.sizes is not None
        kept = spread(image.coords[0], place.length)
        here = place.row, slice(place.offset, place.offset + place.length)
        patches[here], coords[here] = image.patches[0, kept], image.coords[0, kept]
        sizes[here], owner[here] = image.sizes[0], place.slot
    start = torch.tensor([place.row * seq_len + place.offset for place in places], dtype=torch.int32)
    length = torch.tensor([place.length for place in places], dtype=torch.int32)
    return Patches(patches, coords, sizes=sizes, packing=Packing(owner, start, length, slots, longest))
