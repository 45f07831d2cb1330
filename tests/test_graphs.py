"""A run compiles one graph per sequence length: torch.compile captures whole steps, XLA compiles no step twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from siglip2.core.data.loader import Maker, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.step import Step
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import TinySource, tiny_tokenizer

LENGTHS = [6, 12, 20]
NAFLEX = NaFlex(seq_lens=LENGTHS, batch_size=4, table=4, eval_seq_len=6).patchifier()
ONE_LENGTH = NaFlex(seq_lens=[12], batch_size=4, table=4).patchifier()
FIXED = Fixed(image_size=32, patch_size=16, batch_size=4).patchifier()


def small_model(patchifier):
    """Two towers of one block each, the same at every call."""
    tokenizer, one_block = tiny_tokenizer(), ShapeOptions(depth=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_two_towers(
            "tiny/16",
            patch_size=16,
            grid=patchifier.grid,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.contract.length,
            vision=one_block,
            text=one_block,
            logit_bias=-2.0,
        )


def train_batches(patchifier, count):
    """The first batches of a run over the samples of `TinySource`."""
    source = TinySource()
    maker = Maker(source, patchifier, tiny_tokenizer(), seed=0)
    return TrainBatches(maker, Order(source.shard_sizes(), seed=0), [(0.0, (IMAGE, CAPTION))], max_batches=count)


def loss_of(model, batch):
    """The sigmoid loss of a batch."""
    return Sigmoid().loss(Step(model, batch, progress=0.0))


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture
def graphs():
    """Says how many graphs dynamo has captured in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def check_steps(patchifier, *, count, backend):
    """Compiles a step, and takes it on `count` batches; every loss and gradient is that of the step as it is."""
    model, batches, seen = small_model(patchifier), train_batches(patchifier, count), []
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=backend)
    for number in range(count):
        batch = batches[number]
        found, expected = compiled(model, batch), loss_of(model, batch)
        torch.testing.assert_close(found, expected)
        for one, other in zip(gradients(model, found), gradients(model, expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        seen.append((batch.views["image"].patches.shape[1], batch.keys))
    return seen


# torch 2.9's tracer instantiates what it warns of
TRACER = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TRACER
@pytest.mark.parametrize(("patchifier", "lengths"), [(NAFLEX, LENGTHS), (FIXED, [4])], ids=["naflex", "fixed"])
def test_a_run_is_captured_in_one_graph_per_sequence_length(patchifier, lengths, graphs):
    seen = check_steps(patchifier, count=3 * len(lengths), backend="eager")
    assert sorted({length for length, _ in seen}) == lengths
    assert len({keys for _, keys in seen}) > len(lengths)  # other samples, hence other grids, in the same graphs
    assert graphs() == len(lengths)


@TRACER
def test_the_backward_of_a_padded_step_is_captured_too(graphs):
    check_steps(ONE_LENGTH, count=2, backend="aot_eager")
    assert graphs() == 1


@pytest.mark.slow
@TRACER
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")  # inductor of torch 2.9 calls it
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_a_step_is_lowered_by_inductor(graphs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is there yet
    check_steps(ONE_LENGTH, count=2, backend="inductor")
    assert graphs() == 1


@pytest.fixture(scope="module")
def xla_run():
    """What xla_graphs.py found out in a process of its own."""
    pytest.importorskip("torch_xla")
    flags = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(Path(__file__).with_name("xla_graphs.py"))]
    env = {**os.environ, **flags, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xla
def test_xla_compiles_a_graph_per_length_and_one_more_for_the_first_step(xla_run):
    """The first step makes the optimizer's state, which later steps of the same length are given."""
    lengths, compiled = xla_run["lengths"], xla_run["compiled"]
    assert sorted(set(lengths)) == LENGTHS
    assert compiled[-1] == len(LENGTHS) + 1
    new = [now > before for before, now in zip([0, *compiled], compiled, strict=False)]
    first_times = [length not in lengths[:number] for number, length in enumerate(lengths)]
    again = lengths.index(lengths[0], 1)  # the first step's length comes up a second time
    assert new == [first or number == again for number, first in enumerate(first_times)]


@pytest.mark.xla
def test_steps_on_xla_hand_nothing_back_to_the_cpu(xla_run):
    assert xla_run["fallbacks"] == []


@pytest.mark.xla
def test_steps_on_xla_have_the_losses_of_the_cpu(xla_run):
    assert xla_run["losses"] == pytest.approx(xla_run["expected"], rel=1e-5)
    assert xla_run["losses"][-1] != pytest.approx(xla_run["losses"][0], rel=1e-2)  # the steps moved something


@pytest.mark.xla
def test_positions_are_resampled_on_xla_as_on_the_cpu(xla_run):
    assert xla_run["positions"] < 1e-5  # values and the table's gradient
