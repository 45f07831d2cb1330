"""Schedules: big_vision's cosine, and weights over progress."""

import numpy as np
import pytest

from siglip2.core.schedules import Schedule, value_at, values_of, warmup_cosine


def big_vision(step, total, warmup):
    """create_learning_rate_schedule of big_vision/utils.py with decay_type="cosine", linear_end = 0, in numpy."""
    progress = np.clip((step - warmup) / float(total - warmup), 0.0, 1.0)
    lr = 1.0 * 0.5 * (1.0 + np.cos(np.pi * progress))
    return lr * np.minimum(1.0, step / warmup) if warmup else lr


@pytest.mark.parametrize(("total", "warmup"), [(1_220_703, 20_000), (300, 60), (10, 0), (2, 1)])
def test_learning_rate_factor_is_big_visions(total, warmup):
    steps = np.unique(np.linspace(0, total, 101).astype(int))
    ours = [warmup_cosine(int(s), total=total, warmup=warmup) for s in steps]
    np.testing.assert_allclose(ours, big_vision(steps, total, warmup), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("share", "lr"), [(0.5, 5.13e-4), (0.8, 9.86e-5), (0.9, 2.53e-5), (0.95, 6.36e-6), (1.0, 0.0)])
def test_learning_rate_of_the_paper_run_at_its_stage_boundaries(share, lr):
    steps = 40_000_000_000 // 32_768
    assert 1e-3 * warmup_cosine(int(share * steps), total=steps, warmup=20_000) == pytest.approx(lr, rel=2e-3)


@pytest.mark.parametrize("progress", np.linspace(0, 1, 21))
def test_schedule_is_linear_interpolation(progress):
    at, values = [0.2, 0.5, 0.9], [1.0, 0.25, 4.0]
    assert Schedule(at, values)(progress) == pytest.approx(np.interp(progress, at, values))


def test_number_is_its_own_schedule():
    assert value_at(0.25, 0.7) == 0.25
    assert value_at(Schedule([0.0, 1.0], [0.0, 2.0]), 0.7) == pytest.approx(1.4)


def test_values_of_a_number_or_a_schedule():
    assert values_of(0.25) == [0.25]
    assert values_of(Schedule([0.0, 1.0], [0.5, 2.0])) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("at", "values"), [([], []), ([0.0, 1.0], [1.0]), ([0.5, 0.2], [1, 2]), ([0.2, 0.2], [1, 2]), ([0.0, 1.5], [1, 2])]
)
def test_schedule_that_is_no_function_of_progress_is_an_error(at, values):
    with pytest.raises(ValueError, match="schedule needs|must increase"):
        Schedule(at, values)
