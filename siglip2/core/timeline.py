"""Where a run stands in the whole: its own steps, or those of a branch that goes on from a checkpoint of another."""

from dataclasses import dataclass

from siglip2.core.schedules import warmup_cosine


@dataclass(frozen=True)
class Timeline:
    """The stretch of a whole run that is trained: all of it, or a branch from a checkpoint to its end.

    A branch may take more or fewer steps than its stretch has: then schedules and learning rate pass slower or faster.

    Args:
        total: steps of the whole run.
        warmup: steps of linear warm-up at its beginning.
        first: its step at which this run begins; 0, or more for a branch.
        examples: examples that were trained on before.
    """

    total: int
    warmup: int
    first: float = 0.0
    examples: int = 0

    def position(self, step: int, steps: int) -> float:
        """Returns the step of the whole run that step `step` of this run's `steps` stands at."""
        return self.first + (self.total - self.first) * step / max(steps, 1)

    def progress(self, step: int, steps: int) -> float:
        """Returns the progress of the whole run, in [0, 1]."""
        return self.position(step, steps) / max(self.total, 1)

    def lr_factor(self, step: int, steps: int) -> float:
        """Returns the factor on the learning rate, in [0, 1]: the warm-up and cosine of the whole run.

        With 3.75 times the steps that are left, it is the stretched tail of NaFlex training (SigLIP 2, section 2.4.2).
        """
        return warmup_cosine(self.position(step, steps), total=self.total, warmup=self.warmup)
