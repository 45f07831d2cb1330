"""Losses over very many classes, as XLA cuts their chunks over four devices."""

import pytest
from xla_process import QUICK, run_alone

pytestmark = pytest.mark.xla
CHUNKS = 4  # 256 rows on 4 devices, 16 of each in a chunk; 16 chunks if one device after the other had them
LOSSES = {"classified": "16,96", "agreed": "32,96"}  # logits of a chunk on one device, two views for the second


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What spmd_chunks.py found in the program of one device."""
    folder = tmp_path_factory.mktemp("chunks")
    flags = f"{QUICK['XLA_FLAGS']} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    return run_alone("spmd_chunks.py", folder, XLA_FLAGS=flags)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradients_are_those_of_float64(run, loss):
    assert max(run[loss]["errors"]) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_every_device_works_on_every_chunk(run, loss):
    """The program has as many chunks as one device's rows make."""
    assert run[loss]["products"][LOSSES[loss]] == CHUNKS


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_the_classes_are_added_up_over_devices_once_and_no_logits_travel(run, loss):
    tables = [[name, shape] for name, shape in run[loss]["moved"] if "96" in shape.split("{")[0]]
    assert [name for name, shape in tables if shape.startswith("f32[96,24]")] == ["all-reduce"]
    assert all(shape.startswith(("f32[96,24]", "f32[96]")) for _, shape in tables)
