"""The overlays for TPUs give runs of `siglip2 fit` with all that belongs to one: here on four devices of a CPU."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_overlays.py found out: under `hardware/tpu_host` in float32, with files written in a thread."""
    return run_alone("spmd_overlays.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("overlays"))


def test_run_under_tpu_host_is_that_of_the_cpu(run):
    assert run["host"]["strategy"] == "XLASPMDStrategy"
    assert run["host"]["losses"] == pytest.approx(run["cpu"], rel=1e-5)
    assert run["host"]["report"]


def test_checkpoint_that_a_thread_wrote_is_whole(run):
    assert run["host"]["weights"] < 1e-5
    assert run["host"]["left over"] == []


def test_sigusr1_saves_and_goes_on(run):
    assert run["host"]["saved on signal"] == 2
    assert any("SIGUSR1: saved step 2, going on" in line for line in run["host"]["said"])


def test_watchdog_says_where_a_step_hangs(run):
    where = [line for line in run["host"]["said"] if "nothing has happened" in line]
    assert any("in training step 3" in line and "on_train_batch_start" in line for line in where)


def test_run_under_tpu_pod_computes_in_bfloat16_and_saves_folders(run):
    assert run["pod"]["sharded"]
    assert run["pod"]["precision"] == "bf16-mixed"
    assert run["pod"]["losses"] == pytest.approx(run["cpu"], rel=2e-2)
    assert run["pod"]["folders"] == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]


def test_folders_written_in_a_thread_are_refused(run):
    assert "AsyncCheckpointIO, which writes files, but sharded_checkpoints writes folders" in run["refused"]
