"""Tensors in parts on four XLA devices are copied to the CPU, for a checkpoint, without a program for each of them."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_saving.py found out: tensors of several layouts, and a run that saves every second of six steps."""
    return run_alone("spmd_saving.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("saving"))


@pytest.mark.parametrize("num_hosts", ["1", "2"])
def test_parts_are_joined_as_they_were(run, num_hosts):
    """With two hosts by the way in which those copy together, here by one process that has all the parts."""
    assert run["copied"][num_hosts]["parts"] == 12
    assert run["copied"][num_hosts]["wrong"] == []


def test_one_host_compiles_nothing_to_copy_parts(run):
    assert run["copied"]["1"]["compiled"] == [0, 0]


def test_several_hosts_compile_a_program_for_each_layout_once(run):
    first, second = run["copied"]["2"]["compiled"]
    assert first == 12
    assert second == 0


def test_sharded_run_that_saves_ordinary_files_and_keeps_snapshots_compiles_nothing_after_its_first_steps(run):
    """Parameters and moments in parts are saved after steps 4 and 6, and kept before 5 for the case of a spike."""
    compiled = run["run"]["compiled"]
    assert run["run"]["cut"]["moments"] > 10
    assert len(compiled) == 6
    assert compiled[2] == compiled[-1]
