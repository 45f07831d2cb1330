"""How a run is divided: the layout of each batch, and the phases between which plugins wake and sleep."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from siglip2.core.batch import Patches
    from siglip2.core.plugin import Plugin
    from siglip2.core.views import View


@dataclass(frozen=True)
class Layout:
    """The shape of one global batch.

    Args:
        seq_len: patches per row.
        batch_size: examples per micro-batch over all devices.
        packed: whether several images share a row; else each has its own.
    """

    seq_len: int
    batch_size: int
    packed: bool = False


class Patchifier(Protocol):
    """Turns pixels into patches and decides the layout of every batch; frozen and picklable, it runs in workers.

    Attributes:
        patch_size: side of a patch in pixels.
        grid: (rows, columns) of the position table that a model trained with it has.
    """

    @property
    def patch_size(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def layouts(self) -> "tuple[Layout, ...]":
        """Every layout that a batch may have, once each."""

    def layout(self, index: int) -> Layout:
        """Returns the layout of global batch `index`: a pure function, the same on every rank and machine."""

    def eval_layout(self, batch_size: int) -> Layout:
        """Returns the layout of evaluation and prediction: one for all batches, each image in its own row."""

    def __call__(
        self, image: Tensor, view: "View", layout: Layout, rng: np.random.Generator | None = None
    ) -> "Patches":
        """Returns the patches of one image ([3, H, W] uint8) with a leading dimension of 1.

        They fill or are padded to `layout.seq_len`, unless the layout is packed. `rng` is given in training.
        """

    def contract(self) -> dict[str, object]:
        """Returns the pixel contract as plain values: size, resize filter, antialias, mean and std."""


@runtime_checkable
class Packer(Protocol):
    """A patchifier some of whose layouts are packed."""

    def pack(self, images: "Sequence[Patches]", layout: Layout) -> "Patches":
        """Joins images of any length into shared rows of `layout.seq_len` patches."""


class Positions:
    """Number of examples before each global batch: the sum of the earlier batch sizes.

    Args:
        patchifier: has the layouts.
    """

    def __init__(self, patchifier: Patchifier):
        self.patchifier, self._known = patchifier, (0, 0)  # batch number, examples before it

    def before(self, index: int) -> int:
        """Returns the number of examples in the batches 0 to index - 1; fast where the last call was just before."""
        number, examples = self._known if self._known[0] <= index else (0, 0)
        for earlier in range(number, index):
            examples += self.patchifier.layout(earlier).batch_size
        self._known = (index, examples)
        return examples


@dataclass(frozen=True)
class Phase:
    """A stretch of progress [start, stop) with the same plugins awake.

    Args:
        awake: names of the awake plugins, in recipe order.
    """

    start: float
    stop: float
    awake: tuple[str, ...]


def phases(plugins: "Iterable[Plugin]") -> tuple[Phase, ...]:
    """Returns the phases of a recipe, in order, covering [0, 1)."""
    plugins = list(plugins)
    edges = sorted({0.0, 1.0, *(p.start for p in plugins), *(p.stop for p in plugins)})
    return tuple(Phase(a, b, tuple(p.name for p in plugins if p.awake(a))) for a, b in pairwise(edges))


def phase_at(all_phases: tuple[Phase, ...], progress: float) -> Phase:
    """Returns the phase that `progress` in [0, 1] lies in; 1 belongs to the last."""
    return next((p for p in all_phases if p.start <= progress < p.stop), all_phases[-1])
