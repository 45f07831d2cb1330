"""Scalars that change over a run: the learning-rate factor, and weights given as a `Schedule`."""

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Schedule:
    """A piecewise-linear function of progress, constant before the first and after the last point.

    Args:
        at: progress of each point, increasing, each in [0, 1].
        values: the value at each point.
    """

    at: list[float]
    values: list[float]

    def __post_init__(self) -> None:
        if not self.at or len(self.at) != len(self.values):
            raise ValueError(f"a schedule needs as many `values` as `at`, found {self.values} at {self.at}")
        if list(self.at) != sorted(set(self.at)) or not 0 <= self.at[0] <= self.at[-1] <= 1:
            raise ValueError(f"`at` must increase within [0, 1], found {self.at}")

    def __call__(self, progress: float) -> float:
        """Returns the value at `progress` in [0, 1]."""
        points = list(zip(self.at, self.values, strict=True))
        if progress <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in pairwise(points):
            if progress <= x1:
                return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)
        return points[-1][1]


def value_at(scalar: float | Schedule, progress: float) -> float:
    """Returns a number as it is, a `Schedule` evaluated at `progress`."""
    return scalar(progress) if isinstance(scalar, Schedule) else scalar


def values_of(scalar: float | Schedule) -> list[float]:
    """Returns the values that a number or a `Schedule` is made of; all others lie between them."""
    return list(scalar.values) if isinstance(scalar, Schedule) else [scalar]


def warmup_cosine(step: float, *, total: int, warmup: int) -> float:
    """Returns the learning-rate factor in [0, 1]: linear warm-up times a cosine to zero.

    Source: google-research/big_vision, big_vision/utils.py, create_learning_rate_schedule:
    0.5 (1 + cos(pi p)) min(1, s / warmup), with p = clip((s - warmup) / (total - warmup), 0, 1).

    Args:
        step: optimizer steps done, from 0; a branch may stand between two.
        total: optimizer steps of the whole run.
        warmup: optimizer steps of the linear warm-up, less than `total`.
    """
    p = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    ramp = min(1.0, step / warmup) if warmup else 1.0
    return 0.5 * (1 + math.cos(math.pi * p)) * ramp
