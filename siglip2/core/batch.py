"""What travels from a loader worker to the step: patches, batches, and what went wrong on the way."""

# B batch, C copies of a view, N patches, P values of a patch (row, column, channel; channel fastest), R packed rows

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where B images lie in R rows that several of them share, each as one stretch of a row.

    Args:
        owner: [R, N] int16, number of the image within its row; -1 where padded.
        start: [B] int32, place of each image's first patch among the R * N.
        length: [B] int32, patches of each image.
        slots: images that a row has room for, the same in every batch.
        longest: patches that an image has at most, the same in every batch.
    """

    owner: Tensor
    start: Tensor
    length: Tensor
    slots: int
    longest: int

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Packing":
        """Returns the packing with `function` applied to every tensor."""
        return replace(self, owner=function(self.owner), start=function(self.start), length=function(self.length))

    def images(self, index: Tensor) -> "Packing":
        """Returns the packing with only the images `index`, int64 [B']; the others stay where they are, unread."""
        return replace(self, start=self.start.index_select(0, index), length=self.length.index_select(0, index))


@dataclass(frozen=True)
class Patches:
    """Images as sequences of flattened patches.

    Either all images have one `grid`, or each has its own and `sizes` says which.

    Args:
        patches: [B, N, P] uint8, P = patch_size * patch_size * 3 in the order row, column, channel; packed [R, N, P].
        coords: [B, N, 2] or, when all images share them, [1, N, 2]; integer (y, x) of each patch in its grid.
        valid: [B, N] bool, false where padded; None where nothing is.
        grid: (rows, columns) when every image has this very grid in row-major order; None where grids vary.
        sizes: integer (rows, columns) of the grid that a patch lies in, [B, 1, 2] or [B, N, 2]; None with `grid`.
        packing: where each image lies, when several share a row; None when each has its own.
    """

    patches: Tensor
    coords: Tensor
    valid: Tensor | None = None
    grid: tuple[int, int] | None = None
    sizes: Tensor | None = None
    packing: Packing | None = None

    @property
    def num_images(self) -> int:
        """B, the number of images; packed images are fewer rows."""
        return self.patches.shape[0] if self.packing is None else self.packing.start.shape[0]

    @property
    def token_mask(self) -> Tensor | None:
        """Which of the tokens that a tower makes of each image are no padding: bool [B, N], or None where all are."""
        if self.packing is None:
            return self.valid
        places = torch.arange(self.packing.longest, device=self.packing.length.device)
        return places < self.packing.length[:, None]

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Patches":
        """Returns the patches with `function` applied to every tensor."""
        return replace(
            self,
            patches=function(self.patches),
            coords=function(self.coords),
            valid=None if self.valid is None else function(self.valid),
            sizes=None if self.sizes is None else function(self.sizes),
            packing=None if self.packing is None else self.packing.apply(function),
        )

    def images(self, index: Tensor) -> "Patches":
        """Returns the images with the given numbers, int64 [B']."""
        if self.packing is not None:
            return replace(self, packing=self.packing.images(index))
        return self.apply(lambda t: t if t is self.coords and t.shape[0] == 1 else t.index_select(0, index))


@dataclass(frozen=True)
class Fault:
    """A sample, or a part of one, that could not be used, and why: shard or file, key, reason."""

    where: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """The views of one batch on one rank.

    Args:
        views: by name: `Patches`, or a tensor with a leading batch dimension. A view of C copies has C * B rows,
            copies-major: row c * B + i is copy c of sample i.
        size: B, the rows of this rank.
        index: number of the global batch since the start of the run, the same on every rank.
        keys: sample keys of the rows as they were loaded, before any curation.
        real: [B] bool in evaluation, false for rows that only fill up the last batch; None in training.
        faults: samples that were skipped and replaced while this batch was made.
        notes: parts of samples that were left out: a bad box, the end of a long caption.
    """

    views: dict[str, Any]
    size: int
    index: int
    keys: tuple[str, ...] = ()
    real: Tensor | None = None
    faults: tuple[Fault, ...] = field(default=())
    notes: tuple[Fault, ...] = field(default=())

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Returns the batch with `function` applied to every tensor."""
        views = {k: v.apply(function) if isinstance(v, Patches) else function(v) for k, v in self.views.items()}
        return replace(self, views=views, real=None if self.real is None else function(self.real))

    def to(self, device: Any, non_blocking: bool = True) -> "Batch":
        """Returns the batch on `device`; images travel as uint8."""
        return self.apply(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory (called by torch's DataLoader)."""
        return self.apply(lambda t: t.pin_memory())

    def select(self, kept: Tensor) -> "Batch":
        """Returns the batch reduced to the rows `kept` ([B'] int64), in every view and all of its copies."""
        views = {name: _select(view, kept, self.size) for name, view in self.views.items()}
        real = None if self.real is None else self.real.index_select(0, kept)
        return replace(self, views=views, real=real, size=kept.shape[0])


def _select(view: Any, kept: Tensor, size: int) -> Any:
    rows = view.num_images if isinstance(view, Patches) else view.shape[0]
    copies = torch.arange(rows // size, device=kept.device) * size  # [C]
    index = (copies[:, None] + kept[None]).flatten()  # [C, B'] -> [C * B'], copies-major
    return view.images(index) if isinstance(view, Patches) else view.index_select(0, index)


Pack = Callable[[Sequence[Patches]], Patches]


def collate(rows: list[dict[str, Any]], pack: Pack | None = None) -> dict[str, Any]:
    """Joins the views of single samples into the views of a batch, copies-major.

    Args:
        rows: one mapping per sample; each view has the leading dimension C (its number of copies).
        pack: joins images of any length into shared rows; None where each image has a row of its own.
    """
    return {name: _join([row[name] for row in rows], pack) for name in rows[0]}


def _join(items: list[Any], pack: Pack | None) -> Any:
    first = items[0]
    if not isinstance(first, Patches):
        return _copies_major(items)
    if first.grid is not None:
        return Patches(_copies_major([p.patches for p in items]), first.coords[:1], None, first.grid)
    if pack is not None and first.valid is None:
        return pack(items)
    return Patches(
        _copies_major([p.patches for p in items]),
        _copies_major([p.coords for p in items]),
        None if first.valid is None else _copies_major([p.valid for p in items]),
        sizes=None if first.sizes is None else _copies_major([p.sizes for p in items]),
    )


def _copies_major(items: list[Any]) -> Tensor:
    return torch.stack(items, dim=1).flatten(0, 1)  # [C, B, ...] -> [C * B, ...]
