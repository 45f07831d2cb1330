"""The loss over all pairs, as XLA cuts it over four devices."""

import pytest
from xla_process import QUICK, run_alone

pytestmark = pytest.mark.xla
ROWS, DEVICES = 512, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What spmd_pairs.py found in the program of one device."""
    folder = tmp_path_factory.mktemp("compiled")
    flags = f"{QUICK['XLA_FLAGS']} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    return run_alone("spmd_pairs.py", 0, folder, XLA_FLAGS=flags)


def test_value_and_gradients_are_those_of_the_cpu_in_float64(run):
    assert max(run["errors"]) < 1e-6


def test_no_device_holds_the_logits_of_all_pairs(run):
    matrices = [tuple(shape) for shape in run["matrices"]]
    assert (ROWS // DEVICES, ROWS) in matrices  # its own images with all texts
    assert (ROWS, ROWS) not in matrices


def test_texts_are_gathered_and_gradients_added_once(run):
    assert set(run["collectives"]) == {"all-gather", "all-reduce"}
    assert run["collectives"]["all-gather"] <= 2
