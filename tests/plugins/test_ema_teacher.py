"""`ema_teacher` follows the student and its heads by a moving average, and nothing else moves it."""

import pytest
import torch
from torch import nn

from siglip2 import IMAGE, Objective, hookimpl
from siglip2.core.schedules import Schedule
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.registry import check_needs
from siglip2.testing import tiny_module


class Distil(Objective):
    """Pulls the student's head towards the teacher's."""

    name = "distil"
    needs = ("teacher",)

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def setup(self, model, heads):
        self.head = heads["distil"] = nn.Linear(model.vision.width, 8)

    def loss(self, step):
        target = step.head("distil", by="teacher")(step.encode_image("image", by="teacher").pooled)
        return (self.head(step.encode_image("image").pooled) - target.detach() - 1).pow(2).mean()


def student_of(module):
    return [*module.model.vision.parameters(), *module.plugins["distil"].head.parameters()]


def teacher_of(module):
    return list(module.plugins["ema_teacher"].parameters())


def moved(module, by=0.1):
    """Moves every parameter of the student."""
    with torch.no_grad():
        for parameter in student_of(module):
            parameter.add_(by * torch.randn_like(parameter))


def test_teacher_is_the_vision_tower_its_pooling_head_and_the_registered_heads():
    module = tiny_module([EMATeacher(), Distil()])  # before the objective in the recipe, as in the published ones
    names = {name for name, _ in module.plugins["ema_teacher"].named_parameters()}
    tower = {f"vision.{name}" for name, _ in module.model.vision.named_parameters()}
    assert any(name.startswith("vision.pool.") for name in tower)
    assert names == tower | {"heads.distil.weight", "heads.distil.bias"}


def test_teacher_copies_the_student_when_it_wakes():
    module = tiny_module([Sigmoid(), EMATeacher(start=0.5), Distil(start=0.5)])
    moved(module)
    module.wake_due(0.4)
    assert not torch.equal(teacher_of(module)[0], student_of(module)[0])
    module.wake_due(0.5)
    assert all(torch.equal(a, b) for a, b in zip(teacher_of(module), student_of(module), strict=True))


@pytest.mark.parametrize(
    ("momentum", "progress", "share"), [(0.9, 0.6, 0.9), (Schedule([0.5, 1.0], [0.8, 1.0]), 0.75, 0.9)]
)
def test_after_a_step_it_is_the_moving_average(momentum, progress, share):
    module = tiny_module([Sigmoid(), EMATeacher(momentum=momentum, start=0.5), Distil(start=0.5)])
    module.wake_due(0.5)
    expected = [p.detach().double().clone() for p in teacher_of(module)]
    for _ in range(3):
        moved(module)
        expected = [
            share * e + (1 - share) * p.detach().double() for e, p in zip(expected, student_of(module), strict=True)
        ]
        module.awake_hook("after_step", progress)(model=module.model, progress=progress)
    for mine, theirs in zip(teacher_of(module), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_asleep_it_does_not_move():
    module = tiny_module([Sigmoid(), EMATeacher(start=0.5), Distil(start=0.5)])
    before = [p.detach().clone() for p in teacher_of(module)]
    moved(module)
    module.awake_hook("after_step", 0.4)(model=module.model, progress=0.4)
    assert all(torch.equal(a, b) for a, b in zip(teacher_of(module), before, strict=True))


def test_no_gradient_reaches_it_and_the_optimizer_does_not_know_it():
    module = tiny_module([EMATeacher(start=0.0), Distil()])
    module.wake_due(0.0)
    module(module.fake_batch(), 0.0)["distil"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher_of(module))
    assert all(p.grad is not None for p in module.plugins["distil"].head.parameters())


def test_it_stays_in_evaluation_mode():
    module = tiny_module([EMATeacher(), Distil()]).train()
    assert module.model.vision.training
    assert not any(part.training for part in module.plugins["ema_teacher"].modules())


def test_wrong_momentum_is_an_error():
    with pytest.raises(ValueError, match=r"momentum is a share in \[0, 1\].* found 1.5"):
        EMATeacher(momentum=Schedule([0.0], [1.5]))


class Needy(Distil):
    name = "needy"
    needs = ("teacher",)


def test_recipe_without_a_teacher_is_told_which_plugin_to_add():
    with pytest.raises(ValueError, match="plugin 'needy' needs the encoder 'teacher': add `ema_teacher`"):
        check_needs([Sigmoid(), Needy()])


def test_teacher_that_sleeps_when_it_is_needed_is_an_error():
    with pytest.raises(ValueError, match=r"from 0.5 to 1 of the run, but 'ema_teacher' is awake from 0.8 to 1"):
        check_needs([EMATeacher(start=0.8), Needy(start=0.5)])
    check_needs([EMATeacher(start=0.5), Needy(start=0.5)])
