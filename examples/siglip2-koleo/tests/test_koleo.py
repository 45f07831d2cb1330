"""KoLeo keeps the contract of plugins and is the loss of its paper."""

import math

import torch
from siglip2_koleo import KoLeo

from siglip2.testing import check_plugin, tiny_step


def test_koleo_keeps_the_contract_of_plugins():
    check_plugin(KoLeo)


def test_koleo_is_the_mean_negative_log_distance_to_the_nearest_neighbour():
    step = tiny_step([KoLeo()])
    z = step.encode_image("image").embedding.detach().double().tolist()
    nearest = [min(math.dist(x, y) for j, y in enumerate(z) if j != i) for i, x in enumerate(z)]
    expected = -sum(math.log(distance) for distance in nearest) / len(z)
    torch.testing.assert_close(KoLeo().loss(step).item(), expected, atol=1e-5, rtol=1e-5)
