"""The tiny things that plugin authors test with are real, and the same every time."""

import pytest
import torch

from siglip2 import IMAGE, Plugin, hookimpl
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import TinySource, fake_batch, tiny_model, tiny_module, tiny_step, tiny_tokenizer


def test_row_of_a_batch_depends_on_its_position_alone():
    whole, half = fake_batch(batch_size=4), fake_batch(batch_size=2, first=2)
    assert whole.keys[2:] == half.keys
    assert torch.equal(whole.views["image"].patches[2:], half.views["image"].patches)
    assert torch.equal(whole.views["caption"][2:], half.views["caption"])


def test_samples_have_every_field_and_boxes_inside_the_picture():
    for number in range(len(TinySource())):
        sample = TinySource().read(number)
        (region,) = sample.get("regions")
        xmin, ymin, xmax, ymax = region["box"]
        assert 0 <= xmin < xmax <= 1
        assert 0 <= ymin < ymax <= 1
        assert sample.get("label") in range(8)
        assert list(sample.captions()) == ["en", "de"]
        assert sample.image().shape[0] == 3


def test_captions_survive_the_tokenizer():
    tokenizer = tiny_tokenizer(64)
    assert tokenizer.decode(tokenizer("a red disc, number 0")) == "a red disc, number 0"


@pytest.mark.parametrize("build", [tiny_model, lambda seed: tiny_module([Sigmoid()], seed=seed)])
def test_seed_decides_the_parameters_and_leaves_chance_alone(build):
    before = torch.get_rng_state()
    one, same, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


def test_encoder_that_no_plugin_offers_is_a_frozen_copy_of_the_student():
    step = tiny_step([Sigmoid()])
    stand_in, student = step.encode_image("image", by="teacher"), step.encode_image("image")
    assert torch.equal(stand_in.embedding, student.embedding)
    assert not stand_in.embedding.requires_grad
    kept = step.select(torch.tensor([1])).encode_image("image", by="teacher")
    torch.testing.assert_close(kept.embedding, student.embedding[1:2].detach())


def test_tiny_step_wakes_the_plugins_that_are_due():
    class Sleeper(Plugin):
        name = "sleeper"
        woken = False

        @hookimpl
        def views(self):
            return [IMAGE]

        @hookimpl
        def wake(self, model):
            self.woken = True

    early, late = Sleeper(start=0.5), Sleeper(start=0.5)
    tiny_step([early], progress=0.2)
    step = tiny_step([late], progress=0.5)
    assert (early.woken, late.woken) == (False, True)
    assert list(step.batch.views) == ["image"]
