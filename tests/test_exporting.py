"""`siglip2 export`: folders that appear whole, load without us, and say how near they are."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from siglip2.api import load
from siglip2.cli.exporting import export_to
from siglip2.cli.main import main
from siglip2.cli.training import fit
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.graphs import DESCRIPTION, image_inputs
from siglip2.core.interop.parity import random_inputs
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.testing import tiny_tokenizer


def small_weights(folder, *, native):
    """A folder with small random weights, as if somebody had released them."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.contract.length}
    small = ShapeOptions(width=48, depth=1, mlp_dim=82, num_heads=4)
    model = build_two_towers("tiny/16", patch_size=16, grid=(3, 3), vision=small, text=small, logit_bias=-2.0, **text)
    pixels = native_pixels(16, 3) if native else square_pixels(3 * 16 + 6, 16, filter="bicubic")
    heads = {"vision": 4, "text": 4}
    about = {"heads": heads, "native": native, "pixels": pixels, "tokenizer": tokenizer}
    weights = assemble("siglip2", model.state_dict(), place="test", **about)
    return write(weights, "big_vision", folder, check=False).folder


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "naflex"])
def released(request, tmp_path_factory):
    """Weights of either kind."""
    return small_weights(tmp_path_factory.mktemp("released") / "released", native=request.param)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """Weights for pictures squashed to squares."""
    return small_weights(tmp_path_factory.mktemp("square") / "square", native=False)


@pytest.fixture(scope="module")
def quick_checkpoint(toy_shards, toy_tokenizer, tmp_path_factory):
    """A checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("run")
    options = {"data.train.path": toy_shards, "data.tokenizer": toy_tokenizer, "trainer.default_root_dir": folder}
    fit(["--config", "tests/tiny.yaml", "--report=false", *(f"--{name}={value}" for name, value in options.items())])
    return folder / "step=10.ckpt"


def parity_of(printed):
    """The numbers of the line of parity, the last that is printed."""
    last = printed.strip().splitlines()[-1]
    assert last.startswith("parity: ")
    return [float(number) for number in re.findall(r" (\d\.\de[+-]\d\d)", last)]


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_graphs_answer_as_our_towers_for_any_batch_and_length(released, format, tmp_path, capsys):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    out = tmp_path / "out"
    main(["export", str(released), "--to", format, "--out", str(out)])
    numbers = parity_of(capsys.readouterr().out)
    assert len(numbers) == 3
    assert max(numbers) <= 1e-5
    assert str(tmp_path / "out") in (out / "README.md").read_text()
    assert not list(tmp_path.glob(".out*"))

    weights = read_weights(str(released))
    inputs, towers = random_inputs(weights), weights.towers()
    with torch.no_grad():
        z_image = towers.encode_image(inputs.images).embedding
        z_text = towers.encode_text(inputs.ids).embedding
    said = json.loads((out / DESCRIPTION).read_text())
    assert said["temperature"] == pytest.approx(10.0)
    assert said["bias"] == -2.0
    assert (said["text_contract"], said["pixel_contract"]) == (weights.tokenizer.contract.to_dict(), weights.pixels)
    for name, given, expected in (
        ("image", image_inputs(inputs), z_image),
        ("text", {"input_ids": inputs.ids}, z_text),
    ):
        assert set(said[name]["inputs"]) == set(given)
        one = {key: value[-1:] for key, value in given.items()}  # a batch of one, in a process without us
        if "spatial_shapes" in one:  # without its padding, so of a length that no other input has
            count = int(one["spatial_shapes"].prod())
            one |= {key: one[key][:, :count] for key in ("pixel_values", "pixel_attention_mask")}
        np.savez(tmp_path / f"{name}.npz", **{key: value.numpy() for key, value in one.items()})
        found = run_alone(out / said[name]["file"], tmp_path / f"{name}.npz", format)
        np.testing.assert_allclose(found, expected[-1:].numpy(), atol=1e-5, rtol=0)


ALONE = """
import sys, numpy, warnings
sys.modules["siglip2"] = None
graph, given, answer, format = sys.argv[1:]
given = dict(numpy.load(given))
if format == "onnx":
    import onnxruntime
    found = onnxruntime.InferenceSession(graph).run(None, given)[0]
else:
    import torch
    found = torch.export.load(graph).module()(**{k: torch.from_numpy(v) for k, v in given.items()}).detach().numpy()
