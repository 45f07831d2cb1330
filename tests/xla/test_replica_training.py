"""A run by the strategy `xla`, with a replica on each of two devices, is the run on one CPU."""

import json
import re

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla
TWO = {"CPU_NUM_DEVICES": "2"}


def started(kind, toy_shards, toy_tokenizer, folder, *arguments):
    return run_alone("replica_training.py", toy_shards, toy_tokenizer, folder, kind, *arguments, **TWO)


@pytest.fixture(scope="module")
def whole(toy_shards, toy_tokenizer, tmp_path_factory):
    """What replica_training.py found out about a run of all losses, with scores and a report."""
    folder = tmp_path_factory.mktemp("replicas")
    classes = folder / "classes.json"
    classes.write_text(json.dumps({"classes": [f"thing {number}" for number in range(8)]}))
    return started("whole", toy_shards, toy_tokenizer, folder, classes)


@pytest.fixture(scope="module")
def resumed(toy_shards, toy_tokenizer, tmp_path_factory):
    """The same about a run that goes on from a CPU's checkpoint."""
    return started("resumed", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def stopped(toy_shards, toy_tokenizer, tmp_path_factory):
    """The same about runs that replicas end."""
    return started("stopped", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("stopped"))


def test_two_replicas_are_trained_by_our_strategy(whole):
    assert whole["ranks"] == [2, "XLAReplicaStrategy"]


def test_mean_losses_and_every_gradient_of_all_losses_are_those_of_one_process(whole):
    cpu, replicas = whole["losses"]
    assert len(replicas) == 2
    assert replicas == pytest.approx(cpu, rel=1e-6)
    assert len(whole["gradients"]) == 2
    assert max(whole["gradients"]) < 1e-6


def test_checkpoint_of_the_replicas_is_that_of_one_process(whole):
    """Parameters and buffers, and moments as a share of the largest: second moments are squares."""
    assert whole["files"] == ["step=2.ckpt"]
    assert whole["weights"] < 1e-6
    assert whole["moments"] < 5e-6


def test_process_that_started_the_replicas_has_the_trained_weights_and_steps(whole):
    assert whole["in the process that started them"] < 1e-6
    assert whole["step"] == 2


def test_scores_over_replicas_are_those_of_one_process(whole):
    """Each replica scored its share; torchmetrics by itself would not have put them together."""
    cpu, replicas = whole["scores"]
    assert {name.split("/")[0] for name in replicas} == {"zero_shot", "retrieval"}
    assert replicas == pytest.approx(cpu, abs=1e-6)


def test_loggers_hear_of_each_step_once(whole):
    """What Lightning lets only the first rank do is done by one of the threads."""
    assert whole["logged"] == [0, 1]


def test_report_has_the_curves_and_rows_of_the_replicas(whole):
    assert whole["curve"] == [1, 2]
    assert whole["rows"] == [[1, 1], [1, 1]]
    assert whole["report"]


def test_replicas_go_on_from_a_cpu_s_checkpoint_and_wake_who_slept(resumed):
    cpu, replicas = resumed["losses"]
    assert len(replicas) == 2
    assert replicas == pytest.approx(cpu, rel=1e-6)
    assert resumed["weights"] < 1e-6
    assert resumed["moments"] < 5e-6
    assert resumed["moved"] > 1e-3


def test_error_of_one_replica_ends_the_others_and_is_raised_with_its_traceback(stopped):
    kind, text, where = stopped["one"]
    assert (kind, text) == ("ValueError", "replica 1 does not like this batch")
    assert "in replica 1" in where
    assert "on_train_batch_start" in where


def test_replicas_that_were_killed_are_an_error(stopped):
    assert stopped["killed"][0] == "RuntimeError"
    assert "ended without an error" in stopped["killed"][1]


def test_ctrl_c_ends_a_run_and_all_its_processes(toy_shards, toy_tokenizer, tmp_path):
    assert started("interrupted", toy_shards, toy_tokenizer, tmp_path) == {"status": 1, "left": False}


@pytest.fixture(scope="module")
def late(toy_shards, toy_tokenizer, tmp_path_factory):
    """The same about a run in which the second replica is later than XLA would wait."""
    return started("late", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("late"))


def test_replicas_wait_for_one_that_is_late_and_read_gradients_that_are_not_computed_yet(late):
    replicas, cpu = late["seen"]
    assert [same for same, _ in replicas] == [False, False]
    assert [value for _, value in replicas] == pytest.approx([value for _, value in cpu], rel=1e-5)


def test_watchdog_shows_the_thread_of_a_replica_and_names_the_one_that_is_late(late):
    assert re.search(r"rank 0: nothing has happened for \d+ s, in training step 1, at .*turns\.py", late["words"])
    assert re.search(r"rank 1 after 1 steps, waiting for batch 1 or another rank; it said so", late["words"])


def test_batch_that_does_not_divide_over_replicas_is_refused_as_on_processes(stopped):
    assert stopped["both"][0] == "ValueError"
    assert "the global batch of 7 (those of 4 patches) does not divide over 2 processes" in stopped["both"][1]
