"""Weights that ask for the exact GELU run as in their own library, and are written for each library as it says so."""

import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import GELUTanh
from torch import nn
from transformers import AutoConfig, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from siglip2.core.interop import open_clip as open_clip_format
from siglip2.core.interop import timm_trunk
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.parity import random_inputs
from siglip2.core.interop.published import SIGLIP2
from siglip2.core.interop.weights import Weights, assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import Shape, ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.model.vision import to_unit_range

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # on unit-norm embeddings in float32
KINDS = pytest.mark.parametrize("native", [False, True], ids=["fixed", "naflex"])
EXACT = {"vision": "exact", "text": "exact"}
PAIRS = [EXACT, {"vision": "tanh", "text": "exact"}, {"vision": "exact", "text": "tanh"}]


@pytest.fixture
def make_weights(make_towers):
    """The weights of `make_towers`, with the GELU of each tower."""

    def make(native, gelus):
        state = {name: tensor.detach() for name, tensor in make_towers(text_width=32).state_dict().items()}
        pixels = native_pixels(16, 4) if native else square_pixels(64, 16, filter="bilinear")
        about = {"heads": {"vision": 4, "text": 2}, "gelus": gelus, "native": native, "pixels": pixels}
        return assemble("siglip2", state, place="test", **about)

    return make


def embeddings(weights):
    """What our towers make of random inputs: of pictures and of texts."""
    inputs, towers = random_inputs(weights), weights.towers()
    with torch.no_grad():
        return towers.encode_image(inputs.images).embedding, towers.encode_text(inputs.ids).embedding


def as_tanh(weights):
    """The same weights as if they had been trained with the tanh approximation."""
    return replace(weights, vision=replace(weights.vision, gelu="tanh"), text=replace(weights.text, gelu="tanh"))


def apart(ours, theirs):
    return float((ours - theirs).abs().max())


@KINDS
def test_model_of_transformers_with_gelu_in_its_configuration_runs_as_there(native, tmp_path):
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 8, **shape}
    vision = {"hidden_size": 48, "intermediate_size": 96, "patch_size": 8, **shape}
    text |= {"projection_size": 48}
    if native:
        theirs = Siglip2Model(Siglip2Config(vision_config={**vision, "num_patches": 25}, text_config=text))
    else:
        theirs = SiglipModel(SiglipConfig(vision_config={**vision, "image_size": 40}, text_config=text))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.eval().save_pretrained(tmp_path)
    weights = read_weights(str(tmp_path))
    assert weights.gelus == EXACT
    inputs = random_inputs(weights)
    pixels = {"pixel_values": inputs.pixels}
    if native:
        valid, sizes = inputs.images.valid.int(), inputs.images.sizes[:, 0].long()
        pixels = {"pixel_values": to_unit_range(inputs.images.patches)}
        pixels |= {"pixel_attention_mask": valid, "spatial_shapes": sizes}
    with torch.no_grad():
        answer = theirs(input_ids=inputs.ids, **pixels)
    for ours, tanh, expected in zip(
        embeddings(weights), embeddings(as_tanh(weights)), (answer.image_embeds, answer.text_embeds), strict=True
    ):
        assert apart(ours, expected) < TOLERANCE
        assert apart(tanh, expected) > TOLERANCE


@KINDS
@pytest.mark.parametrize("gelus", PAIRS, ids=["both", "text", "vision"])
def test_model_of_open_clip_runs_as_there(make_weights, native, gelus, tmp_path):
    folder = write(make_weights(native, gelus), "open_clip", tmp_path, check=False).folder
    config = json.loads((folder / "open_clip_config.json").read_text())
    if gelus["text"] == "exact":
        del config["model_cfg"]["text_cfg"]["act_kwargs"]  # as in the configurations of SigLIP 1
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "siglip2_contract.json").unlink()
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    weights = read_weights(str(folder))
    assert weights.gelus == gelus
    inputs = random_inputs(weights)
    images = inputs.pixels
    if native:
        patches, coords = to_unit_range(inputs.images.patches), inputs.images.coords.long()
        images = {"patches": patches, "patch_coord": coords, "patch_valid": inputs.images.valid}
    with torch.no_grad():
        expected = theirs.encode_image(images, normalize=True), theirs.encode_text(inputs.ids, normalize=True)
    found, tanh = embeddings(weights), embeddings(as_tanh(weights))
    for tower, ours, other, answer in zip(("vision", "text"), found, tanh, expected, strict=True):
        assert apart(ours, answer) < TOLERANCE
        assert (apart(other, answer) > TOLERANCE) == (gelus[tower] == "exact")


