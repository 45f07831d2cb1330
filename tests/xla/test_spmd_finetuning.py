"""Adapters on four XLA devices are trained as on one CPU, and a spike takes them back to the same weights."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_finetuning.py found out: four steps, temperature and bias frozen in the first two."""
    pytest.importorskip("peft")
    return run_alone("spmd_finetuning.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("spmd-finetuning"))


def test_adapters_are_trained_and_saved_as_on_the_cpu(run):
    assert run["losses"]["spmd"] == pytest.approx(run["losses"]["cpu"], rel=1e-6)
    assert len(run["gradients"]) == 4
    assert max(run["gradients"]) < 1e-6
    assert run["weights"]["spmd"] < 1e-6
    assert run["learned"] > 1e-3
    assert run["fallbacks"] == [0, 0, 0, 0]


def test_spike_takes_parameters_in_parts_back_to_the_weights_of_the_cpu(run):
    assert run["after the spike"]["sharded"] == pytest.approx(run["after the spike"]["cpu-spike"], rel=1e-6)
    assert run["weights"]["sharded"] < 1e-6
    assert run["left out"] > 1e-3
    assert run["cut"]["parameters"] == 34  # those of a block each, adapters and towers, as before the spike
