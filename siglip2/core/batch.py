"""What travels from a loader worker to the step: patches, batches, and what went wrong on the way."""

# B batch, C copies of a view, N patches, P values of a patch (row, column, channel; channel fastest)

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """Images as sequences of flattened patches.

    Args:
        patches: [B, N, P] uint8, P = patch_size * patch_size * 3 in the order row, column, channel.
        coords: [B, N, 2] or, when all images share them, [1, N, 2]; integer (y, x) of each patch in its grid.
        valid: [B, N] bool, false where padded; None where nothing is.
        grid: (rows, columns) when every image has this very grid in row-major order; None where grids vary.
    """

    patches: Tensor
    coords: Tensor
    valid: Tensor | None = None
    grid: tuple[int, int] | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Patches":
        """Returns the patches with `function` applied to every tensor."""
        valid = None if self.valid is None else function(self.valid)
        return replace(self, patches=function(self.patches), coords=function(self.coords), valid=valid)

    def rows(self, index: Tensor) -> "Patches":
        """Returns the images with the given row numbers, int64 [B']."""
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
    rows = view.patches.shape[0] if isinstance(view, Patches) else view.shape[0]
    copies = torch.arange(rows // size, device=kept.device) * size  # [C]
    index = (copies[:, None] + kept[None]).flatten()  # [C, B'] -> [C * B'], copies-major
    return view.rows(index) if isinstance(view, Patches) else view.index_select(0, index)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the views of single samples into the views of a batch, copies-major.

    Args:
        rows: one mapping per sample; each view has the leading dimension C (its number of copies).
    """
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}


def _stack(items: list[Any]) -> Any:
    first = items[0]
    if not isinstance(first, Patches):
        return torch.stack(items, dim=1).flatten(0, 1)  # [C, B, ...] -> [C * B, ...]
    patches = torch.stack([p.patches for p in items], dim=1).flatten(0, 1)
    if first.grid is not None:
        return Patches(patches, first.coords[:1], None, first.grid)
    coords = torch.stack([p.coords for p in items], dim=1).flatten(0, 1)
    valid = None if first.valid is None else torch.stack([p.valid for p in items], dim=1).flatten(0, 1)
    return Patches(patches, coords, valid)
