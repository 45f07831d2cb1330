"""`sigmoid` is the loss over the pairs of the batch, through both towers, times its weight."""

import numpy as np
import pytest
import torch

from siglip2.core.batch import Batch, Patches
from siglip2.core.functional import grid_coords
from siglip2.core.hooks import build_manager
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.schedules import Schedule
from siglip2.core.step import Step
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.sigmoid import Sigmoid


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_two_towers("tiny/16", patch_size=16, grid=(2, 2), vocab_size=40, context_length=6)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    patches = torch.randint(0, 256, (5, 4, 768), generator=generator, dtype=torch.uint8)
    captions = torch.randint(0, 40, (5, 6), generator=generator, dtype=torch.int32)
    return Batch({"image": Patches(patches, grid_coords(2, 2)[None], None, (2, 2)), "caption": captions}, 5, 0)


def equation(model, batch):
    """SigLIP, eq. 1, in float64 on the model's own embeddings."""
    image = model.encode_image(batch.views["image"]).embedding.detach().double().numpy()
    text = model.encode_text(batch.views["caption"]).embedding.detach().double().numpy()
    logits = np.exp(model.logit_scale.item()) * image @ text.T + model.logit_bias.item()
    signs = 2 * np.eye(len(image)) - 1
    return np.log1p(np.exp(-signs * logits)).sum() / len(image)


def test_it_reads_one_image_and_one_caption():
    assert build_manager([Sigmoid()]).hook.views() == [[IMAGE, CAPTION]]


def test_its_loss_is_the_equation_on_the_embeddings_of_the_batch(model, batch):
    loss = Sigmoid().loss(Step(model, batch, progress=0.0))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(equation(model, batch), rel=1e-5)  # float32


def test_order_of_the_pairs_does_not_matter_but_their_pairing_does(model, batch):
    order = torch.tensor([3, 0, 4, 1, 2])
    views = {"image": batch.views["image"], "caption": batch.views["caption"][order]}
    together = Sigmoid().loss(Step(model, batch.select(order), progress=0.0))
    broken = Sigmoid().loss(Step(model, Batch(views, 5, 0), progress=0.0))
    loss = Sigmoid().loss(Step(model, batch, progress=0.0))
    torch.testing.assert_close(together, loss)
    assert abs(broken.item() - loss.item()) > 1e-3


@pytest.mark.parametrize(
    ("weight", "progress", "factor"),
    [(1.0, 0.3, 1.0), (0.25, 0.3, 0.25), (Schedule([0.0, 1.0], [1.0, 0.0]), 0.75, 0.25)],
)
def test_its_term_is_the_weighted_loss_under_its_name(model, batch, weight, progress, factor):
    plugin = Sigmoid(weight=weight)
    terms = build_manager([plugin]).hook.losses(step=Step(model, batch, progress=progress))
    assert [list(term) for term in terms] == [["sigmoid"]]
    assert terms[0]["sigmoid"].item() == pytest.approx(factor * equation(model, batch), rel=1e-5)


def test_its_gradient_reaches_every_parameter_of_both_towers(model, batch):
    Sigmoid().loss(Step(model, batch, progress=0.0)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_it_computes_features_that_later_objectives_can_read(model, batch):
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    model.text.register_forward_hook(lambda *_: calls.append("text"))
    step = Step(model, batch, progress=0.0)
    Sigmoid().loss(step)
    step.encode_image("image")
    step.encode_text("caption")
    assert sorted(calls) == ["text", "vision"]


def test_it_has_no_parameters_of_its_own_and_no_exact_accumulation():
    assert list(Sigmoid().parameters()) == []
    assert Sigmoid.accumulates is False  # micro-batches would see other negatives


@pytest.mark.parametrize(("start", "stop"), [(-0.1, 1.0), (0.8, 0.2), (0.0, 1.5)])
def test_a_wrong_stretch_of_progress_is_an_error(start, stop):
    with pytest.raises(ValueError, match=f"plugin 'sigmoid': expected 0 <= start < stop <= 1, .* found start={start}"):
        Sigmoid(start=start, stop=stop)
