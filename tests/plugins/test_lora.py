"""Adapters change what the towers say as the merged weights would, and their state is the towers' and their own."""

import pytest
import torch

from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.lora import LoRA, merged
from siglip2.testing import tiny_model, tiny_module

pytest.importorskip("peft")


@pytest.fixture
def adapted():
    """A module with adapters that say something."""
    module = tiny_module([LoRA(rank=4, alpha=8.0)])
    generator = torch.Generator().manual_seed(1)
    for up in module.plugins["lora"].up.values():
        up.weight.data = 0.1 * torch.randn(up.weight.shape, generator=generator)
    return module.eval()


def test_state_of_the_towers_is_that_of_towers_without_adapters_with_the_sum_inside(adapted):
    plain = tiny_model()
    plain.load_state_dict(adapted.model.state_dict())  # strict: the same names
    layer = adapted.model.text.blocks[1].mlp.fc2
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = layer.base_layer.weight.double() + 8.0 / 4 * up.double() @ down.double()
    torch.testing.assert_close(plain.text.blocks[1].mlp.fc2.weight.double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_towers_with_the_sum_give_the_embeddings_of_those_with_adapters(adapted):
    plain = tiny_model().eval()
    before = plain.encode_text(torch.arange(32).view(2, 16)).embedding
    plain.load_state_dict(adapted.model.state_dict())
    ids = torch.arange(32).view(2, 16)
    ours, theirs = adapted.model.encode_text(ids).embedding, plain.encode_text(ids).embedding
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (before - theirs).abs().max() > 1e-3


def test_state_round_trips_to_the_bit_base_and_adapters_apart(adapted):
    twin = tiny_module([LoRA(rank=4, alpha=8.0)], seed=1)
    twin.load_state_dict(adapted.state_dict())
    ours, theirs = dict(adapted.named_parameters()), dict(twin.named_parameters())
    assert [name for name, p in ours.items() if not torch.equal(p, theirs[name])] == []


def test_fresh_adapters_leave_the_weights_that_a_run_starts_from(adapted):
    """A warm start takes the product from a file and the plugin's state, base included, from the run itself."""
    fresh = tiny_module([LoRA(rank=2)])
    own = {name: t.clone() for name, t in fresh.state_dict().items() if name.startswith("plugins.")}
    product = tiny_model(seed=3)
    fresh.load_state_dict({**own, **{f"model.{name}": t for name, t in product.state_dict().items()}})
    layer = fresh.model.vision.blocks[0].attn.qkv
    assert torch.equal(layer.base_layer.weight, product.vision.blocks[0].attn.qkv.weight)
    assert torch.equal(merged(layer), product.vision.blocks[0].attn.qkv.weight)


def test_only_adapters_that_match_and_the_scalars_are_trained():
    module = tiny_module([LoRA(match=r"text\.blocks\.\d+\.attn\.qkv")])
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert set(trained) == {
        *("model.logit_scale", "model.logit_bias"),
        *(f"model.text.blocks.{i}.attn.qkv.lora_{ab}.default.weight" for i in range(2) for ab in "AB"),
    }


def test_adapters_that_sleep_say_nothing_until_they_wake_also_on_resume(adapted):
    state = adapted.state_dict()
    sleeping = tiny_module([LoRA(rank=4, alpha=8.0, start=0.5)]).eval()
    assert sleeping.model.text.blocks[0].mlp.fc1.disable_adapters
    sleeping.load_state_dict(state)  # of a run that is past their start: `wake` is not called again
    assert not sleeping.model.text.blocks[0].mlp.fc1.disable_adapters


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"stop": 0.5}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="lora: "):
        LoRA(**options)


def test_pattern_that_fits_no_layer_is_named():
    with pytest.raises(ValueError, match="lora: no Linear of the towers fits 'vison"):
        tiny_module([LoRA(match=r"vison\.blocks.*")])


@pytest.mark.parametrize("order", [1, -1])
def test_teacher_of_a_tower_with_adapters_is_refused_wherever_it_stands(order):
    plugins = [LoRA(rank=4), EMATeacher(start=0.0)]
    with pytest.raises(ValueError, match="ema_teacher: the vision tower has adapters"):
        tiny_module(plugins[::order])
