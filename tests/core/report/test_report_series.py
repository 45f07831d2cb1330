"""The numbers behind a chart."""

import math

import numpy as np
import pytest

from siglip2.core.report import Curve
from siglip2.core.report.markup import count, language_name, number, percent, probability
from siglip2.core.report.series import BUCKETS, envelope, series, tick_label, ticks, trend


def test_series_sorts_steps_and_keeps_the_last_of_a_repeated_one() -> None:
    data = series(Curve("loss", [3, 1, 2, 2], [30.0, 10.0, math.nan, 20.0]))
    assert data.steps.tolist() == [1, 2, 3]
    assert data.values.tolist() == [10, 20, 30]
    assert not data.broken


def test_trend_equals_a_weighted_mean_written_as_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=120)
    sigma = 2.0  # 120 points / 60
    expected = []
    for centre in range(120):
        near = range(max(0, centre - 6), min(120, centre + 7))
        weights = [math.exp(-0.5 * ((i - centre) / sigma) ** 2) for i in near]
        expected.append(sum(w * values[i] for w, i in zip(weights, near, strict=True)) / sum(weights))
    np.testing.assert_allclose(trend(values), expected)


def test_exact_schedule_is_not_smoothed() -> None:
    share = np.linspace(0, 1, 1000)
    schedule = np.minimum(share / 0.05, np.cos(share))
    assert trend(schedule) is schedule


def test_envelope_keeps_the_only_spike() -> None:
    values = np.zeros(5000)
    values[1234] = 9.0
    steps, kept = envelope(np.arange(5000.0), values)
    assert kept.max() == 9.0
    assert steps[kept.argmax()] == 1234
    assert len(kept) <= 2 * BUCKETS
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.0, 0.8, [0, 0.2, 0.4, 0.6, 0.8]), (17, 20, [17, 18, 19, 20])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    np.testing.assert_allclose(ticks(low, high, 4), expected)


@pytest.mark.parametrize(
    ("value", "largest", "expected"),
    [
        (0.0, 1e-3, "0"), (2.5e-4, 1e-3, "2.5e-4"), (12_500.0, 20_000.0, "12.5k"), (4000.0, 4000.0, "4000"),
        (0.25, 1.0, "0.25"), (1.5e6, 1.5e6, "1.5M"),
    ],
)  # fmt: skip
def test_tick_labels_are_short(value: float, largest: float, expected: str) -> None:
    assert tick_label(value, largest) == expected


def test_numbers_are_written_for_a_reader() -> None:
    assert [number(x) for x in (12480.4, 0.48231, 3.2e-5, 0.0, math.nan)] == [
        "12,480",
        "0.4823",
        "3.2e-5",
        "0",
        "–",
    ]
    assert [probability(p) for p in (0.934, 0.0421, 0.0004, 0.0)] == ["93%", "4.2%", "<0.1%", "0%"]
    assert percent(0.4213) == "42.1%"
    assert [count(1, "image"), count(5000, "image"), count(102, "class")] == [
        "1 image",
        "5,000 images",
        "102 classes",
    ]


def test_language_names_fall_back_to_the_code() -> None:
    names = [language_name(code) for code in ("en", "he", "zh-TW", "xx", "")]
    assert names == ["English", "Hebrew", "Chinese (TW)", "xx", ""]
