"""The exponents are those of noise with a known one, of a slow second computation, and are compared only fairly."""

import math
import statistics

import numpy as np
import pytest
from gaussian_noise import fractional_noise

from siglip2.inspection.fractal import CAPTIONS, MIN_CAPTIONS, Ruler, compare, estimates, group_statistics, measure

PAPER = Ruler((25, 50, 75, 100, 200, 300), (25, 50, 75, 100, 200, 300), 5e-3, (2048,))


def found(bits, ruler=CAPTIONS, draws=2):
    return {name: one.value for name, one in estimates(measure(list(bits), ruler), seed=0, draws=draws).items()}


@pytest.mark.parametrize(("hurst", "rescaled", "joseph"), [(0.5, 0.548, 0.47), (0.7, 0.710, 0.63), (0.8, 0.781, 0.70)])
def test_long_noise_of_known_memory_gives_the_published_figures(hurst, rescaled, joseph):
    """The expected values were computed by others: R/S is biased up at 0.5 and down at high H, J is biased low."""
    numbers = found(fractional_noise(400, 2048, hurst, seed=1), PAPER)
    assert numbers["hurst"] == pytest.approx(rescaled, abs=0.012)
    assert numbers["joseph"] == pytest.approx(joseph, abs=0.03)


def slow(captions, scales, lags, eps):
    """All statistics in plain Python, from their definitions, one caption and one window after another."""
    ranges = {n: [] for n in scales}
    steps = {lag: [] for lag in lags}
    for bits in captions:
        mean, deviation = statistics.fmean(bits), statistics.pstdev(bits)
        x = [(b - mean) / deviation for b in bits]
        for n in scales:
            for begin in range(0, len(x) - n + 1, n):
                window = x[begin : begin + n]
                centre, total, path = statistics.fmean(window), 0.0, []
                for value in window:
                    total += value - centre
                    path.append(total)
                ranges[n].append((max(path) - min(path)) / statistics.pstdev(window))
        integral = [math.fsum(x[: t + 1]) for t in range(len(x))]
        for lag in lags:
            steps[lag] += [integral[t + lag] - integral[t] for t in range(len(x) - lag)]

    def slope(points):
        return statistics.linear_regression([math.log(n) for n in points], [math.log(v) for v in points.values()]).slope

    near = {lag: sum(abs(step) <= eps for step in some) / len(some) for lag, some in steps.items()}
    return {
        "hurst": slope({n: statistics.fmean(some) for n, some in ranges.items()}),
        "joseph": slope({lag: statistics.pstdev(some) for lag, some in steps.items()}),
        "self_similarity": -slope(near),
        "mean_bits": statistics.fmean(b for bits in captions for b in bits),
    }


def test_statistics_equal_a_slow_computation_on_captions_of_several_lengths():
    rng = np.random.default_rng(2)
    bits = [rng.gamma(2.0, 2.0, length) for length in rng.choice(CAPTIONS.lengths, 300)]
    expected = slow([b.tolist() for b in bits], CAPTIONS.scales, CAPTIONS.lags, CAPTIONS.eps)
    assert found(bits) == pytest.approx(expected, abs=1e-9)


def test_captions_are_cut_to_the_common_lengths_and_too_short_or_constant_ones_left_out():
    rng = np.random.default_rng(3)
    measured = measure([rng.normal(size=n) for n in (5, 15, 16, 19, 20, 33, 500)] + [np.ones(40)])
    assert measured.lengths_C.tolist() == [16, 16, 20, 32, 64]


def test_white_noise_of_caption_length_has_the_small_window_bias_and_no_more():
    numbers = found(np.random.default_rng(4).normal(size=(3000, 64)))
    assert 0.59 < numbers["hurst"] < 0.63
    assert numbers["joseph"] < 0.5


def test_memory_is_ordered_as_it_should_be_even_at_caption_length():
    numbers = [found(fractional_noise(1000, 64, hurst, seed=5)) for hurst in (0.5, 0.65, 0.8)]
    for name in ("hurst", "joseph", "self_similarity"):
        assert numbers[0][name] < numbers[1][name] < numbers[2][name]


def test_statistics_do_not_depend_on_the_unit_of_the_bits():
    bits = np.random.default_rng(6).normal(size=(300, 32)) + 8
    here, scaled = found(bits), found(3 * bits)
    assert [scaled[n] for n in ("hurst", "joseph", "self_similarity")] == pytest.approx(
        [here[n] for n in ("hurst", "joseph", "self_similarity")]
    )
    assert scaled["mean_bits"] == pytest.approx(3 * here["mean_bits"])


def test_bootstrap_intervals_cover_the_value_of_a_very_large_group():
    truth = found(fractional_noise(20_000, 32, 0.7, seed=7))["hurst"]
    intervals = [
        estimates(measure(list(fractional_noise(250, 32, 0.7, seed=100 + i))), seed=i, draws=200)["hurst"]
        for i in range(60)
    ]
    covered = sum(one.low <= truth <= one.high for one in intervals)
    assert covered >= 51  # of 60; 57 are expected, and 51 are missed once in a hundred times
    widths = [one.high - one.low for one in intervals]
    spread = statistics.stdev(one.value for one in intervals)
    assert statistics.fmean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.3)


def test_few_captions_are_not_judged():
    row = group_statistics("few", 500, measure(list(np.random.default_rng(8).normal(size=(MIN_CAPTIONS - 1, 32)))))
    assert row.estimates == {}
    assert str(MIN_CAPTIONS) in row.reason


def test_groups_that_differ_only_in_length_agree_once_lengths_are_equal():
    rng = np.random.default_rng(9)
    short = measure([rng.normal(size=n) for n in rng.choice([16, 24, 32], 4000, p=[0.7, 0.2, 0.1])])
    long = measure([rng.normal(size=n) for n in rng.choice([16, 24, 32], 4000, p=[0.1, 0.2, 0.7])])
    compared = compare("short", "long", short, long)
    apart = abs(
        group_statistics("short", 4000, short).estimates["joseph"].value
        - group_statistics("long", 4000, long).estimates["joseph"].value
    )
    equal = abs(compared.group_estimates["joseph"].value - compared.reference_estimates["joseph"].value)
    assert apart > 3 * equal
    assert compared.outside == ()
    assert compared.lengths == {n: min((short.lengths_C == n).sum(), (long.lengths_C == n).sum()) for n in (16, 24, 32)}
    assert compared.captions == sum(compared.lengths.values())


def test_a_group_with_another_memory_is_outside_and_one_with_the_same_is_not():
    reference = measure(list(fractional_noise(1500, 32, 0.6, seed=10)))
    same = compare("same", "people", measure(list(fractional_noise(1500, 32, 0.6, seed=11))), reference)
    other = compare("other", "people", measure(list(fractional_noise(1500, 32, 0.8, seed=12))), reference)
    assert same.outside == ()
    assert {"hurst", "joseph"} <= set(other.outside)


def test_groups_without_common_lengths_are_not_compared():
    rng = np.random.default_rng(13)
    compared = compare("a", "b", measure(list(rng.normal(size=(300, 16)))), measure(list(rng.normal(size=(300, 64)))))
    assert compared.captions == 0
    assert compared.group_estimates == {}
    assert "equal length" in compared.reason
