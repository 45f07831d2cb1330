"""Every parameter starts from the published distribution (flax's defaults, as big_vision leaves them)."""

import math
import re

import pytest
import torch
from torch import nn

from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import TwoTowers, build_two_towers

WIDTH, MLP, TEXT_WIDTH, PATCH_VALUES, VOCAB = 256, 640, 192, 768, 500
BLOCK = r"(vision|text)\.blocks\.\d"
NORM = rf"({BLOCK}\.norm[12]|(vision|text)\.norm|vision\.pool\.norm)"
ATTENTION = rf"({BLOCK}\.attn|vision\.pool)\.(qkv|q|kv|proj)"
KINDS = {
    "attention": rf"{ATTENTION}\.weight",
    "mlp": rf"({BLOCK}|vision\.pool)\.mlp\.fc[12]\.weight",
    "mlp bias": rf"({BLOCK}|vision\.pool)\.mlp\.fc[12]\.bias",
    "dense": r"vision\.embed\.weight|text\.head\.weight",
    "table": r"(vision|text)\.pos_embed|text\.token_embed\.weight",
    "probe": r"vision\.pool\.latent",
    "norm": rf"{NORM}\.weight",
    "zero": rf"({ATTENTION}|{NORM}|vision\.embed|text\.head)\.bias",
    "similarity": r"logit_scale|logit_bias",
}


@pytest.fixture(scope="module")
def fresh() -> TwoTowers:
    torch.manual_seed(0)
    return build_two_towers(
        "tiny/16",
        patch_size=16,
        grid=(16, 16),
        vocab_size=VOCAB,
        context_length=64,
        vision=ShapeOptions(width=WIDTH, depth=2, mlp_dim=MLP, num_heads=4),
        text=ShapeOptions(width=TEXT_WIDTH, depth=2, mlp_dim=MLP, num_heads=4),
    )


def of_kind(model, kind):
    """The parameters of one kind by name; a kind without parameters would make its test say nothing."""
    found = {n: p.detach() for n, p in model.named_parameters() if re.fullmatch(KINDS[kind], n)}
    assert found
    return found


def assert_std(values, expected):
    """Standard deviation within five of its own standard errors, which are 1/sqrt(2 n) of it or less."""
    assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * values.numel()))


def assert_uniform(values, limit):
    """Uniform in [-limit, limit]: nothing outside, a full edge, and the standard deviation limit / sqrt(3)."""
    assert values.abs().max() <= limit
    assert values.abs().max() > 0.97 * limit
    assert_std(values, limit / math.sqrt(3))


def test_every_parameter_is_of_exactly_one_kind(fresh):
    for name, _ in fresh.named_parameters():
        assert len([kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)]) == 1, name


def test_each_square_matrix_of_a_packed_projection_is_xavier_uniform_by_itself(fresh):
    for weight in of_kind(fresh, "attention").values():
        width = weight.shape[1]
        for matrix in weight.split(width):  # q, k and v lie on top of one another
            assert matrix.shape == (width, width)
            assert_uniform(matrix, math.sqrt(6 / (2 * width)))


def test_mlp_kernels_are_xavier_uniform(fresh):
    for weight in of_kind(fresh, "mlp").values():
        assert_uniform(weight, math.sqrt(6 / (min(weight.shape) + MLP)))


def test_mlp_biases_are_normal_of_std_1e_6(fresh):
    for bias in of_kind(fresh, "mlp bias").values():
        assert_std(bias, 1e-6)
        assert bias.abs().max() > 2.2e-6  # unbounded: of 192 values the largest lies beyond


@pytest.mark.parametrize(("name", "fan_in"), [("vision.embed.weight", PATCH_VALUES), ("text.head.weight", TEXT_WIDTH)])
def test_patch_embedding_and_text_head_are_lecun_normal(fresh, name, fan_in):
    weight = of_kind(fresh, "dense")[name]
    assert weight.shape == (WIDTH, fan_in)
    assert_std(weight, fan_in**-0.5)
    edge = 2 * fan_in**-0.5 / 0.8796  # truncated at two sigma before the correction for the truncation
    assert 0.99 * edge < weight.abs().max() <= edge * 1.0001


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("text.token_embed.weight", (VOCAB, TEXT_WIDTH)),
        ("text.pos_embed", (64, TEXT_WIDTH)),
        ("vision.pos_embed", (16, 16, WIDTH)),
    ],
)
def test_tables_are_normal_of_std_one_over_root_width(fresh, name, shape):
    table = of_kind(fresh, "table")[name]
    assert table.shape == shape
    assert_std(table, shape[-1] ** -0.5)
    assert table.abs().max() > 3.5 * shape[-1] ** -0.5  # not truncated


def test_probe_is_xavier_uniform_of_fan_in_1(fresh):
    probe = of_kind(fresh, "probe")["vision.pool.latent"]
    assert probe.shape == (1, 1, WIDTH)
    assert_uniform(probe, math.sqrt(6 / (1 + WIDTH)))


def test_norms_start_at_one_and_other_biases_at_zero(fresh):
    assert all(torch.equal(p, torch.ones_like(p)) for p in of_kind(fresh, "norm").values())
    assert all(torch.equal(p, torch.zeros_like(p)) for p in of_kind(fresh, "zero").values())


def test_every_layer_norm_has_eps_1e_6(fresh):
    norms = [m for m in fresh.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * (2 * 2 + 1) + 1  # two per block, one per tower, one in the MAP head
    assert {norm.eps for norm in norms} == {1e-6}


def test_temperature_starts_at_10_and_bias_at_minus_10_in_one_element_vectors(fresh):
    assert fresh.logit_scale.shape == fresh.logit_bias.shape == (1,)
    assert fresh.logit_scale.exp().item() == pytest.approx(10)
    assert fresh.logit_bias.item() == -10
