"""The order of samples is a permutation each epoch and a pure function of seed and position."""

import pickle
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest

from siglip2.core.data.order import Order

SIZES = [7, 0, 5, 11, 3, 8]  # one empty shard
TOTAL = sum(SIZES)
WINDOWS = [None, 1, 2, 4, 6, 99]


@dataclass(frozen=True)
class Given:
    """Weights of the shards of SIZES, kept in memory."""

    values: tuple[float, ...]

    def read(self, shard):
        start = sum(SIZES[:shard])
        return np.array(self.values[start : start + SIZES[shard]])

    @property
    def totals(self):
        return np.array([self.read(shard).sum() for shard in range(len(SIZES))])


# quarters, so that float64 adds them exactly; a third are 0, and so is the whole fifth shard
UNEVEN = Given(tuple(0.0 if i % 3 == 0 or 23 <= i < 26 else i % 7 / 4 for i in range(TOTAL)))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_epoch_visits_every_sample_once(window, shuffle):
    epochs, indices = Order(SIZES, 3, shuffle=shuffle, window=window).many(0, 3 * TOTAL)
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(TOTAL))
    assert epochs.tolist() == sorted(epochs.tolist())


@pytest.mark.parametrize("window", WINDOWS)
def test_answer_does_not_depend_on_the_access_pattern(window):
    straight = [Order(SIZES, 5, window=window)[p] for p in range(2 * TOTAL)]
    order = Order(SIZES, 5, window=window)
    jumping = {p: order[p] for p in np.random.default_rng(0).permutation(2 * TOTAL).tolist()}
    assert [jumping[p] for p in range(2 * TOTAL)] == straight
    assert order[3:40:2] == straight[3:40:2]
    for start, count in [(0, 0), (1, 1), (TOTAL - 2, 5), (9, 2 * TOTAL - 9)]:
        epochs, indices = order.many(start, count)
        assert list(zip(epochs, indices, strict=True)) == straight[start : start + count]


def test_shuffle_equals_an_independent_computation():
    def draw(count, *purpose):
        bits = np.random.Philox(np.random.SeedSequence(11, spawn_key=purpose)).random_raw(count)
        return sorted(range(count), key=lambda i: bits[i])

    shards = draw(len(SIZES), 0, 1)
    expected = []
    for block, begin in enumerate(range(0, len(SIZES), 2)):
        samples = [sum(SIZES[:s]) + i for s in shards[begin : begin + 2] for i in range(SIZES[s])]
        expected += [samples[i] for i in draw(len(samples), 1, 1, block)]
    assert Order(SIZES, 11, window=2).many(TOTAL, TOTAL)[1].tolist() == expected


