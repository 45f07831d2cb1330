"""Named sizes have the published parameter counts, and parameter names are pinned: checkpoints depend on them."""

import pytest
import torch

from siglip2.core.model.sizes import SIZES, Shape, ShapeOptions, size_named
from siglip2.core.model.two_towers import build_two_towers

VOCAB = 256_000
COUNTS = {  # millions: vision with MAP, MAP, text, text without the token table, both towers
    "B/16": ("92.93", "7.09", "282.30", "85.70", "375.2"),
    "B/32": ("94.55", "7.09", "282.30", "85.70", "376.9"),
    "L/16": ("315.96", "12.60", "565.57", "303.43", "881.5"),
    "So400m/16": ("427.89", "15.24", "707.78", "412.87", "1135.7"),
    "g-opt/16": ("1163.17", "28.33", "708.23", "413.31", "1871.4"),
}


def on_meta(size, **options):
    """The towers of a size at 256 px, without memory for their weights."""
    patch_size = SIZES[size].patch_size
    grid = (256 // patch_size, 256 // patch_size)
    with torch.device("meta"):
        return build_two_towers(
            size, patch_size=patch_size, grid=grid, **{"vocab_size": VOCAB, "context_length": 64, **options}
        )


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_the_published_ones(size):
    model = on_meta(size)
    text, table = count(model.text), count(model.text.token_embed)
    found = [count(model.vision), count(model.vision.pool), text, text - table]
    assert (*(f"{n / 1e6:.2f}" for n in found), f"{count(model) / 1e6:.1f}") == COUNTS[size]


def test_so400m_mlp_is_4304_wide_in_both_towers_and_the_pool():
    model = on_meta("So400m/14", vocab_size=8)
    mlps = [b.mlp for tower in (model.vision, model.text) for b in tower.blocks] + [model.vision.pool.mlp]
    assert {mlp.fc1.weight.shape for mlp in mlps} == {(4304, 1152)}
    assert {mlp.fc2.weight.shape for mlp in mlps} == {(1152, 4304)}


def test_g_opt_projects_the_so400m_text_tower_to_its_own_width():
    model = on_meta("g-opt/16", vocab_size=8)
    assert size_named("g-opt/16").text == size_named("So400m/16").vision
    assert model.text.head.weight.shape == (1536, 1152)
    assert model.embed_dim == 1536


@pytest.mark.parametrize("size", SIZES)
def test_heads_divide_the_width(size):
    assert all(shape.width % shape.num_heads == 0 for shape in (SIZES[size].vision, SIZES[size].text))


def parameter_names(depth):
    """The names that checkpoints of a model of `depth` blocks per tower hold."""

    def layer(name):
        return [f"{name}.weight", f"{name}.bias"]

    def blocks(tower):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        return [name for i in range(depth) for part in parts for name in layer(f"{tower}.blocks.{i}.{part}")]

    vision = ["vision.pos_embed", *layer("vision.embed"), *blocks("vision"), *layer("vision.norm")]
    vision += ["vision.pool.latent"]
    for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"):
        vision += layer(f"vision.pool.{part}")
    text = ["text.pos_embed", "text.token_embed.weight", *blocks("text"), *layer("text.norm"), *layer("text.head")]
    return {"logit_scale", "logit_bias", *vision, *text}


def test_checkpoint_names_of_the_towers_are_pinned():
    model = on_meta("tiny/16", vocab_size=8)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == parameter_names(depth=2)


def test_shape_options_change_only_what_is_set():
    shape = Shape(width=64, depth=2, mlp_dim=128, num_heads=2)
    assert ShapeOptions().applied_to(shape) == shape
    assert ShapeOptions(depth=5).applied_to(shape) == Shape(width=64, depth=5, mlp_dim=128, num_heads=2)


@pytest.mark.parametrize(("wrong", "near"), [("B16", "B/16"), ("so400m/16", "So400m/16"), ("gopt/16", "g-opt/16")])
def test_an_unknown_size_suggests_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"no model size called '{wrong}', did you mean '{near}'\\? Sizes: tiny/16, "):
        size_named(wrong)


def test_a_size_nobody_can_have_meant_lists_the_sizes():
    with pytest.raises(ValueError, match=r"no model size called 'xyz'\. Sizes: tiny/16, "):
        size_named("xyz")


def test_patches_of_another_side_than_the_size_has_are_an_error():
    with pytest.raises(ValueError, match="'B/32' has patches of 32 px, the recipe's patchifier makes 16 px: set"):
        build_two_towers("B/32", patch_size=16, grid=(16, 16), vocab_size=8, context_length=4)
