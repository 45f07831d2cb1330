"""The module refuses what would go wrong later: heads that overwrite one another, strategies, accumulation."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from torch import nn

from siglip2 import IMAGE, Objective, hookimpl
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import tiny_module

UNUSED = "ddp_find_unused_parameters_true"
SIZES = {"hidden": 32, "bottleneck": 8, "prototypes": 16}
LOCALS = {"local_crops": 2, "local_size": 16}


class First(Objective):
    """Has a head of a common name."""

    name = "first"

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def setup(self, model, heads):
        self.head = heads["projection"] = nn.Linear(model.vision.width, 8)

    def loss(self, step):
        return self.head(step.encode_image("image").pooled).pow(2).mean()


class Second(First):
    name = "second"


class ThirdByUpdate(First):
    name = "third"

    @hookimpl
    def setup(self, model, heads):
        self.head = nn.Linear(model.vision.width, 8)
        heads.update({"projection": self.head})


@pytest.mark.parametrize("other", [Second, ThirdByUpdate])
def test_two_heads_of_one_name_are_an_error(other):
    with pytest.raises(ValueError, match="two plugins give a head called 'projection': rename one of them"):
        tiny_module([First(), other()])


def begin(plugins, *, strategy="ddp", rehearsal=True, **options):
    """Does what happens between building a run for two processes and its first step."""
    module = tiny_module(plugins)
    module.rehearsal = rehearsal
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=10, **quiet, **options)
    make_batch = lambda phase: module.fake_batch(phase.start, batch_size=2)  # noqa: E731
    module.trainer.datamodule = SimpleNamespace(rehearsal_batch=make_batch)
    module.on_fit_start()


def silc(start=0.0, freeze=0.0):
    return SILC(**SIZES, **LOCALS, start=start, freeze_prototypes=freeze)


COLD = {
    "sleeping head": (
        [Sigmoid(), First(start=0.5)],
        "plugins.first.head.weight and 1 more of plugins.first at .* 0,",
    ),
    "stopped head": ([Sigmoid(), First(stop=0.5)], "plugins.first.head.weight and 1 more .* at progress 0.5,"),
    "frozen prototypes of silc": (
        [Sigmoid(), EMATeacher(start=0.0), silc(freeze=0.1)],
        "no gradient reaches plugins.silc.head.prototype_weight at progress 0, and",
    ),
    "frozen prototypes of tips": (
        [Sigmoid(), EMATeacher(start=0.0), TIPS(**SIZES, start=0.0, freeze_prototypes=0.1)],
        "no gradient reaches plugins.tips.head.prototype_weight at progress 0, and",
    ),
    "text tower without a loss": (
        [LocCa(length=40)],
        "model.logit_scale at .*, model.text.* more of model.text at",
    ),
}


@pytest.mark.parametrize(("plugins", "names"), COLD.values(), ids=COLD)
def test_plain_ddp_is_refused_with_what_gets_no_gradient(plugins, names):
    with pytest.raises(ValueError, match=rf"{names}.*use --trainer.strategy {UNUSED}"):
        begin(plugins)


def test_ddp_that_finds_unused_parameters_takes_any_recipe():
    begin([Sigmoid(), First(start=0.5)], strategy=UNUSED)


def test_plain_ddp_takes_a_recipe_in_which_every_parameter_has_a_gradient():
    begin([Sigmoid(), LocCa(length=40), EMATeacher(start=0.0), silc()])


def test_without_a_rehearsal_plugins_that_sleep_are_refused_under_plain_ddp():
    with pytest.raises(ValueError, match=rf"plugins that sleep for part of the run \(first\).*{UNUSED}"):
        begin([Sigmoid(), First(start=0.5)], rehearsal=False)
    begin([Sigmoid(), First()], rehearsal=False)


def test_plain_accumulation_is_refused_for_losses_over_pairs_alone():
    others = [LocCa(length=40), EMATeacher(start=0.0), silc()]
    with pytest.raises(ValueError, match="is 4, but sigmoid would see only the pairs inside each micro-batch"):
        begin([*others, Sigmoid()], accumulate_grad_batches=4)
    begin(others, strategy=UNUSED, accumulate_grad_batches=4)
