"""Scores, captions and losses in any layout are on four XLA devices those of the CPU; bfloat16 is bfloat16."""

import json

import pytest
from xla_process import run_alone

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def run(toy_shards, toy_tokenizer, tmp_path_factory):
    """What spmd_evaluation.py found out."""
    folder = tmp_path_factory.mktemp("evaluation")
    classes = folder / "classes.json"
    classes.write_text(json.dumps({"classes": [f"thing {number}" for number in range(8)]}))
    return run_alone("spmd_evaluation.py", toy_shards, toy_tokenizer, folder, classes)


def test_zero_shot_and_retrieval_scores_are_those_of_the_cpu(run):
    assert {name.split("/")[0] for name in run["cpu"]} == {"zero_shot", "retrieval"}
    assert run["xla"] == pytest.approx(run["cpu"], abs=1e-6)


@pytest.mark.parametrize("num_hosts", ["1", "2"])
def test_views_arrive_copies_major_and_in_parts(run, num_hosts):
    """With two hosts by the way that joins their batches, here for one process that takes itself for both."""
    assert run["uploaded"][num_hosts] == [True, True, True]


@pytest.mark.parametrize("layout", ["naflex", "navit"])
def test_padded_and_packed_rows_have_the_losses_of_the_cpu(run, layout):
    assert run[f"xla_{layout}"] == pytest.approx(run[f"cpu_{layout}"], rel=1e-5)


def test_decoder_writes_what_it_writes_on_the_cpu(run):
    cpu, xla = run["written"]
    assert xla == cpu
    assert len({tuple(ids) for ids in cpu}) > 1
    assert len({number for ids in cpu for number in ids}) > 4


def test_bf16_mixed_runs_in_bfloat16(run):
    assert run["xla_bf16"] == pytest.approx(run["cpu_bf16"], rel=1e-2)
    assert len({round(loss, 6) for loss in (*run["xla_bf16"], *run["cpu_bf16"])}) == 4
