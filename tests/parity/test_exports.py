"""Files that transformers, open_clip and timm wrote themselves, read and written again, and what they load of ours."""

import json
import subprocess
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import TARGETS, write
from siglip2.core.interop.parity import random_inputs
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.model.vision import to_unit_range

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # on unit-norm embeddings in float32; measured < 3e-7
KINDS = pytest.mark.parametrize("native", [False, True], ids=["fixed", "naflex"])


@pytest.fixture
def make_weights(make_towers):
    """The weights of `make_towers`, without a tokenizer."""

    def make(native):
        model = make_towers(text_width=32)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        pixels = native_pixels(16, 4) if native else square_pixels(64, 16, filter="bilinear")
        heads = {"vision": 4, "text": 2}
        return assemble("siglip2", state, place="test", heads=heads, native=native, pixels=pixels)

    return make


@KINDS
@pytest.mark.parametrize("format", ["hf", "open_clip", "timm", "big_vision"])
def test_export_computes_what_our_towers_compute(make_weights, native, format, tmp_path):
    weights = make_weights(native)
    parity = write(weights, format, tmp_path / "out").parity
    if format == "big_vision" and native:
        assert parity is None  # nothing that can be installed reads it
        return
    assert parity.image < TOLERANCE
    if format != "timm":
        assert parity.text < TOLERANCE
        assert parity.logits < TOLERANCE * 10  # on exp(2.3) times a cosine


@KINDS
@pytest.mark.parametrize("format", ["hf", "open_clip", "timm"])
def test_comparison_notices_wrong_weights(make_weights, native, format, tmp_path, monkeypatch):
    """One channel's bias off in what is written, and the number says so."""
    weights = make_weights(native)
    state = {name: tensor.clone() for name, tensor in weights.state.items()}
    state["vision.blocks.1.attn.qkv.bias"][-1] += 0.5
    state["text.blocks.1.mlp.fc1.bias"][0] += 0.5
    target, wrong = TARGETS[format], replace(weights, state=state)
    monkeypatch.setitem(TARGETS, format, replace(target, write=lambda _, folder: target.write(wrong, folder)))
    parity = write(weights, format, tmp_path / "out").parity
    assert parity.image > 1e-4
    assert format == "timm" or parity.text > 1e-4


def randomised(model):
    """A model of another library with every parameter off its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def hf_model(native):
    """A small model of transformers' own making; g-opt's head from one width to another."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 32, "intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 8, **shape}
    vision = {"hidden_size": 48, "intermediate_size": 56, "patch_size": 8, **shape}
    if native:
        config = Siglip2Config(vision_config={**vision, "num_patches": 25}, text_config={**text, "projection_size": 48})
        return randomised(Siglip2Model(config))
    config = SiglipConfig(vision_config={**vision, "image_size": 36}, text_config={**text, "projection_size": 48})
    return randomised(SiglipModel(config))


@KINDS
@pytest.mark.parametrize("shard", [None, "30KB"], ids=["whole", "sharded"])
def test_model_of_transformers_comes_back_to_the_bit(native, shard, tmp_path):
    theirs = hf_model(native)
    theirs.save_pretrained(tmp_path / "theirs", **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard is not None)
    weights = read_weights(str(tmp_path / "theirs"))
    written = write(weights, "hf", tmp_path / "ours")
    assert written.parity.largest < TOLERANCE
    again = load_file(tmp_path / "ours" / "model.safetensors")
    parts = [load_file(path) for path in (tmp_path / "theirs").glob("*.safetensors")]
    before = {name: tensor for part in parts for name, tensor in part.items()}
    assert set(again) == set(before)
    assert [name for name in before if not torch.equal(before[name], again[name])] == []
    loaded = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(theirs)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    for tower in ("vision_config", "text_config"):
        ours, expected = getattr(loaded.config, tower), getattr(theirs.config, tower)
        assert {key: getattr(ours, key) for key in kept} == {key: getattr(expected, key) for key in kept}
    assert loaded.config.text_config.projection_size == 48