def test_window_reads_few_shards_at_a_time():
    order = Order([10] * 20, 0, window=2)
    for block in range(10):
        indices = order.many(20 * block, 20)[1]
        assert len({i // 10 for i in indices.tolist()}) == 2


def test_seed_and_epoch_change_the_order():
    first, second = Order(SIZES, 0).many(0, 2 * TOTAL)[1].reshape(2, TOTAL)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Order(SIZES, 1).many(0, TOTAL)[1])


def test_no_shuffle_is_the_stored_order():
    assert Order([2, 1], 0, shuffle=False)[0:5] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_order_survives_pickling_without_its_cache():
    order = Order([100_000], 0)
    before = order.many(10, 50)
    stored = pickle.dumps(order)
    assert len(stored) < 2000
    np.testing.assert_array_equal(pickle.loads(stored).many(10, 50), before)


def test_only_the_blocks_in_use_are_kept():
    order = Order([50] * 40, 0, window=1)
    order.many(0, 2000)
    assert sum(block.size for block in order._blocks.values()) <= 100


def test_substitute_is_fixed_spread_and_never_the_bad_sample():
    order = Order(SIZES, 2)
    drawn = [order.substitute(p, a) for p in range(TOTAL) for a in range(1, 6)]
    assert drawn == [Order(SIZES, 2).substitute(p, a) for p in range(TOTAL) for a in range(1, 6)]
    assert all(d != order[i // 5][1] for i, d in enumerate(drawn))
    assert set(drawn) == set(range(TOTAL))
    with pytest.raises(ValueError, match="attempt is 0"):
        order.substitute(3, 0)


def test_positions_beyond_32_bits_work():
    far = 10**13 + 7
    epoch, index = Order(SIZES, 0)[far]
    assert epoch == far // TOTAL
    assert 0 <= index < TOTAL


@pytest.mark.parametrize("window", WINDOWS)
def test_weighted_epoch_equals_systematic_sampling_in_whole_fractions(window):
    order, total = Order(SIZES, 5, window=window, weights=UNEVEN), sum(map(Fraction, UNEVEN.values))
    for epoch in range(4):
        bits = int(np.random.Philox(np.random.SeedSequence(5, spawn_key=(3, epoch))).random_raw(1)[0])
        u = Fraction(bits >> 11, 2**53)
        ends = [int(end * TOTAL / total + u) for end in accumulate(map(Fraction, UNEVEN.values))]
        expected = {i: b - a for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a}
        assert Counter(order.many(epoch * TOTAL, TOTAL)[1].tolist()) == expected


def test_samples_come_as_often_as_they_weigh():
    drawn = np.bincount(Order(SIZES, 5, window=2, weights=UNEVEN).many(0, 2000 * TOTAL)[1], minlength=TOTAL)
    wanted = np.array(UNEVEN.values) * 2000 * TOTAL / sum(UNEVEN.values)
    assert not drawn[wanted == 0].any()
    assert abs(drawn - wanted).max() < 4 * 0.5 * 2000**0.5  # an epoch's count varies by at most half a place


@pytest.mark.parametrize("window", WINDOWS)
def test_equal_weights_visit_every_sample_once_an_epoch(window):
    order = Order(SIZES, 3, window=window, weights=Given((0.1,) * TOTAL))
    for epoch in range(3):
        assert sorted(order.many(epoch * TOTAL, TOTAL)[1].tolist()) == list(range(TOTAL))


def test_weighted_answer_does_not_depend_on_the_access_pattern():
    straight = Order(SIZES, 5, window=2, weights=UNEVEN).many(0, 3 * TOTAL)
    order = pickle.loads(pickle.dumps(Order(SIZES, 5, window=2, weights=UNEVEN)))
    for position in np.random.default_rng(0).permutation(3 * TOTAL).tolist():
        assert order[position] == (straight[0][position], straight[1][position])


def test_weighted_substitute_is_drawn_by_weight_from_the_others():
    order = Order(SIZES, 2, weights=UNEVEN)
    position = next(p for p in range(TOTAL) if UNEVEN.values[order[p][1]])
    bad = order[position][1]
    drawn = Counter(order.substitute(position, attempt) for attempt in range(1, 4001))
    others = np.array([0 if i == bad else w for i, w in enumerate(UNEVEN.values)])
    wanted = 4000 * others / others.sum()
    assert set(drawn) == set(np.flatnonzero(others).tolist())
    assert all(abs(drawn[i] - wanted[i]) < 5 * wanted[i] ** 0.5 for i in drawn)


def test_the_only_sample_with_a_weight_has_no_substitute():
    weights = Given(tuple(float(i == 9) for i in range(TOTAL)))
    assert Order(SIZES, 2, weights=weights).substitute(3, 1) == 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Order([], 0), "nothing to order: 0 shards"),
        (lambda: Order([0, 0], 0), "2 shards with 0 samples"),
        (lambda: Order([1], -1), "seed is -1"),
        (lambda: Order(SIZES, 0, shuffle=False, weights=UNEVEN), "weights are for a shuffled order"),
        (lambda: Order([1], 0, window=0), "window is 0"),
        (lambda: Order([1], 0)[-1], "position is -1"),
        (lambda: Order([1], 0)[0:], "give the slice a stop"),
    ],
)
def test_errors_say_what_was_found(build, message):
    with pytest.raises(ValueError, match=message):
        build()
