"""How a run is divided: the layout of each batch, and the phases between which plugins wake and sleep."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from siglip2.core.batch import Patches
    from siglip2.core.plugin import Plugin
    from siglip2.core.views import View


@dataclass(frozen=True)
class Layout:
    """The shape of one global batch.

    Args:
        seq_len: patches per image.
        batch_size: examples per micro-batch over all devices.
    """

    seq_len: int
    batch_size: int


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

    def layout(self, index: int) -> Layout:
        """Returns the layout of global batch `index`: a pure function, the same on every rank and machine."""

    def __call__(self, image: Tensor, view: "View", layout: Layout) -> "Patches":
        """Returns the patches of one image ([3, H, W] uint8) with a leading dimension of 1."""

    def contract(self) -> dict[str, object]:
        """Returns the pixel contract as plain values: size, resize filter, antialias, mean and std."""


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
