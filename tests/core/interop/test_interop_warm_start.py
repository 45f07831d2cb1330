"""A run starts from other libraries' weights as from a checkpoint of ours, where they mean the same in it."""

import json
import logging

import pytest
import torch
from staged import run

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.surgery import resize_positions

FRESH = ("--model.surgery.schedule", "fresh", "--trainer.max_steps", 3)
FORMATS = ["hf", "open_clip", "big_vision"]


@pytest.fixture
def make_weights(toy_tokenizer):
    """Weights that fit the tiny recipe, other than those it would draw."""

    def make(*, native=False, heads=2, **contract):
        tokenizer = Tokenizer.load(toy_tokenizer, length=16, **contract)
        torch.manual_seed(7)
        model = build_two_towers(
            "tiny/16",
            patch_size=16,
            grid=(2, 2),
            vocab_size=tokenizer.vocab_size,
            context_length=16,
            vision=ShapeOptions(num_heads=heads),
            logit_bias=-3.0,
        )
        pixels = native_pixels(16, 2) if native else square_pixels(32, 16, filter="bilinear")
        return assemble(
            "siglip2",
            {name: tensor.detach() for name, tensor in model.state_dict().items()},
            place="test",
            heads={"vision": heads, "text": 2},
            native=native,
            pixels=pixels,
            tokenizer=tokenizer,
        )

    return make


@pytest.fixture
def start(tiny_recipe, make_weights, tmp_path):
    """Writes weights and runs the tiny recipe from them; returns weights and diary."""

    def begin(format, *extra, **weights):
        found = make_weights(**weights)
        folder = write(found, format, tmp_path / "released", check=False).folder
        return found, run([*tiny_recipe, "--model.warm_start", str(folder)], *FRESH, *extra)

    return begin


@pytest.fixture
def said(caplog):
    """What the warm start logs; the command line's logger does not hand on."""
    logger = logging.getLogger("siglip2.core.warm_start")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_run_begins_with_the_weights_and_at_its_own_progress(start, format, native):
    extra = ("--plugins.fixed", "off", "--plugins.naflex.table", 2, "--plugins.naflex.batch_size", 4) if native else ()
    extra += ("--plugins.naflex.seq_lens", "[4]", "--plugins.naflex.eval_seq_len", 4) if native else ()
    weights, diary = start(format, *extra, native=native)
    begin = diary.steps[1]["before"]
    assert [n for n, tensor in weights.state.items() if not torch.equal(tensor, begin[f"model.{n}"])] == []
    assert len(diary.steps) == 3


def test_run_of_another_resolution_resizes_the_positions_and_keeps_the_rest(start):
    weights, diary = start("hf", "--plugins.fixed.image_size", 48)
    begin = diary.steps[1]["before"]
    assert torch.equal(begin["model.vision.pos_embed"], resize_positions(weights.state["vision.pos_embed"], (3, 3)))
    rest = [n for n, tensor in weights.state.items() if not torch.equal(tensor, begin[f"model.{n}"])]
    assert rest == ["vision.pos_embed"]


def test_trunk_alone_leaves_the_text_tower_as_it_was_drawn(start, said):
    weights, diary = start("timm")
    begin = diary.steps[1]["before"]
    trunk = [n for n in weights.state if n.startswith("vision.")]
    assert [n for n in trunk if not torch.equal(weights.state[n], begin[f"model.{n}"])] == []
    kept = [n for n in diary.initial if n.startswith(("model.text.", "model.logit_"))]
    assert [n for n in kept if not torch.equal(diary.initial[n], begin[n])] == []
    assert "fresh: the text tower, temperature and bias" in said.text


def test_differences_of_pixels_and_notes_are_logged(start, said):
    start("hf", "--plugins.fixed.filter", "bicubic")
    assert "pixels: filter: now bicubic, then bilinear" in said.text
    assert "optimizer state: fresh" in said.text


def test_weights_that_say_nothing_of_texts_are_taken_with_a_warning(tiny_recipe, make_weights, tmp_path, said):
    folder = write(make_weights(), "big_vision", tmp_path / "released", check=False).folder
    alone = (folder / "model.npz").rename(tmp_path / "alone.npz")
    run([*tiny_recipe, "--model.warm_start", str(alone)], *FRESH)
    assert "does not say how texts were read" in said.text


@pytest.mark.parametrize(
    ("weights", "extra", "message"),
    [
        ({}, ("--model.surgery.schedule", "continue"), "no checkpoint of ours .* model.surgery.schedule to fresh"),
        ({"heads": 4}, (), "has 4 attention heads in its vision tower, this recipe 2: set model.size"),
        ({"canonicalize": True}, (), "trained with another text contract: canonicalize: False here, True there"),
        ({}, ("--data.text.length", 12), "another text contract: length: 12 here, 16 there"),
        ({}, ("--model.text.depth", 3), "another model than this recipe builds:\n  model.text.blocks.2"),
        ({}, ("--model.timm", "vit_tiny_patch16_224"), "holds a SigLIP tower, and this recipe has one of timm's own"),
    ],
    ids=["schedule", "heads", "cleaning", "length", "depth", "timm"],
)
def test_weights_that_would_mean_something_else_are_refused(start, weights, extra, message):
    with pytest.raises(ValueError, match=message):
        start("hf", *extra, **weights)


def test_weights_of_another_vocabulary_are_refused(start, tiny_recipe, tmp_path):
    other = train_tokenizer(["some other words", "for a vocabulary"], vocab_size=300, out=tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"reads a vocabulary of \d+ ids, this run's tokenizer has \d+: give --data"):
        start("hf", "--data.tokenizer", other)


def test_same_number_of_other_pieces_is_another_text_contract(start, toy_tokenizer, tmp_path):
    content = json.loads(toy_tokenizer.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another text contract: tokenizer file: other pieces"):
        start("hf", "--data.tokenizer", other)


def test_checkpoint_of_ours_is_read_as_weights_without_its_scaffolding(tiny_recipe, tmp_path):
    extra = ["--plugins.ema_teacher", "on", "--trainer.max_steps", "5"]
    cli = SigLIP2CLI([*tiny_recipe, *extra], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    weights = read_weights(str(tmp_path / "step=5.ckpt"))
    state = cli.model.model.state_dict()
    assert set(weights.state) == set(state)
    assert [n for n, tensor in state.items() if not torch.equal(tensor, weights.state[n])] == []
    assert weights.pixels == cli.model.patchifier.contract()
    assert weights.tokenizer.differences(cli.model.tokenizer) == []
    assert weights.notes == ("plugins were left out (ema_teacher)",)
    assert write(weights, "hf", tmp_path / "hf").parity.largest < 1e-5


def test_checkpoint_with_a_tower_of_timm_is_not_taken_elsewhere(tiny_recipe, tmp_path):
    extra = ["--model.timm", "vit_tiny_patch16_224", "--trainer.max_steps", "5"]
    cli = SigLIP2CLI([*tiny_recipe, *extra], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    with pytest.raises(ValueError, match="a vision tower of timm's own .vit_tiny_patch16_224."):
        read_weights(str(tmp_path / "step=5.ckpt"))