numpy.save(answer, found)
"""


def run_alone(graph, given, format):
    """What a graph answers in a process that cannot import this package."""
    answer = given.with_suffix(".npy")
    subprocess.run([sys.executable, "-c", ALONE, str(graph), str(given), str(answer), format], check=True)
    return np.load(answer)


def test_openclip_loads_from_the_final_folder_and_not_from_where_it_was_written(square, tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip")
    out = tmp_path / "out"
    main(["export", str(square), "--to", "open_clip", "--out", str(out)])
    printed = capsys.readouterr().out
    assert max(parity_of(printed)[:2]) <= 1e-5
    assert "warning: open_clip will not load this folder from another place" in printed
    model = open_clip.create_model(f"local-dir:{out}").eval()  # its configuration names trunk/ by its whole path
    weights = read_weights(str(square))
    ids = random_inputs(weights).ids
    with torch.no_grad():
        found = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
        torch.testing.assert_close(found, weights.towers().encode_text(ids).embedding, atol=1e-5, rtol=0)


def test_checkpoint_of_ours_is_exported_without_its_plugins(quick_checkpoint, tmp_path, capsys):
    main(["export", str(quick_checkpoint), "--to", "hf", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert max(parity_of(printed)) <= 1e-5
    before, after = (read_weights(str(path)) for path in (quick_checkpoint, tmp_path / "out"))
    assert all(torch.equal(tensor, after.state[name]) for name, tensor in before.state.items())


@pytest.mark.parametrize("command", [["export", "--to", "hf"], ["export", "--to", "onnx"], ["doctor"]])
def test_tower_of_timm_is_neither_exported_nor_doctored_and_the_error_says_what_to_do(
    quick_checkpoint, tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setenv("COLUMNS", "1000")
    checkpoint = read_checkpoint(str(quick_checkpoint))
    checkpoint["siglip2"]["recipe"]["model"]["timm"] = "vit_tiny_patch16_224"
    torch.save(checkpoint, tmp_path / "timm.ckpt")
    out = ["--out", str(tmp_path / "out")] if command[0] == "export" else []
    with pytest.raises(SystemExit):
        main([command[0], str(tmp_path / "timm.ckpt"), *command[1:], *out])
    said = capsys.readouterr().err
    assert (
        "a vision tower of timm's own (vit_tiny_patch16_224), and only SigLIP towers can be exported or doctored"
        in said
    )
    assert "siglip2.load, predict and embed take it as it is" in said
    assert "timm.create_model('vit_tiny_patch16_224', num_classes=0)" in said
    assert not (tmp_path / "out").exists()


def test_taken_folder_is_refused_and_an_earlier_export_replaced_only_when_asked(square, tmp_path):
    out = tmp_path / "out"
    export_to(str(square), "big_vision", out, check=False)
    with pytest.raises(ValueError, match="is taken.*--overwrite"):
        export_to(str(square), "timm", out, check=False)
    assert (out / "model.npz").is_file()
    export_to(str(square), "timm", out, overwrite=True, check=False)
    assert not (out / "model.npz").exists()
    assert (out / "model.safetensors").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="no earlier export"):
        export_to(str(square), "timm", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_vision_tower_alone_is_one_graph(square, tmp_path, capsys):
    trunk = export_to(str(square), "timm", tmp_path / "trunk", check=False).folder
    main(["export", str(trunk), "--to", "torch_export", "--out", str(tmp_path / "out")])
    (number,) = parity_of(capsys.readouterr().out)
    assert number <= 1e-5
    assert not (tmp_path / "out" / "text.pt2").exists()
    assert set(json.loads((tmp_path / "out" / DESCRIPTION).read_text())) == {"image", "text_contract", "pixel_contract"}


def test_failed_export_leaves_the_earlier_one_and_nothing_else(square, tmp_path):
    out = tmp_path / "out"
    export_to(str(square), "timm", out, check=False)
    trunk = export_to(str(out), "timm", tmp_path / "trunk", check=False).folder
    with pytest.raises(ValueError, match="vision tower alone"):
        export_to(str(trunk), "hf", out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "trunk"]


def test_onnx_without_its_writers_says_what_to_install(square, tmp_path, monkeypatch):
    monkeypatch.setattr("siglip2.core.interop.onnx.WRITERS", ("onnx_that_nobody_has",))
    with pytest.raises(ValueError, match="pip install onnx_that_nobody_has"):
        export_to(str(square), "onnx", tmp_path / "out")


def test_run_with_the_exact_gelu_keeps_it_in_checkpoint_model_graph_and_export(tiny_recipe, tmp_path):
    exact = [f"--model.{tower}.gelu=exact" for tower in ("vision", "text")]
    fit([*tiny_recipe, "--report=false", "--trainer.max_steps=5", *exact])
    path = str(tmp_path / "step=5.ckpt")
    weights = read_weights(path)
    assert weights.gelus == {"vision": "exact", "text": "exact"}
    inputs, model = random_inputs(weights), load(path, "cpu").model
    expected = weights.towers().encode_text(inputs.ids).embedding
    tanh = replace(weights, text=replace(weights.text, gelu="tanh")).towers().encode_text(inputs.ids).embedding
    found = model.encode_text(inputs.ids).embedding
    assert (found - expected).abs().max() < 1e-6
    assert (found - tanh).abs().max() > 1e-5
    for format in ("hf", "torch_export"):
        done = export_to(path, format, tmp_path / format)
        assert done.parity.largest <= 1e-5
    assert read_weights(str(tmp_path / "hf")).gelus == weights.gelus
