"""Blocks recomputed or compiled in place: the same numbers, the same names, less memory. And who may shard them."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from siglip2.core.model.sizes import Shape
from siglip2.core.model.text import TextTower
from siglip2.core.parallel import (
    FSDP2Strategy,
    _recomputed_on_xla,
    blocks,
    check_strategy,
    checkpoint_blocks,
    compile_blocks,
)
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import tiny_module

PROGRESS = 0.9
dynamo_looks_at_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SMALL = {"hidden": 32, "bottleneck": 8, "prototypes": 16}


@pytest.fixture
def module():
    """All objectives, awake."""
    module = tiny_module(
        [Sigmoid(), LocCa(length=40), EMATeacher(), SILC(local_crops=2, local_size=16, **SMALL), TIPS(**SMALL)]
    )
    module.wake_due(PROGRESS)
    return module


def step(module):
    """The losses of one batch, the gradients, and how many values were kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in module.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = module(module.fake_batch(PROGRESS), PROGRESS)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return losses, gradients, sum(kept.values())


def assert_same(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **tolerance)


def test_blocks_are_those_of_towers_teacher_and_decoder(module):
    parts = [
        module.model.vision,
        module.model.text,
        module.plugins["locca"].decoder,
        module.plugins["ema_teacher"].vision,
    ]
    assert {id(b) for b in blocks(module)} == {id(b) for part in parts for b in part.blocks}


def test_recomputed_blocks_give_bitwise_the_same_gradients_and_keep_less(module):
    losses, gradients, kept = step(module)
    names = list(module.state_dict())
    checkpoint_blocks(module)
    again, recomputed, kept_less = step(module)
    assert_same(again, losses, rtol=0, atol=0)
    assert_same(recomputed, gradients, rtol=0, atol=0)
    assert kept_less < 0.6 * kept
    assert list(module.state_dict()) == names


def test_forward_that_somebody_gave_a_block_is_the_one_that_is_recomputed():
    text = TextTower(Shape(32, 1, 64, 2), vocab_size=50, context_length=8, embed_dim=32)
    (block,) = text.blocks
    block.forward = lambda x: x * 3
    checkpoint_blocks(text)
    x = torch.ones(1, 2, 32, requires_grad=True)
    assert torch.equal(block(x=x), x * 3)


def recomputed_on_xla(forward):
    def run(*args, **kwargs):
        return _recomputed_on_xla(forward, args, kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run


def test_blocks_recomputed_as_on_xla_lose_no_gradient(module, monkeypatch):
    """torch_xla's checkpoint is reentrant: it follows only tensors that are arguments themselves. torch has one too."""

    def reentrant(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    monkeypatch.setitem(sys.modules, "torch_xla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_xla.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_xla.utils.checkpoint", SimpleNamespace(checkpoint=reentrant))
    losses, gradients, _ = step(module)
    for block in blocks(module):
        block.forward = recomputed_on_xla(block.forward)
    again, recomputed, _ = step(module)
    assert_same(again, losses, rtol=0, atol=0)
    assert_same(recomputed, gradients, rtol=1e-6, atol=1e-7)


@dynamo_looks_at_gradients
def test_compiled_blocks_give_the_same_losses_and_names(module):
    losses, gradients, _ = step(module)
    names = list(module.state_dict())
    compile_blocks(module, "aot_eager")
    again, compiled, _ = step(module)
    assert_same(again, losses, rtol=1e-6, atol=1e-6)
    assert_same(compiled, gradients, rtol=1e-5, atol=1e-6 * max(float(g.abs().max()) for g in gradients.values()))
    assert list(module.state_dict()) == names


@dynamo_looks_at_gradients
def test_a_second_step_at_another_progress_compiles_nothing(module):
    compile_blocks(module, "eager")
    torch._dynamo.utils.counters.clear()
    step(module)
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batch = module.fake_batch(PROGRESS)
    module(batch, PROGRESS + 0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first
    assert not torch._dynamo.utils.counters["graph_break"]


@dynamo_looks_at_gradients
@pytest.mark.parametrize("depth", [1, 4])
def test_recomputed_blocks_of_one_shape_share_what_was_compiled(depth):
    torch._dynamo.reset()
    text = TextTower(Shape(32, depth, 64, 2), vocab_size=50, context_length=8, embed_dim=32)
    checkpoint_blocks(text)
    compile_blocks(text, "eager")
    torch._dynamo.utils.counters.clear()
    text(torch.arange(16).reshape(2, 8)).projected.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_backend_that_torch_does_not_have_is_refused(module):
    with pytest.raises(
        ValueError, match=r"model\.compile is 'indcutor', expected null or a backend of torch: .*inductor"
    ):
        compile_blocks(module, "indcutor")


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
def test_strategy_that_loads_what_was_not_matched_is_refused(strategy):
    with pytest.raises(ValueError, match=f"trainer.strategy is {strategy.__name__}, .* use --trainer.strategy fsdp2"):
        check_strategy(strategy())


def test_strategy_of_ours_is_taken():
    check_strategy(FSDP2Strategy())


@pytest.mark.parametrize("replicas", [0, 2])
def test_copies_that_do_not_divide_the_processes_are_refused(replicas):
    def set_up():
        strategy = FSDP2Strategy(replicas=replicas)
        strategy.parallel_devices = [torch.device("cpu")] * 3
        strategy.setup_environment()

    with pytest.raises(ValueError, match=f"replicas is {replicas}, "):
        set_up()
