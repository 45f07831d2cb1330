"""A batch is a pure function of its number, and an evaluation set is seen whole, on any number of ranks."""

import pickle
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from siglip2.core.data.loader import ATTEMPTS, EvalBatches, FromIndex, Maker, TrainBatches, share
from siglip2.core.data.order import Order
from siglip2.core.layout import Layout
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.testing import TinySource, tiny_tokenizer
from siglip2.testing.tiny import same


@dataclass(frozen=True)
class Position:
    """A view that shows what a view may know: where the row stands in the stream, and a number drawn there."""

    name: str = "position"
    copies: int = 1

    def __call__(self, sample, context):
        return torch.tensor([[context.entropy[1], int(context.rng.integers(2**31))]])


@dataclass(frozen=True)
class Waves(FixedPatchifier):
    """Batches of eight and of four in turn, as a patchifier with several sequence lengths makes them."""

    def layout(self, index):
        return Layout(self.grid[0] * self.grid[1], (8, 4)[index % 2])


class Holes(TinySource):
    """The toy samples, some of which cannot be read."""

    def __init__(self, *bad):
        self.bad = set(bad)

    def read(self, i):
        sample = super().read(i)
        if i in self.bad:
            raise sample.bad("a hole")
        return sample


POSITION = Position()
WAVES = Waves(image_size=32, patch_size=16, batch_size=8, filter="bilinear", antialias=True)


def train_batches(source=None, views=((0.0, (IMAGE, CAPTION, POSITION)),), max_batches=10, **more):
    source = source or TinySource()
    maker = Maker(source, WAVES, tiny_tokenizer(), seed=3)
    return TrainBatches(maker, Order(source.shard_sizes(), 3), views, max_batches=max_batches, **more)


def eval_batches(source=None, *, batch_size=3, **more):
    maker = Maker(source or TinySource(), WAVES, tiny_tokenizer(), seed=3)
    return EvalBatches(maker, (IMAGE, CAPTION), batch_size=batch_size, **more)


def assert_same(batch, other):
    assert (batch.size, batch.index, batch.keys) == (other.size, other.index, other.keys)
    assert batch.faults == other.faults
    assert batch.views.keys() == other.views.keys()
    assert all(same(batch.views[name], other.views[name]) for name in batch.views)


@pytest.mark.parametrize("source", [TinySource(), Holes(3, 7)])
def test_batch_depends_on_its_number_alone(source):
    batches = train_batches(source)
    first = {index: batches[index] for index in (4, 1, 5)}
    copy = pickle.loads(pickle.dumps(batches))  # as a worker gets it, with whatever the first one remembers
    fresh = train_batches(source)
    for index in (5, 1, 4, 1):
        for other in (batches, copy, fresh):
            assert_same(other[index], first[index])


