"""A run on four XLA devices, parameters whole or in parts, is the run on one CPU; also after stops."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla
RUNS = ("spmd", "sharded", "from_file", "from_folder")


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_training.py found out: sigmoid and locca for two steps, then silc, tips and a teacher beside them."""
    return run_alone("spmd_training.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("spmd"))


@pytest.mark.parametrize("kind", ["spmd", "sharded"])
def test_losses_are_those_of_the_cpu(run, kind):
    assert len(run["losses"]["cpu"]) == 4
    assert run["losses"][kind] == pytest.approx(run["losses"]["cpu"], rel=1e-6)


def test_every_gradient_is_that_of_the_cpu(run):
    """As a share of the largest in the product or the same plugin; float32 sums over rows, in another order."""
    assert len(run["gradients"]) == 4
    assert max(run["gradients"]) < 2e-5


@pytest.mark.parametrize("kind", RUNS)
def test_parameters_buffers_and_moments_after_four_steps_are_those_of_the_cpu(run, kind):
    """From the start, or resumed after two steps: from a CPU's file into parts, from a folder of parts into whole."""
    assert run["weights"][kind] < 1e-5
    assert min(run["moved"].values()) > 1e-4  # product, teacher and a head moved by more in the last two steps


@pytest.mark.parametrize("kind", ["spmd", "sharded"])
def test_checkpoint_of_tips_alone_is_that_of_the_cpu(run, kind):
    """No step reads the pooling head of student or teacher then, and yet both are saved."""
    assert run["tips"][kind] < 1e-5


def test_only_a_sharded_run_cuts_parameters_and_moments(run):
    assert run["cut"]["spmd"]["parameters"] == 0
    sharded = run["cut"]["sharded"]
    assert sharded["parameters"] > sharded["trained"] > 20  # the teacher's are parameters without moments
    assert sharded["moments"] == sharded["trained"]


def test_sharded_checkpoints_are_folders(run):
    assert run["folders"]
