"""The charts draw the numbers that they are given, and nothing where there are none."""

import re

import pytest

from siglip2.core.report.charts import Interval, histogram, intervals


def test_columns_are_as_high_as_their_counts_and_empty_bins_have_none():
    drawn = histogram("Width", [0, 10, 20, 30, 40], [4, 0, 2, 1], unit="px")
    tops = [(float(bottom) - float(top)) for bottom, top in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", drawn)]
    assert len(tops) == 3
    assert [top / tops[0] for top in tops] == pytest.approx([1, 0.5, 0.25], abs=0.01)
    assert "20 to 30 px: 2 (28.6%)" in drawn


def test_nothing_counted_is_said():
    assert "There are none." in histogram("Width", [], [])
    assert "Nothing was estimated." in intervals("H", [])


def test_intervals_are_drawn_to_one_scale_with_the_band_between_its_strokes():
    drawn = intervals("H", [Interval("a <b>", 0.5, 0.4, 0.6), Interval("c", 0.8, 0.7, 0.9)], band=(0.4, 0.6))
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    lines = [tuple(map(float, pair)) for pair in re.findall(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*class="line"', drawn)]
    band = [float(x) for x in re.findall(r'x1="([\d.]+)"[^>]*class="lost"', drawn)]
    assert band == pytest.approx(lines[0], abs=0.2)
    assert (dots[1] - dots[0]) == pytest.approx(1.5 * (lines[0][1] - lines[0][0]), rel=0.01)
    assert "a &lt;b&gt;" in drawn


def test_a_single_value_without_a_width_is_drawn():
    assert "<circle" in intervals("H", [Interval("a", 0.5, 0.5, 0.5)])