def test_rows_of_the_ranks_joined_are_the_batch_of_one_process():
    whole = train_batches(Holes(3))
    for index in range(4):
        shares = [train_batches(Holes(3), rank=rank, world_size=2)[index] for rank in range(2)]
        batch = whole[index]
        assert [s.size for s in shares] == [batch.size // 2] * 2
        assert shares[0].keys + shares[1].keys == batch.keys
        assert shares[0].faults + shares[1].faults == batch.faults
        for name in ("caption", "position"):
            assert torch.equal(torch.cat([s.views[name] for s in shares]), batch.views[name])
        assert torch.equal(torch.cat([s.views["image"].patches for s in shares]), batch.views["image"].patches)


def test_positions_follow_on_from_batch_to_batch():
    batches = train_batches()
    positions = torch.cat([batches[index].views["position"][:, 0] for index in range(4)])
    assert positions.tolist() == list(range(8 + 4 + 8 + 4))


def test_every_epoch_trains_on_every_sample_once():
    batches = train_batches()
    keys = [key for index in range(8) for key in batches[index].keys]  # 48 samples: three epochs of sixteen
    for epoch in range(3):
        assert sorted(keys[16 * epoch : 16 * epoch + 16]) == [f"{i:04d}" for i in range(16)]


def test_bad_sample_is_replaced_and_named():
    clean, holed = train_batches(), train_batches(Holes(3))
    faults = []
    for index in range(8):
        before, after = clean[index], holed[index]
        assert after.size == before.size
        changed = [(a, b) for a, b in zip(before.keys, after.keys, strict=True) if a != b]
        assert all(a == "0003" and b != "0003" for a, b in changed)
        assert len(changed) == before.keys.count("0003")
        faults += after.faults
    assert {(f.where, f.key, f.reason) for f in faults} == {("tiny", "0003", "a hole")}
    assert len(faults) >= 3  # once an epoch, and wherever it was drawn as a substitute


def test_many_bad_samples_in_a_row_are_an_error_that_says_what_to_check():
    with pytest.raises(RuntimeError, match=rf"{ATTEMPTS} samples in a row.*key 00\d\d: a hole.*siglip2 index"):
        train_batches(Holes(*range(16)))[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", ["0.3", "0.5", "0.55", "0.7"])
def test_views_change_at_the_first_step_of_a_phase_and_never_inside_a_step(start, accumulate):
    steps = 10
    views = [(0.0, (POSITION,)), (float(start), (POSITION, CAPTION))]
    batches = train_batches(views=views, max_batches=steps * accumulate, accumulate=accumulate)
    awake = [Fraction(step, steps) >= Fraction(start) for step in range(steps)]
    expected = [claim for claim in awake for _ in range(accumulate)]
    assert ["caption" in batches[index].views for index in range(len(batches))] == expected


def test_a_later_phase_leaves_the_stream_as_it_is():
    views = [(0.0, (POSITION,)), (0.5, (POSITION, CAPTION))]
    batches, other = train_batches(views=views), train_batches(views=[(0.0, (POSITION,))])
    for index in (4, 5, 9):
        assert batches[index].keys == other[index].keys
        assert torch.equal(batches[index].views["position"], other[index].views["position"])


def test_resumed_sampler_goes_on_but_counts_the_whole_run():
    sampler = FromIndex(7, 10)
    assert list(sampler) == [7, 8, 9]
    assert len(sampler) == 10


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("batch_size", "limit"), [(3, None), (4, None), (5, 7), (32, None), (3, 100), (2, 1)])
def test_every_evaluation_sample_is_real_exactly_once(world_size, batch_size, limit):
    ranks = [
        eval_batches(batch_size=batch_size, rank=rank, world_size=world_size, limit=limit) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # or the ranks would wait for each other
    seen = []
    for batches in ranks:
        for index in range(len(batches)):
            batch = batches[index]
            assert batch.size == len(batch.keys) == len(batch.views["caption"]) == batch_size
            seen += [key for key, real in zip(batch.keys, batch.real.tolist(), strict=True) if real]
    assert sorted(seen) == [f"{i:04d}" for i in range(min(16, limit or 16))]


def test_uneven_last_batch_is_filled_with_rows_that_are_not_real():
    last = eval_batches()[5]
    assert last.real.tolist() == [True, False, False]
    assert last.keys[0] == "0015"


def test_bad_evaluation_sample_is_named_and_its_row_is_not_real():
    batch = eval_batches(Holes(1))[0]
    assert batch.real.tolist() == [True, False, True]
    assert [(f.key, f.reason) for f in batch.faults] == [("0001", "a hole")]


def test_evaluation_set_without_a_good_sample_is_an_error():
    with pytest.raises(RuntimeError, match="no sample of tiny can be used.*a hole"):
        eval_batches(Holes(*range(16)))[0]


@pytest.mark.parametrize(("batch_size", "ranks", "advice"), [(10, 4, "8 or 12"), (3, 8, "8")])
def test_batch_that_does_not_divide_says_what_would(batch_size, ranks, advice):
    with pytest.raises(ValueError) as error:
        share(Layout(4, batch_size), ranks)
    assert str(error.value) == (
        f"the global batch of {batch_size} (those of 4 patches) does not divide over {ranks} processes: set the "
        f"patchifier's batch_size, or its batch_sizes or divisor, to {advice}"
    )


def test_batch_that_divides_is_shared_evenly():
    assert share(Layout(4, 12), 4) == 3
