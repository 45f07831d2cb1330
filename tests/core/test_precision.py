"""Weights in 16 bits: towers take pixels as their weights are, and a teacher that could not move is refused."""

import pytest
import torch

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.model.vision import to_unit_range
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.testing import tiny_module

NATIVE = ["--plugins.fixed", "off", "--plugins.naflex.seq_lens", "[4, 9]", "--plugins.naflex.batch_size", "4"]


def fit(words):
    cli = SigLIP2CLI([*words, "--trainer.precision", "bf16-true", "--trainer.max_steps", "3"], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


@pytest.mark.parametrize("patchifier", [[], NATIVE], ids=["fixed", "naflex"])
def test_bf16_true_trains_towers_in_bfloat16(tiny_recipe, patchifier):
    cli = fit([*tiny_recipe, *patchifier, "--plugins.locca.length", "40"])
    assert {p.dtype for p in cli.model.parameters()} == {torch.bfloat16}
    assert cli.trainer.callback_metrics["train/loss"].isfinite()


def test_pixels_are_scaled_before_they_are_rounded():
    pixels = torch.arange(256, dtype=torch.uint8)
    exact = pixels.double() / 127.5 - 1
    assert torch.equal(to_unit_range(pixels, torch.bfloat16), exact.to(torch.bfloat16))


def test_teacher_in_bfloat16_would_stand_still():
    """What the refusal is for: a step of the published size leaves nearly every weight where it was."""
    weights, moved = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16() * 1e-2
    teacher = weights.clone().lerp_(weights + moved, 1 - 0.996)
    assert (teacher == weights).float().mean() > 0.9


def test_teacher_in_bfloat16_is_refused_before_training(tiny_recipe):
    start = ["--plugins.ema_teacher.start", "0.5"]
    with pytest.raises(ValueError, match=r"ema_teacher: the teacher is in torch\.bfloat16.*bf16-mixed"):
        fit([*tiny_recipe, *start])


def test_teacher_in_float64_is_welcome():
    module = tiny_module([EMATeacher()]).double()
    assert module.plugins["ema_teacher"].encoders()
