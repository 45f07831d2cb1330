"""Charts as inline SVG: a panel per training curve, histograms, intervals, and the bars of the tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siglip2.core.report.data import Curve
from siglip2.core.report.markup import Html, count, el, join, number, percent
from siglip2.core.report.series import (
    Floats,
    Series,
    envelope,
    series,
    thinned,
    tick_label,
    tick_step,
    ticks,
    value_range,
)

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 370, 10, 172
MAX_LOST_MARKS = 60


class Axes:
    """Maps steps and values of one panel to SVG coordinates."""

    def __init__(self, data: Series) -> None:
        low, high = value_range(data.values, data.trend)
        step = tick_step(low, high, 4)
        self.low, self.high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
        every = np.concatenate([data.steps, data.lost])
        self.first, self.last = float(every.min()), float(every.max())
        if 0 < self.first < 0.15 * self.last:
            self.first = 0.0
        if self.first == self.last:
            self.first, self.last = self.first - 1, self.last + 1

    def x(self, steps: Floats) -> Floats:
        """Horizontal positions of steps."""
        return LEFT + (RIGHT - LEFT) * (steps - self.first) / (self.last - self.first)

    def y(self, values: Floats) -> Floats:
        """Vertical positions of values, those outside the range held at its edge."""
        share = (values - self.low) / (self.high - self.low)
        return BOTTOM - (BOTTOM - TOP) * np.clip(share, 0.0, 1.0)

    def grid(self) -> Html:
        """Grid lines and tick labels."""
        rows = ticks(self.low, self.high, 4)
        columns = [step for step in ticks(self.first, self.last, 4) if step == int(step)]
        parts = []
        for value, y in zip(rows, self.y(np.array(rows)), strict=True):
            parts.append(el("line", x1=LEFT, x2=RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", cls="grid"))
            label = tick_label(value, max(abs(rows[0]), abs(rows[-1])))
            parts.append(el("text", label, x=LEFT - 7, y=f"{y + 3.5:.1f}", cls="tick end"))
        for index, (step, x) in enumerate(zip(columns, self.x(np.array(columns)), strict=True)):
            label = tick_label(step, max(abs(columns[0]), abs(columns[-1])))
            suffix = " steps" if index == len(columns) - 1 else ""
            anchor = "end" if x > RIGHT - 30 else "middle"
            parts.append(el("text", label + suffix, x=f"{x:.1f}", y=BOTTOM + 18, cls=f"tick {anchor}"))
        return join(parts)


def polyline(axes: Axes, steps: Floats, values: Floats, *, cls: str) -> Html:
    """A line through the points."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(axes.x(steps), axes.y(values), strict=True))
    return el("polyline", points=points, cls=cls)


def dots(axes: Axes, data: Series) -> Html:
    """A dot per point, for curves of few points."""
    places = zip(axes.x(data.steps), axes.y(data.values), strict=True)
    return join(el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, cls="dot") for x, y in places)


def lost_marks(axes: Axes, data: Series) -> Html:
    """Short strokes on the step axis where the value was not finite."""
    chosen, _ = thinned(data.lost, data.lost)
    positions = axes.x(chosen[:: math.ceil(len(chosen) / MAX_LOST_MARKS) or 1])
    return join(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=BOTTOM - 7, y2=BOTTOM, cls="lost") for x in positions)


def drawing(data: Series, title: str) -> Html:
    """The SVG of a panel; its points are repeated as data for the reading under the pointer."""
    axes = Axes(data)
    lines = []
    if data.noisy:
        lines.append(polyline(axes, *envelope(data.steps, data.values), cls="raw"))
        lines.append(polyline(axes, *thinned(data.steps, data.trend), cls="line"))
    else:
        # The line bridges values that are not finite; the strokes on the axis say where they were.
        lines.append(polyline(axes, *thinned(data.steps, data.values), cls="line"))
    if len(data.values) <= 40:
        lines.append(dots(axes, data))
    steps, values = thinned(data.steps, data.trend)
    places = zip(axes.x(steps), axes.y(values), steps, values, strict=True)
    points = [[round(x, 1), round(y, 1), int(step), number(value)] for x, y, step, value in places]
    cursor = el("g", el("line", y1=TOP, y2=BOTTOM), el("circle", r=3.5), cls="cursor")
    return el(
        "svg",
        axes.grid(),
        *lines,
        lost_marks(axes, data),
        cursor,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
        data_points=json.dumps(points, separators=(",", ":")),
    )


def panel(curve: Curve, title: str) -> Html:
    """A figure: name and last value above, the chart below; a curve without a finite value says so."""
    data = series(curve)
    name = el("span", title, cls="curve-name")
    if not len(data.values):
        empty = el("p", "No finite value was logged.", cls="empty")
        return el("figure", el("figcaption", name), empty, cls="panel")
    unit = f" {curve.unit}" if curve.unit else ""
    last = number(float(data.trend[-1]))
    reading = el("span", last, el("small", unit), cls="reading")
    summary = f"{curve.name}: from {number(float(data.values[0]))} to {last}{unit}"
    told = f"{count(len(data.lost), 'value')} not finite{', the last one too' if data.broken else ''}"
    lost = [el("p", told, cls="lost-note")] if len(data.lost) else []
    return el("figure", el("figcaption", name, reading), drawing(data, summary), *lost, cls="panel", data_unit=unit)


