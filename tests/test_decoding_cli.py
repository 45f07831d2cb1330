"""`siglip2 caption | locate | describe`: every picture gets every question, and its own answers."""

import json
from types import SimpleNamespace

import pytest
import torch

import siglip2.registry
from siglip2 import Objective, hookimpl
from siglip2.cli.decoding import read_box
from siglip2.cli.main import main
from siglip2.core.data.image_io import decode_image
from siglip2.core.layout import Layout
from siglip2.core.views import IMAGE
from siglip2.testing import TinySource, tiny_model
from siglip2.testing.tiny import PATCHIFIER

# B rows, N patches, D width
SHORT = ["--trainer.max_steps", "4", "--report", "false"]


class Teller(Objective):
    """Tells in its answers what it was asked, and of which picture; texts of one letter are nowhere."""

    name = "teller"

    @hookimpl
    def views(self):
        return [IMAGE]

    def loss(self, step):
        return step.encode_image("image").embedding.square().mean()

    def caption(self, tokens_BND, tokenizer, *, language="", valid=None):
        return [f"{mark(row)} {language}".strip() for row in tokens_BND]

    def locate(self, tokens_BND, texts, tokenizer, *, language="", valid=None):
        assert len(tokens_BND) == len(texts)
        boxes = [[0.1, 0.25, 0.1 + 0.1 * len(text), 0.75] for text in texts]
        boxes = [box if len(text) > 1 else [float("nan")] * 4 for box, text in zip(boxes, texts, strict=True)]
        return torch.tensor(boxes)

    def describe(self, tokens_BND, boxes_B4, tokenizer, *, language="", valid=None):
        boxes = boxes_B4.tolist()
        return [f"{mark(row)} {box[2]:.2f}" for row, box in zip(tokens_BND, boxes, strict=True)]


def mark(tokens_ND):
    """A short name of a picture by what the vision tower makes of it."""
    return f"{float(tokens_ND.double().abs().mean()):.9f}"


@pytest.fixture
def teller(third_party_plugins):
    """Installs a package with the plugin `teller`."""

    class Module:
        @hookimpl
        def register_plugins(self):
            return [Teller]

    dist = SimpleNamespace(name="teller-package", version="1.2")
    third_party_plugins.append(SimpleNamespace(name="teller", value="teller", dist=dist, load=Module))
    siglip2.registry.catalogue.cache_clear()


@pytest.fixture
def ran(capsys, monkeypatch):
    """Runs `siglip2 ...` and returns (stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        capsys.readouterr()
        main([str(a) for a in arguments])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs `siglip2 ...`, which is to end with status 2, and returns what it complained of."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def pictures(tmp_path):
    """Two pictures: 46 x 58 and 54 x 50 pixels."""
    paths = [tmp_path / f"{i}.png" for i in (3, 7)]
    for path in paths:
        path.write_bytes(TinySource().read(int(path.stem)).record["png"])
    return paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoint lies that the tests of this file share."""
    return tmp_path_factory.mktemp("teller")


@pytest.fixture
def checkpoint(ran, teller, tiny_recipe, folder):
    """A checkpoint with the plugin `teller`, written when the first test asks for it."""
    path = folder / "step=4.ckpt"
    if not path.exists():
        ran("fit", *tiny_recipe, *SHORT, "--plugins.teller", "on", "--trainer.default_root_dir", folder)
    return path


def lines(printed):
    return [json.loads(line) for line in printed.out.splitlines()]


def test_caption_writes_one_line_for_each_picture(ran, checkpoint, pictures):
    found = lines(ran("caption", "--ckpt_path", checkpoint, "--images", *pictures, "--language", "de", "--json"))
    assert [line["image"] for line in found] == [str(p) for p in pictures]
    captions = [line["caption"] for line in found]
    assert captions[0] != captions[1]
    assert all(text.endswith(" de") for text in captions)
    plain = ran("caption", "--ckpt_path", checkpoint, "--images", *pictures).out
    for path, text in zip(pictures, captions, strict=True):
        assert f"{path}: {text.removesuffix(' de')}" in plain


def test_picture_is_seen_with_the_weights_of_the_checkpoint(ran, checkpoint, pictures):
    """A caption by `Teller` is the mean size of the image tokens: here computed without the command."""
    (found,) = lines(ran("caption", "--ckpt_path", checkpoint, "--images", pictures[0], "--json"))
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    towers = tiny_model()
    vision = {name.removeprefix("model.vision."): x for name, x in stored.items() if name.startswith("model.vision.")}
    towers.vision.load_state_dict(vision)
    patches = PATCHIFIER(decode_image(pictures[0].read_bytes()), IMAGE, Layout(4, 1))
    with torch.no_grad():
        expected = towers.encode_image(patches).tokens[0]
    assert float(found["caption"]) == pytest.approx(float(expected.double().abs().mean()), abs=1e-5)


