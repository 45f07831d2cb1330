"""A curator keeps as many rows in every step of a phase and on every rank, or the run ends and says so."""

import re
from pathlib import Path

import pytest
import torch
from parallel_ranks import errors_on_two_ranks

from siglip2 import IMAGE, Plugin, hookimpl, rank
from siglip2.core.curation import KeptCounts
from siglip2.core.layout import Phase
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import tiny_module

EARLY, LATE = Phase(0.0, 0.5, ("curator", "sigmoid")), Phase(0.5, 1.0, ("curator", "sigmoid"))
TINY = Path(__file__).parent.parent / "tiny.yaml"
STEPS = 10


class MoreOnTheSecond(Plugin):
    """Keeps half of the rows, and on the second rank one more from a step on.

    Args:
        begin: the first such step.
    """

    name = "more_on_the_second"

    def __init__(self, begin: int = 0, start: float = 0.0, stop: float = 1.0):
        super().__init__(start=start, stop=stop)
        self.begin = begin

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def curate(self, step):
        more = rank() == 1 and round(step.progress * STEPS) >= self.begin
        return torch.arange(step.batch.size // 2 + more)


class Fewer(MoreOnTheSecond):
    """Keeps fewer rows the farther the run is."""

    name = "fewer"

    @hookimpl
    def curate(self, step):
        return torch.arange(step.batch.size - round(step.progress * STEPS))


def rows(count):
    return torch.arange(count)


def test_the_same_number_may_be_kept_again_and_again():
    counts = KeptCounts()
    counts.check(4, torch.tensor([0, 2]), EARLY)
    counts.check(4, torch.tensor([3, 1]), EARLY)


def test_another_number_in_the_same_phase_is_an_error_with_both():
    counts = KeptCounts()
    counts.check(4, rows(2), EARLY)
    with pytest.raises(ValueError, match="the curator keeps 3 of 4 rows, in an earlier step 2: shapes have to stay"):
        counts.check(4, rows(3), EARLY)


@pytest.mark.parametrize(("size", "phase"), [(8, EARLY), (4, LATE)])
def test_batches_of_another_size_or_phase_have_a_number_of_their_own(size, phase):
    counts = KeptCounts()
    counts.check(4, rows(2), EARLY)
    counts.check(size, rows(3), phase)
    with pytest.raises(ValueError, match="in an earlier step 2"):
        counts.check(4, rows(3), EARLY)


def test_step_whose_curator_keeps_another_number_than_the_last_is_refused():
    module = tiny_module([Fewer(), Sigmoid()])
    batch = module.fake_batch(0.0, batch_size=4)
    assert module(batch, 0.0).keys() == module(batch, 0.01).keys() == {"sigmoid"}
    with pytest.raises(ValueError, match="the curator keeps 3 of 4 rows, in an earlier step 4"):
        module(batch, 0.1)


class AllAtFirst(Plugin):
    """Keeps every row by saying nothing, and later one less."""

    name = "all_at_first"

    @hookimpl
    def curate(self, step):
        return None if step.progress < 0.1 else torch.arange(step.batch.size - 1)


def test_a_curator_that_says_nothing_keeps_all_rows_and_is_held_to_it():
    module = tiny_module([AllAtFirst(), Sigmoid()])
    batch = module.fake_batch(0.0, batch_size=4)
    module(batch, 0.0)
    with pytest.raises(ValueError, match="the curator keeps 3 of 4 rows, in an earlier step 4"):
        module(batch, 0.1)


DDP, FSDP2 = ("--trainer.strategy", "ddp"), ("--trainer.strategy", "fsdp2")
CASES = {
    "rehearsal": DDP,
    "first step": (*FSDP2, "--model.rehearsal", "false"),
    "parts": (*DDP, "--model.rehearsal", "false", "--model.accumulate", 2),
    "later": (*DDP, "--plugins.more_on_the_second.begin", 3),  # the last one: its ranks part
}


@pytest.fixture(scope="module")
def errors(toy_shards, toy_tokenizer, tmp_path_factory):
    """Case -> what each of two ranks of `siglip2 fit` printed."""
    folder = tmp_path_factory.mktemp("curation")
    tiny = ("--config", TINY, "--data.train.path", toy_shards, "--data.tokenizer", toy_tokenizer)
    base = (*tiny, "--trainer.default_root_dir", folder, "--plugins.fixed.batch_size", 8)
    cases = {name: [*base, "--plugins.more_on_the_second", "on", *words] for name, words in CASES.items()}
    return errors_on_two_ranks(cases, folder, MoreOnTheSecond)


@pytest.mark.dist
@pytest.mark.parametrize(("case", "counts"), [("rehearsal", "[1, 2] of 2"), ("first step", "[2, 3] of 4")])
def test_unequal_numbers_on_two_ranks_end_the_run_on_both_with_the_numbers(errors, case, counts):
    for printed in errors[case]:
        assert f"the curator keeps different numbers of rows on the ranks: {counts} each" in printed


@pytest.mark.dist
def test_unequal_numbers_are_found_before_a_batch_is_cut_into_parts(errors):
    for printed in errors["parts"]:
        assert "different numbers of rows on the ranks: [2, 3] of 4 each" in printed


@pytest.mark.dist
def test_rehearsal_that_finds_it_says_so(errors):
    for printed in errors["rehearsal"]:
        assert re.search(r"while rehearsing .*more_on_the_second.*before the first training step", printed)
    assert "while rehearsing" not in errors["first step"][0]


@pytest.mark.dist
def test_rank_that_changes_its_number_says_so_and_the_other_one_does_not_wait_for_ever(errors):
    alone, parted = errors["later"]
    assert "the curator keeps 3 of 4 rows, in an earlier step 2" in parted
    assert "siglip2: error" in alone
