"""Every hook is called when it should be, in recipe order, and a hook that would never be called is an error."""

import copy
import sys

import pytest
import torch

from siglip2 import IMAGE, Objective, Plugin, hookimpl
from siglip2.core.hooks import RUN_SPECS, CatalogueSpecs, build_manager, hook_names
from siglip2.plugins.fixed import Fixed
from siglip2.testing import tiny_module, tiny_step


class Recorder(Plugin):
    """Notes which of its hooks were called."""

    name = "recorder"

    def __init__(self, start=0.0, stop=1.0):
        super().__init__(start=start, stop=stop)
        self.calls = []


class Mean(Objective):
    name = "mean"

    @hookimpl
    def views(self):
        return [IMAGE]

    def loss(self, step):
        return step.encode_image("image").embedding.pow(4).mean()


def test_hook_register_plugins_makes_the_catalogue(third_party_plugins):
    from siglip2.registry import catalogue

    assert {"fixed", "sigmoid"} <= set(catalogue())


def test_hook_patchifier_decides_patch_size_and_grid_of_the_model():
    module = tiny_module([Fixed(image_size=48, patch_size=16, batch_size=4)])
    assert module.patchifier.grid == (3, 3)
    assert module.model.vision.pos_embed.shape[:2] == (3, 3)


def test_hook_views_decides_what_is_made_of_samples():
    assert list(tiny_step([Mean()]).batch.views) == ["image"]


def test_hook_setup_sees_the_model_before_training():
    class Sized(Recorder):
        @hookimpl
        def setup(self, model):
            self.head = torch.nn.Linear(model.embed_dim, 3)

    names = [name for name, _ in tiny_module([Sized()]).named_parameters()]
    assert "plugins.recorder.head.weight" in names


def test_hook_encoders_are_reachable_by_name_and_give_no_gradient():
    class Offers(Recorder):
        @hookimpl
        def setup(self, model):
            self.vision = copy.deepcopy(model.vision)

        @hookimpl
        def encoders(self):
            return {"elder": self.vision}

    step = tiny_step([Mean(), Offers()])
    elder, student = step.encode_image("image", by="elder"), step.encode_image("image")
    assert torch.equal(elder.embedding, student.embedding)
    assert student.embedding.requires_grad
    assert not elder.embedding.requires_grad


def test_hook_wake_is_called_once_at_the_first_step_past_start():
    class Wakes(Recorder):
        @hookimpl
        def wake(self, model):
            self.calls.append("wake")

    late, early = Wakes(start=0.5), Mean()
    module = tiny_module([early, late])
    called = []
    for progress in (0.0, 0.49, 0.5, 0.6):
        module.wake_due(progress)
        called.append(len(late.calls))
    assert called == [0, 0, 1, 1]


def test_hook_wake_is_called_before_the_first_step_of_a_plugin_that_is_awake_from_the_start():
    class Wakes(Recorder):
        @hookimpl
        def wake(self, model):
            self.calls.append("wake")

    plugin = Wakes()
    module = tiny_module([plugin])
    module.wake_due(0.0)
    module.wake_due(0.1)
    assert plugin.calls == ["wake"]


def test_hook_curate_reduces_the_batch_that_losses_see():
    class FirstTwo(Recorder):
        @hookimpl
        def curate(self, step):
            return torch.tensor([0, 1])

    module = tiny_module([FirstTwo(), Mean()])
    kept = module(module.fake_batch(batch_size=4), 0.0)["mean"]
    alone = module(module.fake_batch(batch_size=2), 0.0)["mean"]
    torch.testing.assert_close(kept, alone)


def test_hook_losses_of_an_objective_is_weight_times_loss():
    plugin = Mean(weight=0.25)
    step = tiny_step([plugin])
    assert torch.equal(plugin.losses(step)["mean"], 0.25 * plugin.loss(step))


def test_hook_after_step_is_called_with_the_model_and_the_progress():
    class After(Recorder):
        @hookimpl
        def after_step(self, model, progress):
            self.calls.append((model, progress))

    plugin = After()
    module = tiny_module([plugin])
    module.awake_hook("after_step", 0.25)(model=module.model, progress=0.25)
    assert plugin.calls == [(module.model, 0.25)]


def test_no_hook_is_without_a_test():
    tested = [name for name in vars(sys.modules[__name__]) if name.startswith("test_hook_")]
    missing = [
        h for h in hook_names(CatalogueSpecs, *RUN_SPECS) if not any(t.startswith(f"test_hook_{h}_") for t in tested)
    ]
    assert missing == []


def named(name, order):
    class Plain(Plugin):
        @hookimpl
        def after_step(self, model):
            order.append(name)

        @hookimpl
        def curate(self, step):
            order.append(name)
            return {"a": None}.get(name, name)

    Plain.name = name
    return Plain()


def test_hooks_run_in_recipe_order():
    order = []
    build_manager(named(n, order) for n in "cab").hook.after_step(model=None, progress=0.0)
    assert order == ["c", "a", "b"]


def test_first_plugin_of_the_recipe_that_answers_curate_decides():
    order = []
    answer = build_manager(named(n, order) for n in "abc").hook.curate(step=None)
    assert (answer, order) == ("b", ["a", "b"])


def test_misspelt_hook_is_an_error_that_lists_the_hooks():
    class Misspelt(Plugin):
        name = "misspelt"

        @hookimpl
        def after_steps(self, model): ...

    with pytest.raises(ValueError, match="after_steps.*Hooks that exist: patchifier, views"):
        build_manager([Misspelt()])


def test_hook_argument_that_does_not_exist_is_an_error():
    class Wrong(Plugin):
        name = "wrong"

        @hookimpl
        def after_step(self, modle): ...

    with pytest.raises(ValueError, match="modle"):
        build_manager([Wrong()])


def test_hook_without_hookimpl_is_an_error_that_says_so():
    class Undecorated(Plugin):
        name = "undecorated"

        def views(self):
            return [IMAGE]

    with pytest.raises(ValueError, match="'undecorated' defines `views`.*without @hookimpl"):
        build_manager([Undecorated()])


def test_module_with_hooks_can_be_deep_copied():
    module = tiny_module([Mean()])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.model.logit_scale.add_(1.0)
    assert twin.plugins["mean"] is not module.plugins["mean"]
    assert torch.equal(twin(module.fake_batch(), 0.0)["mean"], module(module.fake_batch(), 0.0)["mean"])


def test_deep_copied_module_calls_its_own_plugins():
    module = tiny_module([Mean()])
    twin = copy.deepcopy(module)
    twin.plugins["mean"].weight = 0.0
    assert twin(module.fake_batch(), 0.0)["mean"].item() == 0.0
    assert module(module.fake_batch(), 0.0)["mean"].item() > 0.0
