"""A list of numbers as a few: mean, percentiles and a histogram."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 24


@dataclass(frozen=True)
class Spread:
    """How numbers are spread; all NaN and no bins if there are none.

    Args:
        count: numbers.
        mean: their mean.
        min: the smallest.
        p5: the 5th percentile; likewise `p25`, `median`, `p75`, `p95`, `p99`.
        max: the largest.
        edges: bounds of the bins, one more than bins; what lies beyond is in the outer bins.
        counts: numbers in each bin.
    """

    count: int
    mean: float
    min: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    p99: float
    max: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def spread(values: Sequence[float], *, edges: Sequence[float] | None = None) -> Spread:
    """Sums up numbers.

    Args:
        values: finite numbers.
        edges: bounds of the bins, rising; None takes up to 24 equal ones up to the 99th percentile, of whole width for
            whole numbers.
    """
    if not len(values):
        nan = float("nan")
        return Spread(0, nan, nan, nan, nan, nan, nan, nan, nan, nan, (), ())
    array = np.asarray(values, dtype=np.float64)
    low, p5, p25, median, p75, p95, p99, high = map(float, np.percentile(array, [0, 5, 25, 50, 75, 95, 99, 100]))
    bounds = np.asarray(_edges(array) if edges is None else edges, dtype=np.float64)
    counts = np.histogram(np.clip(array, bounds[0], bounds[-1]), bounds)[0]
    return Spread(
        count=len(array),
        mean=float(array.mean()),
        min=low,
        p5=p5,
        p25=p25,
        median=median,
        p75=p75,
        p95=p95,
        p99=p99,
        max=high,
        edges=tuple(float(bound) for bound in bounds),
        counts=tuple(int(count) for count in counts),
    )


def _edges(array: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> Sequence[float]:
    low, high = float(array.min()), float(np.percentile(array, 99))
    if np.array_equal(array, np.floor(array)):
        width = max(1, int(np.ceil((high - low + 1) / BINS)))
        number = int((high - low) // width) + 1
        return [low + width * i for i in range(number + 1)]
    high = max(high, low + 1e-9 * max(1.0, abs(low)))
    return [float(edge) for edge in np.linspace(low, high, BINS + 1)]
