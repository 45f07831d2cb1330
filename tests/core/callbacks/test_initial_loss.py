"""The closed form of the first loss is that of the loss itself, and a model worse than ignorance is named."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from siglip2.core.callbacks.initial_loss import InitialLoss, highest_loss, remark, unrelated_loss
from siglip2.core.pairs import pair_loss

PUBLISHED = {"pairs": 32768, "factor": 10.0, "bias": -10.0, "embed_dim": 768}


@pytest.mark.parametrize("cosine", [0.0, 0.25])
def test_closed_form_is_the_loss_of_embeddings_with_one_cosine(cosine):
    z_image = F.normalize(torch.eye(16)[:1].expand(8, -1), dim=1)
    z_text = torch.zeros(8, 16).index_fill_(1, torch.tensor([0]), cosine)
    z_text[:, 1] = math.sqrt(1 - cosine**2)
    loss = pair_loss(z_image, z_text, scale=torch.tensor([math.log(12.0)]), bias=torch.tensor([-3.0]))
    assert float(loss) == pytest.approx(unrelated_loss(8, factor=12.0, bias=-3.0, cosine=cosine), rel=1e-5)


def test_published_beginning_costs_what_the_paper_s_bias_is_for():
    assert unrelated_loss(32768, factor=10, bias=-10) == pytest.approx(
        10 + math.log1p(math.exp(-10)) + 32767 * math.exp(-10), rel=1e-4
    )


def test_random_directions_stay_below_the_highest_loss():
    torch.manual_seed(0)
    z = [F.normalize(torch.randn(64, 128), dim=1) for _ in range(2)]
    loss = pair_loss(*z, scale=torch.tensor([math.log(10.0)]), bias=torch.tensor([-4.0]))
    assert float(loss) < highest_loss(64, factor=10, bias=-4, embed_dim=128)


def test_loss_that_chance_explains_is_said_and_no_more():
    worse, text = remark(11.6, **PUBLISHED)
    assert not worse
    assert text.endswith("has 11.49 at temperature 10, bias -10 and 32768 pairs")


@pytest.mark.parametrize("loss", [274.0, math.nan])
def test_exploded_loss_is_asked_about(loss):
    """open_clip's issue 1076: a first loss of 274."""
    worse, text = remark(loss, **PUBLISHED)
    assert worse
    assert "Were the weights loaded" in text


@pytest.fixture
def end_a_step():
    """Ends the first step of a run with a loss that its temperature and bias do not explain."""

    def run(step=1, **options):
        metrics = {"train/sigmoid": torch.tensor(80.0), "logit_scale": torch.tensor(10.0)}
        metrics["logit_bias"] = torch.tensor(-2.0)
        trainer = SimpleNamespace(global_step=step, accumulate_grad_batches=1, world_size=1, is_global_zero=True)
        trainer.callback_metrics = metrics
        module = SimpleNamespace(model=SimpleNamespace(embed_dim=64))
        InitialLoss(**options).on_train_batch_end(trainer, module, None, SimpleNamespace(size=4), step - 1)

    return run


def test_first_loss_warns_or_stops_and_later_ones_do_neither(end_a_step, caplog):
    end_a_step()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(ValueError, match=r"first loss 80 .* 4 pairs"):
        end_a_step(stop=True)
    end_a_step(step=2, stop=True)


def test_weight_of_the_term_is_taken_out(end_a_step, caplog):
    caplog.set_level(logging.INFO)
    end_a_step(weight=40.0)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "first loss 2 nats" in caplog.text