def bar(share: float, *, behind: float = math.nan, chance: float = math.nan) -> Html:
    """A horizontal bar of a fraction, with a paler one behind it and a stroke where chance is."""

    def width(fraction: float) -> str:
        return f"width:{100 * min(max(fraction, 0.0), 1.0):.2f}%"

    parts = []
    if math.isfinite(behind):
        parts.append(el("i", cls="behind", style=width(behind)))
    if math.isfinite(share):
        parts.append(el("i", cls="front", style=width(share)))
    if math.isfinite(chance):
        left = width(chance).replace("width", "left")
        parts.append(el("i", cls="chance", style=left, title=f"chance {percent(chance)}"))
    return el("span", *parts, cls="bar")


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], *, reading: str = "", unit: str = "") -> Html:
    """A figure of columns, all equally wide whatever their bins; without counts it says so.

    Args:
        title: what is counted.
        edges: bounds of the bins, one more than bins.
        counts: numbers in each bin.
        reading: shown beside the title, such as the median.
        unit: behind the last label of the axis.
    """
    caption = el("figcaption", el("span", title, cls="curve-name"), el("span", reading, cls="reading"))
    if not sum(counts):
        return el("figure", caption, el("p", "There are none.", cls="empty"), cls="panel")
    top, total = max(counts), sum(counts)
    wide = (RIGHT - LEFT) / len(counts)
    parts = [_count_grid(top)]
    for i, count_ in enumerate(counts):
        if count_:
            x, y = LEFT + wide * i, BOTTOM - (BOTTOM - TOP) * count_ / top
            bin_ = f"{number(edges[i])} to {number(edges[i + 1])} {unit}".rstrip()
            told = f"{bin_}: {count_:,} ({percent(count_ / total)})"
            shape = f"M{x + 0.5:.1f} {BOTTOM}V{y:.1f}H{x + wide - 0.5:.1f}V{BOTTOM}Z"
            parts.append(el("path", el("title", told), d=shape, cls="dot"))
    every = max(1, math.ceil(len(edges) / 6))
    for i in range(0, len(edges), every):
        last = i + every >= len(edges)
        label = number(edges[i]) + (f" {unit}" if last and unit else "")
        anchor = "end" if i == len(edges) - 1 else "middle"
        parts.append(el("text", label, x=f"{LEFT + wide * i:.1f}", y=BOTTOM + 18, cls=f"tick {anchor}"))
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {reading}")
    return el("figure", caption, svg, cls="panel")


def _count_grid(top: int) -> Html:
    """Lines and labels of a count axis from 0 to `top`."""
    parts = []
    for value in [tick for tick in ticks(0, top, 4) if tick == int(tick)]:
        y = f"{BOTTOM - (BOTTOM - TOP) * value / top:.1f}"
        parts.append(el("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, cls="grid"))
        parts.append(el("text", tick_label(value, top), x=LEFT - 7, y=f"{float(y) + 3.5:.1f}", cls="tick end"))
    return join(parts)


@dataclass(frozen=True)
class Interval:
    """A value with its interval, one row of `intervals`."""

    name: str
    value: float
    low: float
    high: float


def intervals(title: str, rows: Sequence[Interval], *, band: tuple[float, float] | None = None) -> Html:
    """A figure with a row for each value: its interval as a line and itself as a dot, over a band of what is usual.

    Args:
        title: what was estimated.
        rows: finite values.
        band: two lines, from and to; None draws none.
    """
    caption = el("figcaption", el("span", title, cls="curve-name"))
    if not rows:
        return el("figure", caption, el("p", "Nothing was estimated.", cls="empty"), cls="panel")
    ends = [end for row in rows for end in (row.low, row.high)] + list(band or ())
    pad = 0.05 * (max(ends) - min(ends)) or 0.5
    low, high = min(ends) - pad, max(ends) + pad
    bottom = TOP + 34 * len(rows) + 6

    def x(value: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * (value - low) / (high - low):.1f}"

    marks = ticks(low, high, 4)
    parts = [el("line", x1=x(value), x2=x(value), y1=TOP, y2=bottom, cls="grid") for value in marks]
    parts += [el("text", number(round(value, 9)), x=x(value), y=bottom + 16, cls="tick middle") for value in marks]
    parts += [el("line", x1=x(edge), x2=x(edge), y1=TOP, y2=bottom, cls="lost") for edge in band or ()]
    for i, row in enumerate(rows):
        y = TOP + 34 * i + 26
        told = f"{row.name}: {number(row.value)} ({number(row.low)} to {number(row.high)})"
        parts.append(el("text", row.name, x=LEFT, y=y - 9, cls="tick"))
        parts.append(el("line", el("title", told), x1=x(row.low), x2=x(row.high), y1=y, y2=y, cls="line"))
        parts.append(el("circle", el("title", told), cx=x(row.value), cy=y, r=4, cls="dot"))
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {bottom + 26}", role="img", aria_label=title)
    return el("figure", caption, svg, cls="panel")
