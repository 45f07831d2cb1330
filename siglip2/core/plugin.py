"""What every plugin is: an `nn.Module` with hooks, awake for a stretch of progress."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from siglip2.core.hooks import hookimpl
from siglip2.core.schedules import Schedule, value_at

if TYPE_CHECKING:
    from siglip2.core.step import Step


class Plugin(nn.Module):
    """A piece of training scaffolding, reachable by name in recipes and in checkpoints (`plugins.<name>.*`).

    Args:
        start: progress in [0, 1] at which the plugin wakes; before that it is not called at all.
        stop: progress in [0, 1] from which it sleeps again.

    Raises:
        ValueError: if not 0 <= start < stop <= 1.
    """

    name: ClassVar[str]

    offers: ClassVar[tuple[str, ...]] = ()
    """Names of the image encoders that its `encoders` hook returns."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the image encoders that another plugin of the recipe has to offer while this one is awake."""

    def __init__(self, start: float = 0.0, stop: float = 1.0):
        super().__init__()
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"plugin '{self.name}': expected 0 <= start < stop <= 1, in shares of the run (0.8 = 80 %), "
                f"found start={start}, stop={stop}"
            )
        self.start, self.stop = start, stop

    def awake(self, progress: float) -> bool:
        """Says whether the plugin is called at `progress` in [0, 1)."""
        return self.start <= progress < self.stop

    def kept(self, size: int) -> int | None:
        """Returns how many rows of a global batch of `size` a curator keeps; None if it does not say beforehand."""
        return None

    def chosen_by(self) -> dict[str, object]:
        """Returns plain values that decide, beside its options, which rows a curator keeps; compared on resume."""
        return {}


class Objective(Plugin):
    """A plugin that returns a loss term.

    Args:
        weight: factor of the loss term: a number, or a schedule over progress.
        start: progress in [0, 1] at which the objective wakes; before that it is not called at all.
        stop: progress in [0, 1] from which it sleeps again.
    """

    accumulates: ClassVar[bool] = False
    """Whether averaging the losses of micro-batches gives the loss of the large batch: false for losses over pairs."""

    same_over_ranks: ClassVar[bool] = True
    """Whether the mean over ranks of its gradients is that of one process on the joined batch; false only where chance
    is drawn on the device."""

    def __init__(self, weight: float | Schedule = 1.0, start: float = 0.0, stop: float = 1.0):
        super().__init__(start=start, stop=stop)
        self.weight = weight

    def loss(self, step: "Step") -> Tensor:
        """Returns the unweighted loss of one step, a scalar."""
        raise NotImplementedError(f"objective '{self.name}' has no `loss(self, step)`")

    @hookimpl
    def losses(self, step: "Step") -> dict[str, Tensor]:
        return {self.name: value_at(self.weight, step.progress) * self.loss(step)}
