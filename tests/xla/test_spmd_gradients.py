"""One step on four XLA devices has the gradients of one CPU, for each loss alone and for all."""

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    return run_alone("spmd_gradients.py", toy_shards, toy_tokenizer, tmp_path_factory.mktemp("spmd-gradients"))


@pytest.mark.parametrize("name", ["all", "sigmoid", "locca", "silc"])
def test_loss_and_every_gradient_are_those_of_the_cpu(run, name):
    """To 1e-6, absolute or of the largest in its part; 5e-6 with silc, whose narrow head enlarges rounding."""
    cpu, xla = run[name]["losses"]
    assert xla == pytest.approx(cpu, rel=1e-6)
    bound = 5e-6 if name in ("all", "silc") else 1e-6
    assert len(run[name]["gradients"]) > 20
    assert {n: d for n, d in run[name]["gradients"].items() if d[0] > 1e-6 and d[1] > bound} == {}
