"""Phases: which plugins are awake when. Positions: where in the stream a batch begins."""

import pytest

from siglip2 import Plugin
from siglip2.core.layout import Positions, phase_at, phases
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex


def named(name, start=0.0, stop=1.0):
    return type("Named", (Plugin,), {"name": name})(start=start, stop=stop)


RECIPE = [named("a"), named("b", 0.8), named("c", 0.25, 0.8), named("d", 0.25)]
EXPECTED = [(0.0, 0.25, ("a",)), (0.25, 0.8, ("a", "c", "d")), (0.8, 1.0, ("a", "b", "d"))]


def test_phases_change_where_a_plugin_starts_or_stops():
    assert [(p.start, p.stop, p.awake) for p in phases(RECIPE)] == EXPECTED


def test_recipe_whose_plugins_never_sleep_has_one_phase():
    assert [(p.start, p.stop, p.awake) for p in phases([named("a"), named("b")])] == [(0.0, 1.0, ("a", "b"))]


@pytest.mark.parametrize(
    ("progress", "number"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.79, 1), (0.8, 2), (0.999, 2), (1.0, 2)]
)
def test_progress_lies_in_the_phase_that_it_has_reached(progress, number):
    assert phase_at(phases(RECIPE), progress) == phases(RECIPE)[number]


@pytest.mark.parametrize("progress", [i / 40 for i in range(40)])
def test_phase_says_what_each_plugin_says_of_itself(progress):
    assert phase_at(phases(RECIPE), progress).awake == tuple(p.name for p in RECIPE if p.awake(progress))


@pytest.mark.parametrize(("start", "stop"), [(-0.1, 1), (0.5, 0.5), (0.8, 0.2), (0, 1.2), (1, 1)])
def test_start_and_stop_outside_of_the_run_are_an_error(start, stop):
    with pytest.raises(ValueError, match="plugin 'a': expected 0 <= start < stop <= 1"):
        named("a", start, stop)


def test_layout_of_fixed_is_that_of_any_batch():
    patchifier = Fixed(image_size=384, patch_size=14, batch_size=8).patchifier()
    assert {patchifier.layout(i) for i in range(5)} == {patchifier.layout(0)}
    assert patchifier.layout(0).seq_len == 27 * 27


UNEVEN = NaFlex(seq_lens=[4, 9, 16], batch_size=8, batch_sizes={16: 3}, shares={16: 2}).patchifier()


@pytest.mark.parametrize("patchifier", [UNEVEN, Fixed(batch_size=6).patchifier()])
def test_position_of_a_batch_is_the_sum_of_the_sizes_before_it(patchifier):
    sizes = [patchifier.layout(i).batch_size for i in range(50)]
    positions = Positions(patchifier)
    for index in (0, 1, 2, 7, 8, 49, 12, 0, 30):  # forwards, backwards, and by leaps
        assert positions.before(index) == sum(sizes[:index])


def test_positions_asked_for_in_any_order_are_those_of_one_asked_for_once():
    walked = Positions(UNEVEN)
    assert [walked.before(i) for i in range(0, 90, 3)] == [Positions(UNEVEN).before(i) for i in range(0, 90, 3)]


def test_far_position_is_whole_rounds_times_their_examples():
    assert Positions(UNEVEN).before(40_000) == 10_000 * (8 + 8 + 3 + 3)
