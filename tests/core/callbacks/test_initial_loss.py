"""The closed form of the first loss is that of the loss itself, and a model worse than ignorance is named."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from siglip2.core.callbacks.initial_loss import InitialLoss, highest_loss, unrelated_loss
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


def test_loss_that_chance_explains_is_said_and_no_more(caplog):
    caplog.set_level(logging.INFO)
    InitialLoss(stop=True).check(11.6, **PUBLISHED)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "11.49 at temperature 10, bias -10 and 32768 pairs" in caplog.text


def test_exploded_loss_warns_or_stops(caplog):
    """open_clip's issue 1076: a first loss of 274."""
    InitialLoss().check(274.0, **PUBLISHED)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(ValueError, match=r"first loss 274 .* Were the weights loaded"):
        InitialLoss(stop=True).check(274.0, **PUBLISHED)
