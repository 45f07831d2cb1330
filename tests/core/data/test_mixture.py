"""Every stretch of a mixed stream has each source's share, and is a pure function of seed and position."""

import pickle
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from toy_samples import write_shard

import siglip2.core.data.mixture
from siglip2.core.data.fields import BadSample
from siglip2.core.data.mixture import BLOCK, JoinedSource, Mixture, seed_of
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.testing import TinySource

SIZES = {"english": [40, 7], "other": [13], "third": [5, 5, 5]}
ODD = {"english": 1.0, "other": 0.123456, "third": 1 / 3}


def orders(*names):
    return {name: Order(SIZES[name], seed_of(4, name)) for name in names}


def mixture(shares, seed=4):
    return Mixture(orders(*shares), shares, seed)


def owner(numbers):
    """The source of each sample number."""
    return np.searchsorted(np.cumsum([sum(sizes) for sizes in SIZES.values()]), numbers, side="right")


def test_published_shares_are_exact_in_every_block():
    numbers = mixture({"english": 9, "other": 1}).many(0, 20 * BLOCK)[1]
    per_block = (numbers >= sum(SIZES["english"])).reshape(20, BLOCK).sum(axis=1)
    assert set(per_block.tolist()) == {100}


@pytest.mark.parametrize("share", [0.7, 0.29, 0.001])
def test_share_in_whole_per_mille_is_not_rounded_away(share):
    found = mixture({"english": 1 - share, "other": share}).counts(7 * BLOCK)
    assert found["other"] == round(7 * BLOCK * share)


