"""Weights written in a format and read back are the same weights, to the bit, with the same contracts."""

import json
from dataclasses import replace

import pytest
import torch
from timm.layers import GELUTanh
from torch import nn

from siglip2.core.interop import big_vision
from siglip2.core.interop.contracts import same_vocabulary
from siglip2.core.interop.detect import of_checkpoint, read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.files import write_npz
from siglip2.core.interop.weights import square_pixels
from siglip2.testing import tiny_model, tiny_tokenizer

BOTH_TOWERS = ["hf", "open_clip", "big_vision"]


def different(state, expected):
    """Names under which two state dicts differ in any bit, dtype or shape."""
    assert set(state) == set(expected)
    return [n for n, t in state.items() if t.dtype != expected[n].dtype or not torch.equal(t, expected[n])]


def there_and_back(weights, format, folder):
    return read_weights(str(write(weights, format, folder, check=False).folder))


def assert_same(found, weights):
    assert different(found.state, weights.state) == []
    what = ("vision", "text", "patch_size", "grid", "native", "vocab_size", "context_length", "pixels")
    assert {name: getattr(found, name) for name in what} == {name: getattr(weights, name) for name in what}
    assert found.tokenizer.contract == weights.tokenizer.contract
    assert same_vocabulary(found.tokenizer, weights.tokenizer)


@pytest.mark.parametrize("format", BOTH_TOWERS)
def test_weights_and_contracts_come_back_to_the_bit(weights, format, tmp_path):
    found = there_and_back(weights, format, tmp_path / "out")
    assert found.format == format
    assert_same(found, weights)


def test_trunk_comes_back_to_the_bit(weights, tmp_path):
    found = there_and_back(weights, "timm", tmp_path / "out")
    trunk = {name: tensor for name, tensor in weights.state.items() if name.startswith("vision.")}
    assert different(found.state, trunk) == []
    assert (found.vision, found.grid, found.pixels) == (weights.vision, weights.grid, weights.pixels)
    assert found.text is found.tokenizer is None


def test_way_through_every_format_leads_back_to_the_start(weights, tmp_path):
    now = weights
    for number, format in enumerate([*BOTH_TOWERS, *reversed(BOTH_TOWERS)]):
        now = there_and_back(now, format, tmp_path / str(number))
    assert_same(now, weights)
    texts = ["A red disc, number 3!", "<eos>", "ÄÖ  日本 🙂", ""]
    assert torch.equal(now.tokenizer.encode(texts), weights.tokenizer.encode(texts))


@pytest.mark.parametrize("format", ["hf", "open_clip", "timm"])
def test_bfloat16_stays_bfloat16(make_weights, format, tmp_path):
    weights = make_weights(dtype=torch.bfloat16)
    found = there_and_back(weights, format, tmp_path / "out")
    expected = {name: tensor for name, tensor in weights.state.items() if name in found.state}
    assert different(found.state, expected) == []


def test_npz_holds_bfloat16_as_float32_of_the_same_value(make_weights, tmp_path):
    weights = make_weights(dtype=torch.bfloat16)
    found = there_and_back(weights, "big_vision", tmp_path / "out")
    assert different(found.state, {name: tensor.float() for name, tensor in weights.state.items()}) == []


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_both_layouts_of_npz_files_are_read(weights, scan, prefix, tmp_path):
    arrays = big_vision.arrays_of(weights, scan=scan)
    assert ("params/img/Transformer/encoderblock/LayerNorm_0/scale" in arrays) == scan
    assert ("params/txt/Encoder_0/encoderblock_1/LayerNorm_0/scale" in arrays) != scan
    write_npz(tmp_path / "any.npz", {prefix + name.removeprefix("params/"): t for name, t in arrays.items()})
    found = read_weights(str(tmp_path / "any.npz"))
    assert different(found.state, weights.state) == []
    assert (found.vision, found.text, found.native) == (weights.vision, weights.text, weights.native)


def test_more_than_ten_stacked_layers_keep_their_order():
    arrays = {f"img/Transformer/encoderblock_{i}/x": torch.tensor(i) for i in range(12)}
    assert big_vision.stacked(arrays)["img/Transformer/encoderblock/x"].tolist() == list(range(12))
    assert big_vision.one_by_one(big_vision.stacked(arrays)) == arrays


@pytest.mark.parametrize("format", ["hf", "open_clip", "big_vision"])
def test_contract_that_no_library_has_travels_beside_the_files(make_weights, format, tmp_path):
    weights = make_weights(native=True)
    contract = replace(weights.tokenizer.contract, bos=True, bos_id=2)
    tokenizer = type(weights.tokenizer)(weights.tokenizer.file, contract)
    weights = replace(weights, tokenizer=tokenizer, pixels={**weights.pixels, "max_scale": 1.5})
    assert_same(there_and_back(weights, format, tmp_path / "out"), weights)


def test_card_says_how_to_load_it_and_what_it_was_trained_on(weights, tmp_path):
    done = write(weights, "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "library_name: transformers",
        "pipeline_tag: zero-shot-image-classification",
        "license: other",
        str(done.parity),
        done.load,
        json.dumps(weights.pixels, indent=1),
    ):
        assert said in card
    assert f"image embeddings {done.parity.image:.1e}" in card


@pytest.mark.parametrize("format", ["hf", "open_clip", "timm", "big_vision"])
def test_unchecked_export_says_so(weights, format, tmp_path):
    done = write(weights, format, tmp_path / "out", check=False)
    assert done.parity is None
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()
    assert set(done.files) == {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}


def test_trunk_alone_is_written_for_timm_and_for_nothing_else(weights, tmp_path):
    trunk = there_and_back(weights, "timm", tmp_path / "trunk")
    again = there_and_back(trunk, "timm", tmp_path / "again")
    assert different(again.state, trunk.state) == []
    for format in BOTH_TOWERS:
        with pytest.raises(ValueError, match="a vision tower alone: .* would need a text tower"):
            write(trunk, format, tmp_path / format)


def test_folder_that_is_not_empty_is_left_alone(weights, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write(weights, "hf", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_format_is_named_with_the_nearest(weights, tmp_path):
    with pytest.raises(ValueError, match="no format called 'openclip', did you mean 'open_clip'"):
        write(weights, "openclip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_position_table_that_is_no_square_is_refused(make_weights, tmp_path):
    weights = make_weights()
    state = {**weights.state, "vision.pos_embed": weights.state["vision.pos_embed"][:2]}
    with pytest.raises(ValueError, match="the position table is 2 x 4"):
        write(replace(weights, state=state, grid=(2, 4)), "hf", tmp_path / "out")


@pytest.mark.parametrize("options", [{"gelu": "exact"}, {"gelu": None}, {}], ids=["exact", "null", "older"])
def test_checkpoint_keeps_its_gelu_and_older_ones_have_tanh(options):
    """What a recipe says of the towers is in the checkpoint, and of an older one nothing on GELUs."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    recipe = {"model": {"size": "tiny/16", "vision": options, "text": {"num_heads": 2, **options}}}
    pixels = square_pixels(32, 16, filter="bilinear")
    ours = {"recipe": recipe, "pixels": pixels, "text": tokenizer.to_state()}
    found = of_checkpoint({"siglip2": ours, "state_dict": state}, "here")
    assert set(found.gelus.values()) == {"exact" if options.get("gelu") else "tanh"}
    acts = {type(block.mlp.act) for tower in (found.towers().vision, found.towers().text) for block in tower.blocks}
    acts.add(type(found.towers().vision.pool.mlp.act))
    assert acts == {nn.GELU if options.get("gelu") else GELUTanh}
