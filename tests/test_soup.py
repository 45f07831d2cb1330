"""`siglip2 soup`: the weights between two models of any library, as a checkpoint, and only if they are one model."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from torchvision.io import write_png

from siglip2 import load
from siglip2.cli.exporting import export_to
from siglip2.cli.main import main
from siglip2.cli.soup import as_checkpoint, soup
from siglip2.cli.soup import read as read_any
from siglip2.cli.training import SigLIP2CLI, fit
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import native_pixels


@pytest.fixture(scope="module")
def two(toy_shards, toy_tokenizer, tmp_path_factory):
    """Two checkpoints of one run."""
    folder = tmp_path_factory.mktemp("run")
    options = {"data.train.path": toy_shards, "data.tokenizer": toy_tokenizer, "trainer.default_root_dir": folder}
    fit(["--config", "tests/tiny.yaml", "--report=false", *(f"--{name}={value}" for name, value in options.items())])
    return folder / "step=5.ckpt", folder / "step=10.ckpt"


@pytest.fixture
def read(two):
    """Both, as they are read."""
    return [read_checkpoint(str(path)) for path in two]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_soup_is_the_weighted_mean_of_every_tensor_of_the_product(read, alpha):
    a, b = (c["state_dict"] for c in read)
    mixed = soup(*read, alpha)["state_dict"]
    assert set(mixed) == {name for name in a if name.startswith("model.")}
    for name, tensor in mixed.items():
        expected = (1 - alpha) * a[name].double() + alpha * b[name].double()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-9)
    assert not torch.equal(a["model.text.head.weight"], b["model.text.head.weight"])


def test_command_writes_a_checkpoint_that_validates_and_that_a_run_starts_from(two, capsys, tmp_path):
    out = tmp_path / "mixed.ckpt"
    main(["soup", *map(str, two), "--alpha", "0.3", "--out", str(out)])
    assert "0.7 of" in capsys.readouterr().out
    written = read_checkpoint(str(out))
    assert written["siglip2"]["soup"] == {"of": [str(path) for path in two], "alpha": 0.3}
    path = written["siglip2"]["recipe"]["data"]["train"]["path"]
    pairs = {"pairs": {"path": path, "fields": {"caption": "json.caption"}}}
    cli = SigLIP2CLI(["--ckpt_path", str(out), f"--data.retrieval={json.dumps(pairs)}"], command="validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=str(out), verbose=False)
    assert torch.equal(
        cli.model.state_dict()["model.text.head.weight"], written["state_dict"]["model.text.head.weight"]
    )
    recipe = ["--config", "tests/tiny.yaml", "--data.tokenizer", str(out), f"--trainer.default_root_dir={tmp_path}"]
    start = [f"--model.warm_start={out}", "--model.surgery.schedule=fresh", "--trainer.max_steps=5"]
    fit([*recipe, *start, f"--data.train.path={path}", "--report=false"])
    assert (tmp_path / "step=5.ckpt").is_file()


@pytest.fixture(scope="module")
def released(two, tmp_path_factory):
    """Writes one of the two as another library has it; returns the path that its users would give."""

    def write_as(format, number=0):
        folder = tmp_path_factory.mktemp("released") / format
        write(read_weights(str(two[number])), format, folder, check=False)
        return str(folder)

    return write_as


@pytest.mark.parametrize("format", ["hf", "open_clip", "big_vision"])
def test_released_weights_mix_with_a_run_as_the_checkpoint_they_were_made_from(two, read, released, format, tmp_path):
    out, before = tmp_path / "mixed.ckpt", released(format)
    main(["soup", before, str(two[1]), "--alpha", "0.25", "--out", str(out)])
    found, expected = read_checkpoint(str(out)), soup(*read, 0.25)
    assert found["siglip2"].pop("soup") == {"of": [before, str(two[1])], "alpha": 0.25}
    assert found["siglip2"] == expected["siglip2"]
    assert set(found["state_dict"]) == set(expected["state_dict"])
    assert all(torch.equal(tensor, expected["state_dict"][n]) for n, tensor in found["state_dict"].items())


def test_recipe_is_that_of_the_run_on_whichever_side_it_is(read, released):
    mixed = soup(read[0], read_any(released("hf", 1)), 0.5)
    assert mixed["siglip2"] == soup(read[1], read[0], 0.5)["siglip2"]
    torch.testing.assert_close(mixed["state_dict"], soup(*read, 0.5)["state_dict"], rtol=0, atol=0)


@pytest.fixture(params=[False, True], ids=["fixed", "naflex"])
def of_two_releases(request, two, tmp_path, monkeypatch):
    """The soup of two folders of transformers, and the weights at alpha 1."""
    native, (a, b) = request.param, (read_weights(str(path)) for path in two)
    if native:
        a, b = (replace(w, native=True, pixels=native_pixels(16, 2)) for w in (a, b))
    folders = [str(write(w, "hf", tmp_path / name, check=False).folder) for name, w in (("a", a), ("b", b))]
    monkeypatch.chdir(tmp_path)  # neither is ours, so the soup is written here
    main(["soup", *folders, "--alpha", "1"])
    return str(tmp_path / "soup-1.ckpt"), folders[1]


def test_soup_of_two_releases_loads_exports_scores_and_predicts(of_two_releases, toy_shards, tmp_path, capsys):
    path, b = of_two_releases
    picture, texts = torch.arange(3 * 40 * 56, dtype=torch.uint8).reshape(3, 40, 56), ["a red disc", "a box"]
    ours, theirs = load(path, "cpu"), load(b, "cpu")
    assert torch.equal(ours.encode_image(picture), theirs.encode_image(picture))
    assert torch.equal(ours.encode_text(texts), theirs.encode_text(texts))
    files = export_to(path, "big_vision", tmp_path / "npz", check=False)
    assert torch.equal(load(files.folder, "cpu").encode_image(picture), theirs.encode_image(picture))
    pairs = {"pairs": {"path": str(toy_shards), "fields": {"caption": "json.caption"}}}
    capsys.readouterr()
    main(["validate", "--ckpt_path", path, f"--data.retrieval={json.dumps(pairs)}"])
    assert "pairs" in capsys.readouterr().out
    write_png(picture, str(tmp_path / "a.png"))
    main(["predict", "--ckpt_path", path, "--images", str(tmp_path / "a.png"), "--texts", *texts, "--json"])
    ranked = json.loads(capsys.readouterr().out)["texts"]
    assert {r["text"]: r["match"] for r in ranked} == pytest.approx(
        {r.text: r.match for r in theirs.rank(picture, texts)}, abs=1e-6
    )


def test_soup_of_two_releases_starts_a_run(released, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["soup", released("hf"), released("big_vision", 1)])
    start = [f"--model.warm_start={tmp_path / 'soup-0.5.ckpt'}", "--model.surgery.schedule=fresh"]
    fit([*tiny_recipe, *start, "--trainer.max_steps=5", "--report=false"])
    assert (tmp_path / "step=5.ckpt").is_file()


def test_adapters_are_in_the_soup(read, tiny_recipe, released, tmp_path):
    pytest.importorskip("peft")
    start = ["--model.warm_start", released("hf"), "--model.surgery.schedule", "fresh", "--trainer.max_steps", "5"]
    lora = ["--plugins.lora", "on", "--model.optimizer.init_args.lr=0.05"]
    cli = SigLIP2CLI([*tiny_recipe, *start, *lora], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    tuned = read_checkpoint(str(tmp_path / "step=5.ckpt"))
    name = "model.vision.blocks.0.mlp.fc1.weight"
    mixed = soup(read_any(released("hf")), tuned, 0.5)
    layer = cli.model.model.vision.blocks[0].mlp.fc1
    moved = layer.base_layer.weight + layer.get_delta_weight("default")
    assert not torch.allclose(moved, read[0]["state_dict"][name], atol=1e-3)  # or there is nothing to mix
    torch.testing.assert_close(mixed["state_dict"][name], (read[0]["state_dict"][name] + moved).detach() / 2)
    assert mixed["siglip2"]["recipe"]["plugins"]["lora"] is None


def test_half_precision_of_released_weights_does_not_round_the_run(read, two):
    half = read_weights(str(two[0]))
    half = replace(half, state={name: tensor.half() for name, tensor in half.state.items()})
    mixed = soup(as_checkpoint(half, "half"), read[1], 0.5)["state_dict"]
    for name, tensor in mixed.items():
        expected = (read[0]["state_dict"][name].half().double() + read[1]["state_dict"][name].double()) / 2
        assert torch.equal(tensor, expected.float()), name


def test_weights_that_do_not_say_their_contracts_mix_with_a_run_and_say_what_was_not_compared(
    two, released, tmp_path, capsys
):
    bare = shutil.copy(f"{released('big_vision')}/model.npz", tmp_path / "bare.npz")
    main(["soup", str(bare), str(two[1]), "--out", str(tmp_path / "mixed.ckpt")])
    printed = capsys.readouterr().out
    assert "how pictures are resized: that was not compared" in printed
    assert "how texts are read: only the number of ids was compared" in printed
    with pytest.raises(ValueError, match="none of the two says both how texts are read"):
        soup(read_any(str(bare)), read_any(str(bare)), 0.5)
    whole = soup(read_any(released("hf")), read_any(str(bare)), 0.5)
    assert whole["siglip2"]["pixels"] == read_checkpoint(str(two[0]))["siglip2"]["pixels"]


def test_what_differs_between_released_weights_and_a_run_is_named(read, two, released, toy_tokenizer, tmp_path):
    weights, tuned = read_weights(str(two[0])), read[1]

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            soup(as_checkpoint(replace(weights, **changed), "test"), tuned, 0.5)

    refused("vision.num_heads: A 4, B 2", vision=replace(weights.vision, num_heads=4))
    refused("pixels: filter: A bicubic, B bilinear", pixels={**weights.pixels, "filter": "bicubic"})
    stripped = Tokenizer.load(toy_tokenizer, length=16, canonicalize=True)
    refused("text: canonicalize: A True, B False", tokenizer=stripped)
    text = ["some other words", "for a vocabulary"]
    other = Tokenizer.load(train_tokenizer(text, vocab_size=300, out=tmp_path / "other.json"), length=16)
    refused("text: tokenizer file: other pieces\n  text: vocab_size", tokenizer=other)
    rows = weights.state["text.token_embed.weight"]
    fewer = {**weights.state, "text.token_embed.weight": rows[:-20]}
    refused(rf"token_embed.weight: A \[{len(rows) - 20}, 64\], B \[{len(rows)}, 64\]", state=fewer, tokenizer=None)
    timm = {**tuned["siglip2"]["recipe"]["model"], "timm": "vit_tiny_patch16_224"}
    ours = {**tuned["siglip2"], "recipe": {**tuned["siglip2"]["recipe"], "model": timm}}
    with pytest.raises(ValueError, match="timm: A None, B vit_tiny_patch16_224"):
        soup(as_checkpoint(weights, "test"), {**tuned, "siglip2": ours}, 0.5)
    with pytest.raises(ValueError, match="holds a vision tower alone: a soup is made of two models with both towers"):
        read_any(released("timm"))


def test_scaffolding_leaves_the_weights_the_recipe_s_plugins_and_its_rules(read):
    b = copy.copy(read[1])
    b["state_dict"] = {**b["state_dict"], "plugins.silc.head.weight": torch.zeros(2)}
    recipe = {**b["siglip2"]["recipe"], "plugins": {"fixed": {}, "sigmoid": {}, "silc": {"weight": 1.0}}}
    b["siglip2"] = {**b["siglip2"], "recipe": recipe}
    mixed = soup(read[0], b, 0.5)
    assert not any(name.startswith("plugins.") for name in mixed["state_dict"])
    assert mixed["siglip2"]["recipe"]["plugins"] == {"fixed": {}, "sigmoid": {}, "silc": None}
    assert mixed["siglip2"]["recipe"]["model"]["rules"] == []


def test_other_shapes_other_pixels_and_other_texts_are_named(read):
    a, b = read
    other = copy.copy(b)
    other["state_dict"] = {**b["state_dict"], "model.logit_bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"model.logit_bias: A \[1\], B \[3\]"):
        soup(a, other, 0.5)
    other = {**b, "siglip2": {**b["siglip2"], "pixels": {**b["siglip2"]["pixels"], "antialias": "odd"}}}
    with pytest.raises(ValueError, match="pixels: antialias: A True, B odd"):
        soup(a, other, 0.5)
    text = copy.deepcopy(b["siglip2"]["text"])
    text["contract"]["length"] = 12
    with pytest.raises(ValueError, match=r"text: .*length"):
        soup(a, {**b, "siglip2": {**b["siglip2"], "text": text}}, 0.5)


def test_share_outside_of_zero_to_one_is_refused(read):
    with pytest.raises(ValueError, match="--alpha is a share"):
        soup(*read, 1.5)


def test_soup_does_not_overwrite_what_it_is_made_of(two, capsys):
    with pytest.raises(SystemExit):
        main(["soup", *map(str, two), "--out", str(two[0])])
    assert "choose another --out" in capsys.readouterr().err