@KINDS
def test_towers_read_from_transformers_compute_the_same(native, tmp_path):
    theirs = hf_model(native)
    theirs.save_pretrained(tmp_path / "theirs")
    weights = read_weights(str(tmp_path / "theirs"))
    inputs, towers = random_inputs(weights), weights.towers()
    pixels = {"pixel_values": inputs.pixels}
    if native:
        images = inputs.images
        pixels = {
            "pixel_values": to_unit_range(images.patches),
            "pixel_attention_mask": images.valid.int(),
            "spatial_shapes": images.sizes[:, 0].long(),
        }
    with torch.no_grad():
        answer = theirs(input_ids=inputs.ids, **pixels)
        image, text = towers.encode_image(inputs.images).embedding, towers.encode_text(inputs.ids).embedding
    torch.testing.assert_close(image, answer.image_embeds, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(text, answer.text_embeds, rtol=0, atol=TOLERANCE)


def test_configurations_of_both_generations_are_read(tmp_path):
    theirs = hf_model(native=False).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    now = read_weights(str(tmp_path))
    config["torch_dtype"] = config.pop("dtype")
    for tower in ("vision_config", "text_config"):
        for key in ("hidden_act", "layer_norm_eps", "attention_dropout"):  # defaults, which older files leave out
            config[tower].pop(key)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(8)[None]  # which older files have
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    then = read_weights(str(tmp_path))
    assert (then.vision, then.text, then.notes) == (now.vision, now.text, now.notes)
    assert [n for n, tensor in now.state.items() if not torch.equal(tensor, then.state[n])] == []
    assert {tensor.dtype for tensor in then.state.values()} == {torch.bfloat16}


@pytest.fixture
def open_clip_folder(make_weights, tmp_path):
    """A folder of open_clip with weights of open_clip's own model, and that model."""

    def make(native):
        folder = write(make_weights(native), "open_clip", tmp_path / "theirs", check=False).folder
        model = randomised(open_clip.create_model(f"local-dir:{folder}"))
        save_file(model.state_dict(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        return folder, model

    return make


@KINDS
def test_model_of_open_clip_comes_back_to_the_bit(open_clip_folder, native, tmp_path):
    folder, theirs = open_clip_folder(native)
    written = write(read_weights(str(folder)), "open_clip", tmp_path / "ours")
    assert written.parity.largest < TOLERANCE
    again = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").state_dict()
    before = theirs.state_dict()
    assert set(again) == set(before)
    assert [n for n in before if again[n].shape != before[n].shape or not torch.equal(before[n], again[n])] == []


def test_training_checkpoint_of_open_clip_is_read_like_its_folder(open_clip_folder):
    folder, theirs = open_clip_folder(native=False)
    expected = read_weights(str(folder))
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    content = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, folder / "epoch_3.pt")
    found = read_weights(str(folder / "epoch_3.pt"))
    assert [n for n, tensor in expected.state.items() if not torch.equal(tensor, found.state[n])] == []
    assert (found.vision, found.text) == (expected.vision, expected.text)


def test_folder_of_open_clip_that_was_moved_is_still_read(make_weights, tmp_path):
    weights = make_weights(native=False)
    write(weights, "open_clip", tmp_path / "here", check=False)
    (tmp_path / "here").rename(tmp_path / "there")
    assert read_weights(str(tmp_path / "there")).vision == weights.vision


def test_folder_of_open_clip_that_was_moved_is_mended_by_one_command(make_weights, tmp_path):
    weights = make_weights(native=False)
    notes = write(weights, "open_clip", tmp_path / "here", check=False).notes
    (tmp_path / "here").rename(tmp_path / "a place with blanks")
    folder = tmp_path / "a place with blanks"
    with pytest.raises((RuntimeError, OSError, AssertionError)):
        open_clip.create_model(f"local-dir:{folder}")
    (command,) = [note.partition("run in the folder: ")[2] for note in notes if "from another place" in note]
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)
    inputs = random_inputs(weights)
    with torch.no_grad():
        theirs = open_clip.create_model(f"local-dir:{folder}").eval().encode_image(inputs.pixels, normalize=True)
        ours = weights.towers().encode_image(inputs.images).embedding
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


def test_layer_that_transformers_misses_is_missed_here(tmp_path):
    hf_model(native=False).save_pretrained(tmp_path)
    tensors, layer = load_file(tmp_path / "model.safetensors"), "vision_model.encoder.layers.1."
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, about = SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(about["missing_keys"]) == 16
    with pytest.raises(ValueError, match=f"16 are missing .{layer}"):
        read_weights(str(tmp_path))


def test_without_its_trunk_folder_open_clip_would_compute_an_exact_gelu(make_weights, tmp_path):
    """What the entries of B/16, most of L/16 and So400m/14 do, and why their names are not written."""
    weights = make_weights(native=False)
    folder = write(weights, "open_clip", tmp_path / "out", check=False).folder
    trunk = json.loads((folder / "trunk" / "config.json").read_text())
    trunk["model_args"]["act_layer"] = "gelu"
    (folder / "trunk" / "config.json").write_text(json.dumps(trunk))
    inputs = random_inputs(weights)
    with torch.no_grad():
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        apart = (model.encode_image(inputs.pixels, normalize=True)) - unit_norm(
            weights.vision_tower()(inputs.images).pooled
        )
    assert apart.abs().max() > TOLERANCE
    assert any("the vision tower has the exact GELU" in note for note in read_weights(str(folder)).notes)


@KINDS
def test_trunk_of_timm_comes_back_to_the_bit(make_weights, native, tmp_path):
    folder = write(make_weights(native), "timm", tmp_path / "first", check=False).folder
    theirs = randomised(timm.create_model(f"local-dir:{folder}", pretrained=True))
    save_file(theirs.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    written = write(read_weights(str(folder)), "timm", tmp_path / "second")
    assert written.parity.largest < TOLERANCE
    again = load_file(tmp_path / "second" / "model.safetensors")
    before = theirs.state_dict()
    assert set(again) == set(before)
    assert [name for name in before if not torch.equal(before[name], again[name])] == []


def test_weights_go_from_transformers_to_open_clip_and_timm_and_compute_the_same(tmp_path):
    theirs = hf_model(native=False)
    theirs.save_pretrained(tmp_path / "theirs")
    weights = read_weights(str(tmp_path / "theirs"))
    inputs = random_inputs(weights)
    write(weights, "open_clip", tmp_path / "open_clip")
    write(weights, "timm", tmp_path / "timm")
    with torch.no_grad():
        answer = theirs(input_ids=inputs.ids, pixel_values=inputs.pixels)
        clip = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
        trunk = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        squares = inputs.pixels[..., :32, :32]  # of 36 px, four patches of 8
        found = clip.encode_image(squares, normalize=True), clip.encode_text(inputs.ids, normalize=True)
        torch.testing.assert_close(found[0], answer.image_embeds, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found[1], answer.text_embeds, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(unit_norm(trunk(squares)), answer.image_embeds, rtol=0, atol=TOLERANCE)
