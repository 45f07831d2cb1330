"""The rehearsal runs every phase, names what fails, and leaves no trace."""

import contextlib
import copy

import pytest
import torch

from siglip2 import IMAGE, Objective, hookimpl
from siglip2.core.layout import Phase
from siglip2.core.rehearsal import name_cold, no_trace
from siglip2.core.rehearsal import rehearse as rehearse_phases
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import rehearse, tiny_module


class Centred(Objective):
    """Draws random numbers and moves a buffer."""

    name = "centred"

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def setup(self, model):
        self.register_buffer("centre", torch.zeros(model.embed_dim))

    def loss(self, step):
        embedding = step.encode_image("image").embedding
        self.centre.lerp_(embedding.detach().mean(0), 0.5)
        return ((embedding - self.centre) * torch.rand_like(embedding)).pow(2).mean()


class Broken(Centred):
    name = "broken"

    def loss(self, step):
        raise RuntimeError("shapes [2, 64] and [2, 32]")


class PerSample(Centred):
    name = "per_sample"

    def loss(self, step):
        return step.encode_image("image").embedding.pow(2).sum(1)


class NotFinite(Centred):
    name = "not_finite"

    def loss(self, step):
        return super().loss(step) * float("nan")


def test_rehearsal_leaves_parameters_buffers_gradients_and_chance_alone():
    module = tiny_module([Sigmoid(), Centred(start=0.5)])
    before, chance = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    rehearse_phases(module, module.phases, lambda phase: module.fake_batch(phase.start, batch_size=2))
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), chance)


class Headed(Centred):
    """Uses its weight, and never its bias."""

    name = "headed"

    @hookimpl
    def setup(self, model):
        self.head = torch.nn.Linear(model.embed_dim, 4)

    def loss(self, step):
        return (step.encode_image("image").embedding @ self.head.weight.T).pow(2).mean()


def test_rehearsal_finds_in_which_phase_a_parameter_has_no_gradient():
    module = tiny_module([Sigmoid(), Headed(start=0.5)])
    module.plugins["headed"].head.register_parameter("frozen", torch.nn.Parameter(torch.ones(1), requires_grad=False))
    cold = rehearse_phases(module, module.phases, lambda phase: module.fake_batch(phase.start, batch_size=2))
    found = {(phase.start, phase.stop): names for phase, names in cold.items()}
    weight, bias = "plugins.headed.head.weight", "plugins.headed.head.bias"
    assert found == {(0.0, 0.5): [weight, bias], (0.5, 1.0): [bias]}


def test_rehearsal_does_not_call_what_waits_for_gradients():
    """DDP counts as used in the first training step what it saw before it."""
    module, called = tiny_module([Sigmoid()]), []
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    rehearse_phases(module, module.phases, lambda phase: module.fake_batch(phase.start, batch_size=2))
    assert called == []


def test_cold_parameters_are_named_once_for_each_plugin_and_tower():
    first, second = Phase(0.0, 0.5, ()), Phase(0.5, 1.0, ())
    cold = {first: ["model.logit_bias", "plugins.a.w", "plugins.a.b", "plugins.ab.w"], second: ["plugins.a.w"]}
    expected = "model.logit_bias at progress 0, plugins.a.w and 1 more of plugins.a at progress 0, plugins.ab.w at "
    assert name_cold(cold) == expected + "progress 0"
    assert name_cold({first: [], second: []}) == ""


def test_rehearsal_leaves_no_trace_when_a_phase_fails():
    module = tiny_module([Centred()])
    chance = torch.get_rng_state()
    with contextlib.suppress(KeyboardInterrupt), no_trace(module):
        module(module.fake_batch(), 0.0)["centred"].backward()
        raise KeyboardInterrupt
    assert not module.plugins["centred"].centre.any()
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), chance)


def test_rehearsal_reaches_plugins_that_wake_late():
    with pytest.raises(RuntimeError, match="shapes") as error:
        rehearse([Sigmoid(), Broken(start=0.8)])
    assert "progress 0.8 to 1 with the plugins fixed, sigmoid, broken" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("plugin", "message"), [(PerSample(), r"has the shape \[2\], expected a scalar"), (NotFinite(), "is not finite")]
)
def test_loss_that_is_no_finite_scalar_is_named(plugin, message):
    with pytest.raises(ValueError, match=f"loss term '{plugin.name}' {message}"):
        rehearse([plugin])


def test_phase_without_an_objective_is_an_error():
    with pytest.raises(ValueError, match=r"no objective is awake at progress 0 to 0\.5"):
        rehearse([Sigmoid(start=0.5)])
