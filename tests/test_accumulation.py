"""A batch that is run in parts has the gradients of the whole, for every parameter and every loss."""

import pytest
import torch
from staged import arguments, run

from siglip2.core.accumulate import parts_of
from siglip2.core.batch import Batch
from siglip2.core.hooks import hookimpl
from siglip2.core.plugin import Objective, Plugin
from siglip2.core.views import IMAGE

SSL = ("ema_teacher", "silc", "tips")
ALL_AWAKE = [word for name in SSL for word in (f"--plugins.{name}.start", "0")]


@pytest.fixture(scope="module")
def recipe(toy_shards, toy_tokenizer):
    """Returns the arguments of ten steps of four into a folder."""
    return lambda folder: arguments(toy_shards, toy_tokenizer, folder)


def gradients(recipe, folder, *extra):
    """What four steps are made of, losses, gradients and states."""
    return run(recipe(folder), *ALL_AWAKE, "--trainer.max_steps", 4, "--model.warmup", 1, *extra).steps


OFF = {
    "all": [],
    "sigmoid": ["locca", *SSL],
    "locca": ["sigmoid", *SSL],
    "silc": ["sigmoid", "locca", "tips"],
    "tips": ["sigmoid", "locca", "silc"],
}


@pytest.mark.parametrize("alone", OFF)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_have_the_gradients_of_the_whole(recipe, tmp_path, alone, parts):
    off = [word for name in OFF[alone] for word in (f"--plugins.{name}", "off")]
    whole = gradients(recipe, tmp_path / "whole", *off)
    split = gradients(recipe, tmp_path / "split", *off, "--model.accumulate", parts)
    assert split[1]["terms"] == pytest.approx(whole[1]["terms"], rel=1e-5)
    assert split[1]["gradients"].keys() == whole[1]["gradients"].keys()
    for name, gradient in whole[1]["gradients"].items():
        close = {"rtol": 0, "atol": 1e-6 + 1e-5 * gradient.abs().max().item()}  # float32 in another order
        torch.testing.assert_close(split[1]["gradients"][name], gradient, **close, msg=name)
    for name in ("model.logit_scale", "model.logit_bias"):
        if name in whole[1]["gradients"]:
            ratio = split[1]["gradients"][name] / whole[1]["gradients"][name]
            assert ratio.item() == pytest.approx(1.000, abs=5e-5)  # open_clip: 2.0 and 4.0
    for name in [name for name in whole[1]["state"] if name.endswith("centre.value")]:
        torch.testing.assert_close(split[1]["state"][name], whole[1]["state"][name], rtol=1e-5, atol=1e-6)
    assert split[4]["loss"] != split[1]["loss"]


def test_parts_take_the_memory_of_a_part(recipe, tmp_path):
    """What is kept for the backward pass of one part is half of that of the whole."""
    kept = {}
    for parts in (1, 2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t) or t, lambda t: t):
            diary = run(
                recipe(tmp_path / str(parts)),
                *("--plugins.ema_teacher", "off", "--plugins.silc", "off", "--plugins.tips", "off"),
                *("--trainer.max_steps", 1, "--model.warmup", 0, "--model.rehearsal", "false"),
                *("--model.accumulate", parts),
            )
        kept[parts] = max(t.shape[0] for t in sizes if t.ndim == 3 and t.shape[-1] == 64)
        assert diary.steps[1]["loss"] > 0
    assert kept[2] == kept[1] / 2


class Half(Plugin):
    """Keeps every other row."""

    name = "every_other"

    @hookimpl
    def curate(self, step):
        return torch.arange(0, step.batch.size, 2)


class Reader(Objective):
    """Reads tokens, but says that it is no mean over rows."""

    name = "reader"

    @hookimpl
    def views(self):
        return [IMAGE]

    def loss(self, step):
        return step.encode_image("image").tokens.mean()


@pytest.fixture
def installed(monkeypatch, third_party_plugins):
    """Installs plugins for one test."""
    from importlib.metadata import EntryPoint

    import siglip2.registry

    def install(cls):
        point = EntryPoint(cls.name, "here", "siglip2")
        module = type("module", (), {"register_plugins": staticmethod(hookimpl(lambda: [cls]))})
        monkeypatch.setattr(EntryPoint, "load", lambda self: module)
        third_party_plugins.append(point)
        siglip2.registry.catalogue.cache_clear()

    return install


def test_curators_choose_among_the_whole_batch(recipe, tmp_path, installed):
    installed(Half)
    off = [word for name in OFF["sigmoid"] for word in (f"--plugins.{name}", "off")]
    whole = gradients(recipe, tmp_path / "whole", *off, "--plugins.every_other", "on")
    split = gradients(recipe, tmp_path / "split", *off, "--plugins.every_other", "on", "--model.accumulate", 2)
    assert split[1]["terms"] == pytest.approx(whole[1]["terms"], rel=1e-5)


def test_loss_over_pairs_that_reads_tokens_is_an_error_that_says_what_to_do(recipe, tmp_path, installed):
    installed(Reader)
    with pytest.raises(ValueError, match="reads tokens of the whole batch, which model.accumulate does not keep"):
        gradients(recipe, tmp_path, "--plugins.reader", "on", "--model.accumulate", 2)


def test_parts_must_divide_the_batch(recipe, tmp_path):
    with pytest.raises(ValueError, match="global batch of 4 does not divide into 3 parts on each of 1 processes"):
        gradients(recipe, tmp_path, "--model.accumulate", 3)


def test_rows_that_a_curator_keeps_must_divide_as_well():
    batch = Batch({"caption": torch.zeros(3, 4)}, size=3, index=0)
    with pytest.raises(ValueError, match="the curator keeps 3 rows, which do not divide into 2 parts"):
        parts_of(batch, 2, torch.device("cpu"))


def test_packed_rows_cannot_be_cut(recipe, tmp_path):
    navit = ("--plugins.fixed", "off", "--plugins.navit.batch_size", 4, "--plugins.navit.group", 4)
    with pytest.raises(ValueError, match="cannot cut rows that images share"):
        gradients(recipe, tmp_path, "--model.accumulate", 2, *navit)


def test_plain_accumulation_of_a_loss_over_pairs_points_to_parts(recipe, tmp_path):
    with pytest.raises(ValueError, match="sigmoid would see only the pairs.*model.accumulate to 2"):
        gradients(recipe, tmp_path, "--trainer.accumulate_grad_batches", 2)
