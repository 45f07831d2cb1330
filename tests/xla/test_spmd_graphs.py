"""On XLA a run compiles a known number of graphs and no step twice, and nothing in a step reads a value."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla
HALF = 8  # steps of each phase
LENGTHS = [6, 12]


@pytest.fixture(scope="module")
def runs(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_graphs.py counted: two phases, two sequence lengths, and schedules that change in every step."""
    return run_alone("spmd_graphs.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("graphs"))


def check_no_value_is_read(run):
    assert sum(run["fallbacks_in_step"]) == 0, "XLA handed operations back to the CPU in the middle of steps"


def test_steps_compile_one_graph_per_length_and_phase_and_one_more_for_its_first_step(runs):
    """The first step of a phase makes optimizer state and wakes who sleeps; later ones of its length find both."""
    lengths, compiled = runs["clean"]["lengths"], runs["clean"]["compiled_in_step"]
    for phase in (slice(0, HALF), slice(HALF, 2 * HALF)):
        first, *later = lengths[phase]
        assert sorted(set(lengths[phase])) == LENGTHS
        assert sum(compiled[phase]) == len(LENGTHS) + (first in later)


def test_nothing_is_compiled_once_every_length_has_come_up_in_a_phase(runs):
    """Weights, momentum, temperature and learning rate change in every step: they are data, not part of a graph."""
    lengths, compiled = runs["clean"]["lengths"], runs["clean"]["compiled"]
    for phase in (slice(0, HALF), slice(HALF, 2 * HALF)):
        new = [lengths[phase].index(length) for length in LENGTHS]
        warm = max(*new, lengths[phase].index(lengths[phase][0], 1))
        assert warm < HALF - 1
        assert compiled[phase][warm] == compiled[phase][-1]


def test_steps_hand_nothing_back_to_the_cpu(runs):
    check_no_value_is_read(runs["clean"])


def test_an_objective_that_reads_a_value_is_noticed(runs):
    with pytest.raises(AssertionError, match="back to the CPU"):
        check_no_value_is_read(runs["peeking"])
