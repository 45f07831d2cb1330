"""Every released shape has the names and shapes that transformers, open_clip and timm give it; on the meta device."""

from functools import cache

import open_clip
import pytest
import timm
import torch
from timm.layers import GELUTanh
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from siglip2.core.interop import big_vision, huggingface, timm_trunk
from siglip2.core.interop import open_clip as open_clip_format
from siglip2.core.interop.names import expanded, write_names
from siglip2.core.interop.published import PUBLISHED, SIGLIP1, SIGLIP2
from siglip2.core.interop.weights import Weights, square_pixels
from siglip2.core.model.two_towers import build_two_towers

pytestmark = pytest.mark.parity
KNOWN = [pytest.param(known, id=known.huggingface.removeprefix("google/")) for known in PUBLISHED]
WITHOUT_HEAD = "google/siglip-so400m-patch16-256-i18n"  # in open_clip; ours then has one that changes nothing
IN_OPEN_CLIP = [p for p in KNOWN if p.values[0].image_size is not None]


@cache
def weights_of(known):
    """Weights of a released shape without any values."""
    native, grid = known.image_size is None, (known.side, known.side)
    with torch.device("meta"):
        model = build_two_towers(
            known.size,
            patch_size=known.patch_size,
            grid=grid,
            vocab_size=known.vocab_size,
            context_length=known.context_length,
        )
    text = (known.text, known.patch_size, grid, native, known.vocab_size, known.context_length)
    pixels = None if native else square_pixels(known.image_size, known.patch_size, filter="bilinear")
    return Weights("siglip2", model.state_dict(), known.vision, *text, pixels, None)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def written(weights, table):
    return shapes(write_names(weights.state, expanded(table, weights.depths), weights.heads))


def test_all_released_checkpoints_are_known():
    assert len(SIGLIP2) == 17
    assert len(SIGLIP1) == 10
    assert len({known.huggingface for known in PUBLISHED}) == 27
    assert {known.context_length for known in SIGLIP1} == {16, 64}
    assert {known.vocab_size for known in SIGLIP1} == {32000, 250000}


@pytest.mark.parametrize("known", KNOWN)
def test_names_and_shapes_are_those_of_transformers(known):
    weights = weights_of(known)
    config = huggingface.config_of(weights)
    with torch.device("meta"):
        if weights.native:
            theirs = Siglip2Model(Siglip2Config(**config))
        else:
            theirs = SiglipModel(SiglipConfig(**config))
    assert written(weights, huggingface.table(native=weights.native)) == shapes(theirs.state_dict())


@pytest.mark.parametrize("known", IN_OPEN_CLIP)
def test_names_and_shapes_are_those_of_open_clip(known):
    weights = weights_of(known)
    assert known.open_clip in open_clip.list_models()
    with torch.device("meta"):
        theirs = open_clip.create_model(known.open_clip, pretrained=None, load_weights=False, device="meta")
    ours = written(weights, open_clip_format.table(native=False))
    if known.huggingface == WITHOUT_HEAD:
        ours = {name: shape for name, shape in ours.items() if "text_projection" not in name}
    assert ours == shapes(theirs.state_dict())


@pytest.mark.parametrize("known", KNOWN)
def test_names_and_shapes_are_those_of_timm(known):
    weights = weights_of(known)
    with torch.device("meta"):
        theirs = timm.create_model(known.timm, num_classes=0)
    assert written(weights, timm_trunk.table(native=weights.native)) == shapes(theirs.state_dict())
    assert theirs.blocks[0].attn.num_heads == known.vision.num_heads


@pytest.mark.parametrize("known", [SIGLIP2[0], SIGLIP2[9], SIGLIP2[15]], ids=["B/32", "So400m/14 at 378", "naflex"])
def test_timms_entries_have_these_shapes_also_when_told_them(known):
    weights = weights_of(known)
    with torch.device("meta"):
        told = timm.create_model(known.timm, num_classes=0, **timm_trunk.arguments_of(weights))
    assert written(weights, timm_trunk.table(native=weights.native)) == shapes(told.state_dict())
    assert timm_trunk.trunk_named(known.timm, timm_trunk.arguments_of(weights)).gelu == "tanh"


@pytest.mark.parametrize(
    ("known", "named"),
    [(SIGLIP2[0], True), (SIGLIP2[1], False), (SIGLIP2[9], False), (SIGLIP2[10], True), (SIGLIP2[15], True)],
    ids=["B/32", "B/16", "So400m/14 at 384", "So400m/16", "naflex"],
)
def test_open_clip_builds_from_our_configuration_what_was_trained(known, named, tmp_path):
    """By timm's name where that has the tanh GELU, else by a configuration of the trunk; with the same tensors."""
    weights = weights_of(known)
    open_clip_format.write_config(weights, tmp_path)
    with torch.device("meta"):
        theirs = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, device="meta")
    assert written(weights, open_clip_format.table(native=weights.native)) == shapes(theirs.state_dict())
    assert {type(block.mlp.act) for block in theirs.visual.trunk.blocks} == {GELUTanh}
    assert (tmp_path / "trunk").exists() != named


@pytest.mark.parametrize("known", KNOWN)
def test_arrays_have_the_shapes_of_big_vision(known):
    """google-research/big_vision, models/vit.py; there is no library to ask."""
    weights = weights_of(known)
    arrays = shapes(big_vision.arrays_of(weights))
    width, heads, depth, patch = known.vision.width, known.vision.num_heads, known.vision.depth, known.patch_size
    table, kernel = (1, known.side**2, width), (patch, patch, 3, width)
    if weights.native:
        table, kernel = (16, 16, width), (patch * patch * 3, width)
    attention = "params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    assert arrays["params/img/pos_embedding"] == table
    assert arrays["params/img/embedding/kernel"] == kernel
    assert arrays[f"{attention}/query/kernel"] == (depth, width, heads, width // heads)
    assert arrays[f"{attention}/out/kernel"] == (depth, heads, width // heads, width)
    assert arrays["params/txt/head/kernel"] == (known.text.width, width)
    assert arrays["params/txt/Embed_0/embedding"] == (known.vocab_size, known.text.width)
    assert arrays["params/txt/pos_embedding"] == (1, known.context_length, known.text.width)