def test_odd_shares_hold_on_average_and_within_one_place_of_each_block():
    numbers = mixture(ODD).many(0, 400 * BLOCK)[1]
    blocks = owner(numbers).reshape(400, BLOCK)
    for k, share in enumerate(ODD.values()):
        wanted = BLOCK * share / sum(ODD.values())
        counts = (blocks == k).sum(axis=1)
        assert {wanted // 1 - 1, wanted // 1 + 2}.isdisjoint(counts.tolist())
        assert abs(counts.mean() - wanted) < 4 * 0.5 / 400**0.5  # a count varies by at most half a place


def test_blocks_equal_an_independent_computation_in_whole_fractions():
    stream = np.random.Philox(np.random.SeedSequence(4, spawn_key=(0,))).random_raw(6)
    total, expected = sum(map(Fraction, ODD.values())), []
    ends = [share / total for share in accumulate(map(Fraction, ODD.values()))]
    for block in range(6):
        u = Fraction(int(stream[block]) >> 32, 2**32)
        counts = [int(end * BLOCK + u) for end in ends]
        owners = [k for k, (a, b) in enumerate(zip([0, *counts], counts, strict=False)) for _ in range(b - a)]
        bits = np.random.Philox(np.random.SeedSequence(4, spawn_key=(1, block))).random_raw(BLOCK)
        expected += [owners[i] for i in sorted(range(BLOCK), key=lambda i: bits[i])]
    assert owner(mixture(ODD).many(0, 6 * BLOCK)[1]).tolist() == expected


def test_answer_does_not_depend_on_the_access_pattern():
    epochs, numbers = mixture(ODD).many(0, 3 * BLOCK)
    jumping = mixture(ODD)
    for start, count in [(2500, 500), (0, 1), (999, 2), (1, 998), (1001, 1499)]:
        for other in (jumping, pickle.loads(pickle.dumps(jumping))):
            found = other.many(start, count)
            assert found[0].tolist() == epochs[start : start + count].tolist()
            assert found[1].tolist() == numbers[start : start + count].tolist()


@pytest.mark.parametrize("shares", [ODD, {"english": 0.2, "other": 0.8}, {"third": 1, "english": 5}])
def test_each_source_is_read_in_its_own_order_whatever_it_is_mixed_with(shares):
    numbers = mixture(shares).many(0, 3 * BLOCK)[1]
    begin = sum(sum(SIZES[name]) for name in list(shares)[: list(shares).index("english")])
    english = numbers[(numbers >= begin) & (numbers < begin + 47)] - begin
    assert english.tolist() == orders("english")["english"].many(0, len(english))[1].tolist()
    assert len(english) > 2 * 47


def test_counts_of_a_far_position_are_those_of_all_blocks_before_it(monkeypatch):
    whole = mixture(ODD).counts(300 * BLOCK + 123)
    monkeypatch.setattr(siglip2.core.data.mixture, "CHUNK", 7)  # not a whole number of Philox's counters
    assert mixture(ODD).counts(300 * BLOCK + 123) == whole
    numbers = mixture(ODD).many(0, 300 * BLOCK + 123)[1]
    assert list(whole.values()) == np.bincount(owner(numbers)).tolist()


def test_the_last_of_forty_billion_positions_is_found_in_seconds():
    far = mixture({"english": 9, "other": 1})
    assert far.counts(40 * 10**9) == {"english": 36 * 10**9, "other": 4 * 10**9}
    epochs, numbers = far.many(40 * 10**9 - 50, 50)
    assert set(epochs[numbers < 47].tolist()) <= {36 * 10**9 // 47, 36 * 10**9 // 47 - 1}


def test_substitute_is_another_sample_of_the_same_source():
    mixed = mixture(ODD)
    numbers = mixed.many(990, 20)[1]
    for position, number in enumerate(numbers.tolist(), start=990):
        drawn = [mixed.substitute(position, attempt) for attempt in range(1, 9)]
        assert set(owner(drawn)) == {owner(number)}
        assert number not in drawn
        assert drawn == [mixture(ODD).substitute(position, attempt) for attempt in range(1, 9)]


def test_seed_changes_where_sources_stand():
    first, other = (owner(mixture(ODD, seed).many(0, BLOCK)[1]) for seed in (4, 5))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixture({}, {}, 0), r"a mixture of \[\] has shares for"),
        (lambda: Mixture(orders("english"), {"other": 1.0}, 0), "has shares for \\['other'\\]"),
        (lambda: mixture({"english": 1, "other": 0}), "the share of 'other' is 0"),
        (lambda: mixture(ODD).many(-1, 2), "start is -1"),
    ],
)
def test_errors_say_what_was_found(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture
def joined(shards, tmp_path):
    """Three shards of 12 samples in all, then the 16 of the tiny source, then one more shard."""
    write_shard(tmp_path / "more.tar", 50, 2)
    return JoinedSource(
        {"web": open_source(str(shards)), "tiny": TinySource(), "more": open_source(str(tmp_path / "more.tar"))}
    )


def test_joined_source_reads_each_sample_of_each_part_and_says_which_part(joined):
    read = [joined.read(i) for i in range(len(joined))]
    assert Counter(sample.source for sample in read) == {"web": 12, "tiny": 16, "more": 2}
    alone = [part.read(i).key for part in joined.parts.values() for i in range(len(part))]
    assert [sample.key for sample in read] == alone
    assert joined.first_of("more") == 28
    assert read[28].key == joined.key(28) == "000000050"
    assert joined.key(13) == "number 1"  # a source that does not know keys before it reads
    assert joined.shard_sizes() == [3, 4, 5, 16, 2]
    assert len(joined.shards) == 5
    with pytest.raises(IndexError):
        joined.read(30)


def test_joined_source_names_the_part_of_a_bad_sample(shards):
    part = open_source(str(shards), max_bytes=1)
    with pytest.raises(BadSample) as read:
        JoinedSource({"web": part}).read(0)
    assert read.value.where == f"web: {shards / '00000.tar'}"
    sample = JoinedSource({"web": open_source(str(shards))}).read(0)
    assert sample.bad("dark").where == f"web: {shards / '00000.tar'}"
    assert sample.where == str(shards / "00000.tar")
