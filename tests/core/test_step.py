"""The step computes each feature once, and other encoders without gradient."""

import copy
from types import SimpleNamespace

import pytest
import torch

from siglip2 import Objective, hookimpl
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.step import Step
from siglip2.testing import fake_batch


class Counting(torch.nn.Module):
    """A vision tower that counts its calls."""

    def __init__(self, vision):
        super().__init__()
        self.vision, self.calls = vision, 0

    def forward(self, images):
        self.calls += 1
        return self.vision(images)


@pytest.fixture
def counted(towers):
    """Towers whose image encoder counts."""
    towers.vision = Counting(towers.vision)
    return towers


@pytest.fixture
def step(counted):
    return Step(
        counted, fake_batch(), progress=0.25, encoders={"elder": Counting(copy.deepcopy(counted.vision.vision))}
    )


def test_image_features_are_computed_once(step):
    assert step.encode_image() is step.encode_image("image", by="student")
    assert step.model.vision.calls == 1


def test_text_features_are_computed_once(step):
    assert step.encode_text() is step.encode_text("caption")


def test_each_encoder_has_its_own_features(step):
    step.encode_image("image", by="elder")
    step.encode_image("image", by="elder")
    step.encode_image("image")
    assert (step.encoders["elder"].calls, step.model.vision.calls) == (1, 1)


def test_embeddings_have_unit_norm(step):
    for features in (step.encode_image(), step.encode_text()):
        torch.testing.assert_close(features.embedding.norm(dim=-1), torch.ones(4))


def test_other_encoders_run_without_gradient(step):
    elder = step.encode_image("image", by="elder")
    assert not any(t.requires_grad for t in (elder.tokens, elder.pooled, elder.embedding))
    assert step.encode_image("image").embedding.requires_grad


def test_gradient_through_a_shared_feature_is_the_sum_of_its_uses(step, towers):
    embedding = step.encode_image().embedding
    parameter = towers.vision.vision.embed.weight
    first, second = embedding.pow(4).mean(), embedding[:, 0].mean()
    apart = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (first, second)]
    (first + second).backward()
    torch.testing.assert_close(parameter.grad, sum(apart))


def test_view_that_nobody_declared_is_an_error_that_lists_the_others(step):
    with pytest.raises(ValueError, match="no view called 'local'.*image, caption.*`views` hook"):
        step.encode_image("local")


def test_encoder_that_is_not_awake_is_an_error_that_lists_the_others(step):
    with pytest.raises(ValueError, match="no encoder called 'teacher' is awake .there is student, elder"):
        step.encode_image("image", by="teacher")


def test_selected_step_computes_only_the_kept_rows(step):
    everything = step.encode_image().embedding
    kept = step.select(torch.tensor([3, 1]))
    torch.testing.assert_close(kept.encode_image().embedding, everything[[3, 1]])
    assert (kept.progress, list(kept.encoders)) == (0.25, ["elder"])


def test_scalars_of_a_step_and_of_what_was_selected_from_it_are_the_same(step):
    step.log("kept", torch.tensor(0.5, requires_grad=True))
    selected = step.select(torch.tensor([3, 1]))
    selected.log("spread", torch.tensor(2.0))
    assert step.scalars == selected.scalars == {"kept": torch.tensor(0.5), "spread": torch.tensor(2.0)}
    assert not step.scalars["kept"].requires_grad


def test_selected_step_is_of_the_same_class(counted):
    class Special(Step):
        pass

    assert type(Special(counted, fake_batch(), progress=0.0).select(torch.tensor([1]))) is Special


class EverySecond(Objective):
    """Keeps every second row, and says how many it saw before and after."""

    name = "every_second"

    @hookimpl
    def curate(self, step):
        step.log("seen", torch.tensor(float(step.batch.size)))
        return torch.arange(0, step.batch.size, 2)

    def loss(self, step):
        step.log("kept", torch.tensor(float(step.batch.size)))
        return step.encode_image().embedding.pow(4).mean()


def test_what_a_curator_and_an_objective_log_is_among_the_metrics_of_the_run(tiny_recipe, third_party_plugins):
    module = SimpleNamespace(register_plugins=hookimpl(lambda: [EverySecond]))
    dist = SimpleNamespace(name="every-second", version="1.2")
    third_party_plugins.append(SimpleNamespace(name="toy", value="toy", dist=dist, load=lambda: module))
    cli = SigLIP2CLI([*tiny_recipe, "--plugins.every_second", "on"], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    found = cli.trainer.callback_metrics
    assert (found["train/seen"], found["train/kept"]) == (4, 2)
