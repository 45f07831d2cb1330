"""Temperature and bias are frozen for their share of the run, and the temperature stays within its bounds."""

import math

import pytest
import torch

from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.temperature import Temperature
from siglip2.testing import tiny_module


def gradients(module, progress):
    """The gradients of temperature, bias and one weight of the image tower after a step at `progress`."""
    module.zero_grad()
    torch.stack(list(module(module.fake_batch(progress), progress).values())).sum().backward()
    module.awake_hook("after_step", progress)(model=module.model, progress=progress)
    weight = module.model.vision.blocks[0].attn.qkv.weight
    return [p.grad.clone() for p in (module.model.logit_scale, module.model.logit_bias, weight)]


def test_scalar_that_a_rule_froze_leaves_one_hook_on_the_other():
    module = tiny_module([Sigmoid(), Temperature(frozen=0.5)])
    module.model.logit_bias.requires_grad_(False)
    for _ in range(3):
        module(module.fake_batch(0.1), 0.1)
    assert len(module.model.logit_scale._backward_hooks) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scalars_get_no_gradient_while_frozen_and_their_own_afterwards(order):
    plugins = [Sigmoid(), Temperature(frozen=0.5)]
    module, alone = tiny_module([plugins[i] for i in order]), tiny_module([Sigmoid()])
    assert [bool(g.any()) for g in gradients(module, 0.49)] == [False, False, True]
    for ours, theirs in zip(gradients(module, 0.5), gradients(alone, 0.5), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scalars_are_free_while_the_plugin_sleeps():
    module = tiny_module([Sigmoid(), Temperature(frozen=1.0, stop=0.5)])
    assert not gradients(module, 0.4)[0].any()
    assert gradients(module, 0.6)[0].any()


@pytest.mark.parametrize(("start", "expected"), [(1000.0, 200.0), (0.1, 1.0), (50.0, 50.0)])
def test_temperature_is_clamped_after_a_step(start, expected):
    module = tiny_module([Sigmoid(), Temperature(min_scale=1.0, max_scale=200.0)])
    module.model.logit_scale.data.fill_(math.log(start))
    module.awake_hook("after_step", 0.0)(model=module.model, progress=0.0)
    assert float(module.model.logit_scale.detach().exp()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"frozen": 2.0}, {"max_scale": 0.5}, {"min_scale": -1.0}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="temperature: "):
        Temperature(**options)