def test_locate_gives_every_text_a_box_in_every_picture_in_shares_and_pixels(ran, checkpoint, pictures):
    asked = ["locate", "--ckpt_path", checkpoint, "--images", *pictures, "--texts", "dog", "x", "0,1"]
    for line, (width, height) in zip(lines(ran(*asked, "--json")), [(46, 58), (54, 50)], strict=True):
        edge = round(0.4 * width)
        pixels = [round(0.1 * width), round(0.25 * height), edge, round(0.75 * height)]
        box = [0.1, 0.25, 0.4, 0.75]
        assert line["texts"] == [
            {"text": "dog", "box": box, "pixels": pixels},
            {"text": "x", "box": None, "pixels": None},
            {"text": "0,1", "box": box, "pixels": pixels},
        ]
    table = ran(*asked).out
    assert "0.100 0.250 0.400 0.750" in table
    assert "no readable box" in table


def test_describe_answers_for_every_box_of_every_picture(ran, checkpoint, pictures):
    boxes = ["0.1,0.2,0.5,0.6", "0,0,1,1"]
    asked = ["describe", "--ckpt_path", checkpoint, "--images", *pictures, "--boxes", *boxes]
    captions = lines(ran("caption", "--ckpt_path", checkpoint, "--images", *pictures, "--json"))
    for line, caption in zip(lines(ran(*asked, "--json")), captions, strict=True):
        assert [row["box"] for row in line["boxes"]] == [[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]]
        assert [row["text"] for row in line["boxes"]] == [f"{caption['caption']} 0.50", f"{caption['caption']} 1.00"]
    assert "0.1,0.2,0.5,0.6" in ran(*asked).out


def test_checkpoint_without_a_decoder_names_its_plugins_and_the_one_to_train_with(ran, refused, tiny_recipe, tmp_path):
    ran("fit", *tiny_recipe, *SHORT)
    message = refused("caption", "--ckpt_path", tmp_path / "step=4.ckpt", "--images", "a.png")
    assert (
        "this checkpoint has no plugin that can caption or locate (its plugins: fixed, sigmoid): train with `locca`"
    ) in message


def test_decoder_that_had_not_woken_is_refused(ran, refused, teller, tiny_recipe, pictures, tmp_path):
    ran("fit", *tiny_recipe, "--plugins.teller.start", "0.8", "--report", "false")
    message = refused("caption", "--ckpt_path", tmp_path / "step=5.ckpt", "--images", *pictures)
    assert "the decoder in this checkpoint had not been awake yet, so it is untrained: take a later one" in message
    assert lines(ran("caption", "--ckpt_path", tmp_path / "step=10.ckpt", "--images", *pictures, "--json"))


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("caption", [], "caption needs images: siglip2 caption --ckpt_path CKPT --images a.png"),
        (
            "locate",
            ["--images", "a.png"],
            "locate needs images and texts: siglip2 locate --ckpt_path CKPT --images a.p",
        ),
        ("describe", ["--boxes", "0,0,1,1"], "describe needs images and boxes: siglip2 describe --ckpt_path CKPT --im"),
        ("describe", ["--images", "a.png", "--boxes", "0,0,2,1"], "--boxes: found '0,0,2,1', expected 0 <= min < max"),
    ],
)
def test_what_is_missing_is_said_with_an_example(checkpoint, refused, command, given, message):
    assert message in refused(command, "--ckpt_path", checkpoint, *given)


@pytest.mark.parametrize("command", ["caption", "locate", "describe"])
def test_decoding_without_a_checkpoint_is_refused(command, refused):
    assert f"`siglip2 {command}` needs trained weights: give --ckpt_path" in refused(command, "--images", "a.png")


@pytest.mark.parametrize("spec", ["0.1,0.2,0.5", "a,b,c,d", "", "0.1 0.2 0.5 0.6"])
def test_what_is_no_box_says_what_one_is(spec):
    with pytest.raises(ValueError, match=f"--boxes: found '{spec}', expected four numbers xmin,ymin,xmax,ymax"):
        read_box(spec)


@pytest.mark.parametrize("spec", ["0.5,0.2,0.1,0.6", "0.1,0.6,0.5,0.2", "-0.1,0,1,1", "0,0,1,1.5", "0,0,nan,1"])
def test_box_outside_of_the_picture_or_without_area_is_refused(spec):
    with pytest.raises(ValueError, match=f"--boxes: found '{spec}', expected 0 <= min < max <= 1"):
        read_box(spec)
