"""`silc` is DINO's cross-entropy between local crops of the student and the global view of the teacher."""

import math

import pytest
import torch
from projected import project

from siglip2.core.crops import GLOBAL, LOCAL
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.schedules import Schedule
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.testing import tiny_module

SMALL = {"local_crops": 3, "local_size": 16, "hidden": 32, "bottleneck": 8, "prototypes": 24, "freeze_prototypes": 0.0}


def silc_module(*, seed=0, beside=(), **options):
    """A module whose teacher is not its student, at progress 0.5."""
    plugins = [EMATeacher(start=0.5), SILC(**{**SMALL, "start": 0.5, **options}), Sigmoid(), *beside]
    module = tiny_module(plugins, seed=seed)
    module.wake_due(0.5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.plugins["ema_teacher"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.plugins["silc"].centre.value.normal_(std=0.1)
    return module


def step_of(module, progress=0.5):
    return module.make_step(module.fake_batch(progress), progress)


def equation(step, plugin, *, tau_s=0.1, tau_t=0.04):
    """SILC, eqs. 2 and 3, pair by pair in float64 on the towers' pooled features; differentiable in the student."""
    teacher = step.encoders["teacher"]
    z_t, p_t = project(teacher.heads["silc"], teacher.vision(step.view("global")).pooled)
    z_s, p_s = project(plugin.head, step.model.vision(step.view("local")).pooled)
    q = ((z_t @ p_t.T - plugin.centre.value.double()) / tau_t).softmax(1).detach()
    log_p = (z_s @ p_s.T / tau_s).log_softmax(1)
    rows, total = len(z_t), 0.0
    for copy in range(len(z_s) // rows):
        for i in range(rows):
            total = total - (q[i] * log_p[copy * rows + i]).sum()
    return total / len(z_s)


def test_its_views_are_one_global_and_eight_local_crops():
    global_view, local_view = SILC().views()
    assert (global_view.name, global_view.copies, global_view.scale) == ("global", 1, (0.4, 1.0))
    assert local_view == LOCAL
    assert global_view == GLOBAL


def test_its_loss_and_gradients_are_the_equation_in_float64():
    module = silc_module()
    step, plugin = step_of(module), module.plugins["silc"]
    expected = equation(step, plugin)
    names, student = zip(
        *((n, p) for n, p in module.named_parameters() if n.startswith(("model.vision", "plugins.silc"))), strict=True
    )
    wanted = torch.autograd.grad(expected, student)
    loss = plugin.loss(step)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, ours, theirs in zip(names, torch.autograd.grad(loss, student), wanted, strict=True):
        family = [g for n, g in zip(names, wanted, strict=True) if n.split(".")[1] == name.split(".")[1]]
        off, scale = (ours - theirs).abs().max().item(), max(g.abs().max().item() for g in family)
        assert off <= 1e-4 * scale, f"{name} is off by {off:.1e}, of {scale:.1e}"  # float32 against float64


def test_teacher_temperature_may_be_a_schedule():
    module = silc_module(teacher_temperature=Schedule([0.5, 1.0], [0.04, 0.08]))
    step = step_of(module, 0.75)
    expected = equation(step, module.plugins["silc"], tau_t=0.06).item()
    assert module.plugins["silc"].loss(step).item() == pytest.approx(expected, rel=1e-5)


def test_at_the_start_the_loss_is_about_the_log_of_the_number_of_prototypes():
    """A teacher that equals its student favours the same prototypes: up to a nat less than ln K."""
    module = tiny_module([EMATeacher(), SILC(**{**SMALL, "prototypes": 4096, "bottleneck": 256})])
    module.wake_due(0.8)
    assert module.plugins["silc"].loss(step_of(module, 0.8)).item() == pytest.approx(math.log(4096), abs=1.0)


def test_centre_moves_to_the_mean_of_the_teacher_after_it_was_used():
    module = silc_module(centre_momentum=0.75)
    step, plugin = step_of(module), module.plugins["silc"]
    before, expected = plugin.centre.value.clone(), equation(step, plugin).item()
    assert plugin.loss(step).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(plugin.centre.value, before)
    plugin.after_step()
    teacher = step.encoders["teacher"]
    z_t, p_t = project(teacher.heads["silc"], teacher.vision(step.view("global")).pooled)
    mean = (z_t @ p_t.T).mean(0)
    torch.testing.assert_close(plugin.centre.value.double(), 0.75 * before.double() + 0.25 * mean, rtol=1e-5, atol=1e-6)


def test_prototypes_stay_as_they_are_in_the_first_stretch():
    module = silc_module(freeze_prototypes=0.1)
    plugin = module.plugins["silc"]
    plugin.loss(step_of(module, 0.55)).backward()
    assert plugin.head.prototype_weight.grad is None
    plugin.loss(step_of(module, 0.65)).backward()
    assert plugin.head.prototype_weight.grad.any()


def test_no_gradient_reaches_the_text_tower_the_temperature_or_the_teacher():
    module = silc_module()
    module.plugins["silc"].loss(step_of(module)).backward()
    warm = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None}
    assert warm == {"vision", "silc"}


def test_each_view_is_encoded_once_by_each_encoder():
    module = silc_module()
    calls = []
    module.model.vision.register_forward_hook(lambda m, args, out: calls.append(("student", len(args[0].patches))))
    module.plugins["ema_teacher"].register_forward_hook(lambda m, args, out: calls.append(("teacher", len(out.pooled))))
    module.plugins["silc"].loss(step_of(module))
    assert sorted(calls) == [("student", 3 * 4), ("teacher", 4)]


def test_student_equal_to_its_teacher_has_the_least_loss():
    module = silc_module()
    plugin = module.plugins["silc"]
    plugin.student_temperature = plugin.teacher_temperature = 0.1
    plugin.centre.value.zero_()
    step = step_of(module)
    step._features["local", "student"] = step.encode_image("global", by="teacher")
    plugin.local_view = GLOBAL
    plugin.head.load_state_dict(step.head("silc", by="teacher").state_dict())
    at_best = plugin.loss(step)
    grads = torch.autograd.grad(at_best, list(plugin.head.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-5
    with torch.no_grad():
        plugin.head.prototype_weight.add_(0.05 * torch.randn_like(plugin.head.prototype_weight))
    assert plugin.loss(step) > at_best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "silc: hidden is 0, expected at least 1"),
        ({"bottleneck": 0}, "silc: bottleneck is 0, expected at least 1"),
        ({"prototypes": 1}, "prototypes is 1, expected at least 2"),
        ({"centre_momentum": -0.1}, r"momentum is -0.1, expected a share in \[0, 1\]"),
        ({"student_temperature": 0.0}, "silc: student_temperature divides cosines, expected more than 0, found 0.0"),
        ({"teacher_temperature": Schedule([0.0, 1.0], [0.04, -1.0])}, "teacher_temperature .* found -1.0"),
        ({"freeze_prototypes": 10.0}, "silc: freeze_prototypes is a share of the run, expected 0 to 1, found 10.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_out_of_its_range_is_an_error_before_anything_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        SILC(**{**SMALL, **options})


def test_timm_tower_is_refused_since_it_takes_no_crops_of_another_size():
    options = {"patch_size": 16, "grid": (2, 2), "vocab_size": 40, "context_length": 6}
    model = build_two_towers("tiny/16", timm_name="vit_tiny_patch16_224", **options)
    with pytest.raises(ValueError, match=r"silc's local crops .* a timm vision tower takes: drop `model.timm`"):
        SILC(**SMALL).setup(model, {})


def test_no_gradient_reaches_the_decoder_of_locca():
    module = silc_module(beside=[LocCa(length=40, depth=1)])
    step = step_of(module)
    assert module.plugins["locca"].loss(step).requires_grad  # it reads features of the same step
    module.plugins["silc"].loss(step).backward()
    assert [name for name, p in module.plugins["locca"].named_parameters() if p.grad is not None] == []