@KINDS
@pytest.mark.parametrize("format", ["hf", "open_clip", "timm", "big_vision"])
@pytest.mark.parametrize("gelus", [*PAIRS, {"vision": "tanh", "text": "tanh"}], ids=["both", "text", "vision", "none"])
def test_every_export_has_the_gelu_of_each_tower_and_brings_it_back(make_weights, native, format, gelus, tmp_path):
    weights = make_weights(native, gelus)
    written = write(weights, format, tmp_path / "out")
    again = read_weights(str(written.folder))
    assert again.vision == weights.vision
    assert format == "timm" or again.text == weights.text
    alone = [note for note in written.notes if "big_vision has its tanh approximation alone" in note]
    assert len(alone) == (list(gelus.values()).count("exact") if format == "big_vision" else 0)
    if format == "big_vision" and native:
        return  # nothing that can be installed reads it
    near = {tower: format != "big_vision" or gelu == "tanh" for tower, gelu in gelus.items()}
    assert (written.parity.image < TOLERANCE) == near["vision"]
    assert format == "timm" or (written.parity.text < TOLERANCE) == near["text"]


def test_transformers_is_told_the_gelu_under_its_own_name(make_weights, tmp_path):
    folder = write(make_weights(False, PAIRS[1]), "hf", tmp_path / "out", check=False).folder
    config = AutoConfig.from_pretrained(folder)
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == ("gelu_pytorch_tanh", "gelu")
    assert "tanh approximation of the GELU" in (folder / "README.md").read_text()
    assert "exact GELU" in (folder / "README.md").read_text()


def test_trunk_of_timms_own_entry_runs_as_there(tmp_path):
    """timm's B/16 has the exact GELU, in its blocks and in its pool."""
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 64}
    theirs = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": "vit_base_patch16_siglip_224", "model_args": arguments, "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(str(tmp_path))
    assert weights.gelus == {"vision": "exact"}
    inputs = random_inputs(weights)
    with torch.no_grad():
        expected = nn.functional.normalize(theirs(inputs.pixels), dim=-1)
        found = nn.functional.normalize(weights.vision_tower()(inputs.images).pooled, dim=-1)
        tanh = replace(weights, vision=replace(weights.vision, gelu="tanh")).vision_tower()(inputs.images).pooled
    assert apart(found, expected) < TOLERANCE
    assert apart(nn.functional.normalize(tanh, dim=-1), expected) > TOLERANCE


@pytest.mark.parametrize(("known", "named"), [(SIGLIP2[1], True), (SIGLIP2[0], False)], ids=["B/16", "B/32"])
def test_open_clip_is_given_timms_name_where_timms_trunk_has_that_gelu(known, named, tmp_path):
    shape = ShapeOptions(gelu="exact")
    grid, table = (known.side, known.side), {"vocab_size": known.vocab_size, "context_length": known.context_length}
    with torch.device("meta"):
        model = build_two_towers(known.size, patch_size=known.patch_size, grid=grid, vision=shape, text=shape, **table)
    vision, text = shape.applied_to(known.vision), shape.applied_to(known.text)
    about = (known.patch_size, grid, False, *table.values(), None, None)
    weights = Weights("siglip2", model.state_dict(), vision, text, *about)
    open_clip_format.write_config(weights, tmp_path)
    with torch.device("meta"):
        theirs = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, device="meta")
    acts = [*(block.mlp.act for block in theirs.visual.trunk.blocks), theirs.visual.trunk.attn_pool.mlp.act]
    assert not any(isinstance(act, GELUTanh) for act in acts)
    assert {getattr(act, "approximate", "none") for act in acts} == {"none"}
    assert {block.mlp.gelu.approximate for block in theirs.text.transformer.resblocks} == {"none"}
    assert (tmp_path / "trunk").exists() != named


def test_other_activations_are_refused(make_weights, tmp_path):
    folder = write(make_weights(False, EXACT), "open_clip", tmp_path / "out", check=False).folder
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives its text tower the QuickGELU, expected a GELU"):
        read_weights(str(folder))
    with pytest.raises(ValueError, match="has the activation SiLU, expected a GELU"):
        timm_trunk.trunk_named("vit_base_patch16_siglip_224", {"act_layer": "silu"})
    with pytest.raises(ValueError, match="gelu is 'quick', expected tanh or exact"):
        Shape(8, 1, 8, 1, gelu="quick")
