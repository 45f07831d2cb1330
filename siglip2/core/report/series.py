"""The numbers behind a chart: ordered, smoothed and thinned series, and round ticks."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siglip2.core.report.data import Curve

Floats = npt.NDArray[np.float64]

SMOOTH_FROM = 40  # fewer points are shown as they are, with a dot each
BUCKETS = 180  # about one per two pixels of a chart
LARGEST = 1e300  # keeps differences of absurd values finite


@dataclass(frozen=True)
class Series:
    """A curve ready to draw: finite points in order, and the steps where the value was not finite."""

    steps: Floats
    values: Floats
    trend: Floats
    lost: Floats

    @property
    def broken(self) -> bool:
        """Whether the curve ends in a value that is not finite."""
        return bool(len(self.lost)) and (not len(self.steps) or bool(self.lost[-1] > self.steps[-1]))

    @property
    def noisy(self) -> bool:
        """Whether the trend differs visibly from the values."""
        return self.trend is not self.values


def series(curve: Curve) -> Series:
    """The curve sorted by step, the last value of a repeated step kept, with its trend."""
    by_step = dict(zip(curve.steps, curve.values, strict=True))
    steps = np.array(sorted(by_step), dtype=np.float64)
    values = np.array([by_step[step] for step in sorted(by_step)], dtype=np.float64)
    finite = np.isfinite(values)
    kept = np.clip(values[finite], -LARGEST, LARGEST)
    return Series(steps[finite], kept, trend(kept), steps[~finite])


def trend(values: Floats) -> Floats:
    """Centred Gaussian average over about 4 % of the points; the same array if that changes nothing visible.

    Centred, because an exponential average lags behind and would show every drop too late.
    """
    if len(values) < SMOOTH_FROM:
        return values
    sigma = max(1.5, len(values) / 60)
    offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    reach = len(offsets) // 2
    weight = np.convolve(np.ones_like(values), kernel)[reach:-reach]
    smooth = np.convolve(values, kernel)[reach:-reach] / weight
    # A schedule is exact: judge the noise from point to point, which its corners do not have.
    noise = float(np.median(np.abs(np.diff(values, 2))))
    return smooth if noise > 0.004 * float(np.ptp(values)) else values


def envelope(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """At most two points per bucket, its smallest and largest, so that thinning hides no spike."""
    if len(values) <= 2 * BUCKETS:
        return steps, values
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), BUCKETS):
        extremes = {int(bucket[np.argmin(values[bucket])]), int(bucket[np.argmax(values[bucket])])}
        kept.extend(sorted(extremes))
    return steps[kept], values[kept]


def thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Evenly chosen points, the first and the last among them."""
    if len(values) <= BUCKETS:
        return steps, values
    kept = np.unique(np.linspace(0, len(values) - 1, BUCKETS).round().astype(int))
    return steps[kept], values[kept]


def value_range(values: Floats, trend: Floats) -> tuple[float, float]:
    """Range to draw: the trend whole, the raw values without their most extreme hundredth."""
    low, high = float(trend.min()), float(trend.max())
    if trend is not values:
        inner = np.percentile(values, [0.5, 99.5])
        low, high = min(low, float(inner[0])), max(high, float(inner[1]))
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * abs(high) or 0.5
        return low - margin, high + margin
    return low, high


def tick_step(low: float, high: float, wanted: int) -> float:
    """Distance of about `wanted` round ticks: 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within [low, high]."""
    step = tick_step(low, high, wanted)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float, largest: float) -> str:
    """A tick in few letters, all of one axis in one form: `0.25`, `12.5k`, `2.5e-4`."""
    if value == 0:
        return "0"
    if largest >= 1e13 or largest < 0.01:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or (largest >= size and size > 1e3):
            return f"{value / size:.6g}{suffix}"
    return f"{value:.6g}"
