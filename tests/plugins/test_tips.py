"""`tips` predicts the teacher's patch features where the student's patches are masked, and nowhere else."""

import math

import pytest
import torch
from projected import project

from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.schedules import Schedule
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import tiny_module

SMALL = {"hidden": 32, "bottleneck": 8, "prototypes": 24, "freeze_prototypes": 0.0, "start": 0.5}


def tips_module(*, beside=(), **options):
    """A module of 4 x 4 patches whose teacher is not its student, at progress 0.5."""
    plugins = [Fixed(image_size=64, patch_size=16, batch_size=8), EMATeacher(start=0.5), TIPS(**{**SMALL, **options})]
    module = tiny_module([*plugins, Sigmoid(), *beside])
    module.wake_due(0.5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.plugins["ema_teacher"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.plugins["tips"].centre.value.normal_(std=0.1)
    return module


def step_of(module):
    return module.make_step(module.fake_batch(0.5), 0.5)


def masked_tokens(step, token):
    """The tower's tokens with some embedded patches replaced, from the tower's parts."""
    vision, images = step.model.vision, step.view("global")
    x = vision.embed(images.patches.float() / 127.5 - 1)
    for i, masked in enumerate(step.view("mask").tolist()):
        for n in masked:
            x[i, n] = token
    x = x + vision.pos_embed.flatten(0, 1)
    for block in vision.blocks:
        x = block(x)
    return vision.norm(x)


def equation(step, plugin, *, tau_s=0.1, tau_t=0.04):
    """iBOT's loss patch by patch in float64; differentiable in the student."""
    teacher = step.encoders["teacher"]
    z_t, p_t = project(teacher.heads["tips"], teacher.vision(step.view("global")).tokens)
    z_s, p_s = project(plugin.head, masked_tokens(step, plugin.mask_token))
    per_image = []
    for i, masked in enumerate(step.view("mask").tolist()):
        terms = []
        for n in masked:
            q = ((p_t @ z_t[i, n] - plugin.centre.value.double()) / tau_t).softmax(0).detach()
            terms.append(-(q * (p_s @ z_s[i, n] / tau_s).log_softmax(0)).sum())
        per_image.append(torch.stack(terms).mean())
    return torch.stack(per_image).mean()


@pytest.mark.parametrize("pattern", ["random", "block"])
def test_its_loss_and_gradients_are_the_equation_in_float64(pattern):
    module = tips_module(mask_pattern=pattern)
    step, plugin = step_of(module), module.plugins["tips"]
    expected = equation(step, plugin)
    names, student = zip(
        *(
            (n, p)
            for n, p in module.named_parameters()
            if n.startswith(("model.vision", "plugins.tips")) and ".pool." not in n
        ),
        strict=True,
    )
    wanted = torch.autograd.grad(expected, student)
    loss = plugin.loss(step)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, ours, theirs in zip(names, torch.autograd.grad(loss, student), wanted, strict=True):
        family = [g for n, g in zip(names, wanted, strict=True) if n.split(".")[1] == name.split(".")[1]]
        off, scale = (ours - theirs).abs().max().item(), max(g.abs().max().item() for g in family)
        assert off <= 1e-4 * scale, f"{name} is off by {off:.1e}, of {scale:.1e}"  # float32 against float64


@pytest.mark.parametrize("pattern", ["random", "block"])
def test_exactly_half_of_the_patches_of_every_image_are_masked(pattern):
    index_BM = step_of(tips_module(mask_pattern=pattern)).view("mask")
    assert index_BM.shape == (4, 8)
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 16 for row in index_BM.tolist())


def test_masked_patches_keep_their_position_and_lose_their_content():
    module = tips_module()
    step, plugin = step_of(module), module.plugins["tips"]
    other = step_of(module)
    for i, masked in enumerate(other.view("mask").tolist()):
        other.view("global").patches[i, masked] = 7
    index = step.view("mask").long()
    ours, theirs = plugin._encode_masked(step, index), plugin._encode_masked(other, index)
    assert torch.equal(ours, theirs)
    first = ours[0, index[0]]
    assert not torch.allclose(first[0], first[1], atol=1e-3)  # same token, other positions


def test_teacher_sees_the_unmasked_view_once_for_silc_and_tips_together():
    silc = SILC(**{k: v for k, v in SMALL.items() if k != "start"}, local_crops=2, local_size=32, start=0.5)
    module = tips_module(beside=[silc])
    calls = []
    module.plugins["ema_teacher"].register_forward_hook(lambda m, args, out: calls.append(args[0].patches))
    step = step_of(module)
    terms = {n: module.plugins[n].loss(step) for n in ("silc", "tips")}
    assert len(calls) == 1
    assert torch.equal(calls[0], step.view("global").patches)
    assert all(term.isfinite() for term in terms.values())


def test_at_the_start_the_loss_is_about_the_log_of_the_number_of_prototypes():
    """A teacher that equals its student favours the same prototypes: up to a nat less than ln K."""
    module = tiny_module([EMATeacher(), TIPS(**{**SMALL, "prototypes": 4096, "bottleneck": 256, "start": 0.8})])
    module.wake_due(0.8)
    step = module.make_step(module.fake_batch(0.8), 0.8)
    assert module.plugins["tips"].loss(step).item() == pytest.approx(math.log(4096), abs=1.0)


def test_centre_moves_to_the_mean_over_masked_patches_of_the_teacher():
    module = tips_module(centre_momentum=0.75)
    step, plugin = step_of(module), module.plugins["tips"]
    before = plugin.centre.value.clone()
    plugin.loss(step)
    assert torch.equal(plugin.centre.value, before)
    plugin.after_step()
    teacher = step.encoders["teacher"]
    z_t, p_t = project(teacher.heads["tips"], teacher.vision(step.view("global")).tokens)
    seen = torch.stack([z_t[i, n] for i, row in enumerate(step.view("mask").tolist()) for n in row])
    mean = (seen @ p_t.T).mean(0)
    torch.testing.assert_close(plugin.centre.value.double(), 0.75 * before.double() + 0.25 * mean, rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_text_tower_the_pooling_head_or_the_teacher():
    module = tips_module()
    module.plugins["tips"].loss(step_of(module)).backward()
    warm = {name for name, p in module.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in warm} == {"vision", "tips"}
    assert not any(".pool." in name for name in warm)
    assert "plugins.tips.mask_token" in warm


def test_no_gradient_reaches_the_decoder_of_locca():
    module = tips_module(beside=[LocCa(length=40, depth=1)])
    step = step_of(module)
    assert module.plugins["locca"].loss(step).requires_grad  # it reads features of the same step
    module.plugins["tips"].loss(step).backward()
    assert [name for name, p in module.plugins["locca"].named_parameters() if p.grad is not None] == []


def test_timm_tower_is_refused_since_it_cannot_mask():
    options = {"patch_size": 16, "grid": (2, 2), "vocab_size": 40, "context_length": 6}
    model = build_two_towers("tiny/16", timm_name="vit_tiny_patch16_224", **options)
    with pytest.raises(ValueError, match=r"tips masks embedded patches.*drop `model.timm`"):
        TIPS(**SMALL).setup(model, {})


def test_masking_nothing_changes_nothing():
    module = tips_module()
    vision = module.model.vision
    step = step_of(module)
    images = step.view("global")
    whole = vision(images).tokens
    nothing = torch.zeros(4, 16, dtype=torch.bool)
    token = torch.zeros(vision.width)
    assert torch.equal(vision(images, masked_BN=nothing, mask_token_D=token).tokens, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "tips: hidden is 0, expected at least 1"),
        ({"bottleneck": 0}, "tips: bottleneck is 0, expected at least 1"),
        ({"prototypes": 1}, "prototypes is 1, expected at least 2"),
        ({"centre_momentum": -0.1}, r"momentum is -0.1, expected a share in \[0, 1\]"),
        ({"student_temperature": 0.0}, "tips: student_temperature divides cosines, expected more than 0, found 0.0"),
        ({"teacher_temperature": Schedule([0.0, 1.0], [0.04, -1.0])}, "teacher_temperature .* found -1.0"),
        ({"freeze_prototypes": 10.0}, "tips: freeze_prototypes is a share of the run, expected 0 to 1, found 10.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_out_of_its_range_is_an_error_before_anything_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        TIPS(**{**SMALL, **options})
