"""Losses on XLA replicas, through our collectives, are those of one process."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla
RECIPES = ["all", "sigmoid", "locca", "silc", "tips", "curated"]
ENOUGH_THREADS = {"XLA_THREAD_POOL_SIZE": "32", "PJRT_CPU_ASYNC_CLIENT": "0"}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 replicas", "4 replicas"])
def run(request):
    """What replicas.py found out."""
    return run_alone("replicas.py", CPU_NUM_DEVICES=str(request.param), **ENOUGH_THREADS)


def test_replicas_know_their_number(run):
    assert run["world_sizes"] in ([2] * 2, [4] * 4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_every_gradient_of_two_steps_are_those_of_one_process(run, recipe):
    found = run["recipes"][recipe]
    for losses in found["losses"]:
        assert losses == pytest.approx(found["expected"], rel=1e-6)
    assert max(found["gradients"]) < 1e-6


def test_centres_are_means_over_replicas_and_move_the_second_step(run):
    losses = run["recipes"]["silc"]["expected"]
    assert losses[1] != pytest.approx(losses[0], rel=1e-5)
    assert max(run["recipes"]["all"]["centres"]) < 1e-6


def test_gather_has_the_gradient_of_one_process(run):
    """torch_xla's own all_gather drops what the other replica asks of a row, about half of it."""
    assert run["pairs"] < 1e-6


def test_ring_brings_what_the_rank_to_the_left_holds(run):
    last = len(run["from_left"]) - 1
    for rank, (texts, gradients) in enumerate(run["from_left"]):
        left = rank - 1 if rank else last
        assert texts == [[float(left)] * 3] * 2
        assert gradients == [[left + 10.0] * 3] * 2
