"""`siglip2 doctor` finds what other libraries do otherwise, and its costs are those of the libraries themselves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.api import load
from siglip2.cli.doctor import odd_inputs
from siglip2.cli.main import main
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.libraries import ALONE, BARE, EXACT, TANH, Way, altogether, embed_images, embed_texts, habits, our_way
from siglip2.testing import tiny_tokenizer

TEXTS = ["A red disc", "two discs", ""]


def released(folder, *, native=False, filter="bilinear", gelus=None):
    """A folder of transformers with small random weights."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.contract.length}
    small = ShapeOptions(width=48, depth=2, mlp_dim=82, num_heads=4)
    model = build_two_towers("tiny/16", patch_size=16, grid=(3, 3), vision=small, text=small, **text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pixels = native_pixels(16, 3) if native else square_pixels(48, 16, filter=filter)
    about = {"heads": {"vision": 4, "text": 4}, "native": native, "gelus": gelus}
    about |= {"pixels": pixels, "tokenizer": tokenizer}
    return str(write(assemble("siglip2", model.state_dict(), place="test", **about), "hf", folder, check=False).folder)


def report(path, capsys, *more):
    main(["doctor", path, "--json", *more])
    return json.loads(capsys.readouterr().out)


def named(found):
    return {(line["library"], line["part"]): line for line in found["differences"]}


def test_resize_that_a_library_shares_is_no_difference_and_another_one_costs(tmp_path, capsys):
    found = named(report(released(tmp_path / "bicubic", filter="bicubic"), capsys))
    assert ("open_clip", "resize") not in found
    for library in ("transformers", "big_vision"):
        assert found[library, "resize"]["ours"] == "bicubic, antialiased, 48 px"
        assert found[library, "resize"]["cosine"]["worst"] < 0.9999
    found = named(report(released(tmp_path / "bilinear"), capsys))
    assert ("transformers", "resize") not in found
    assert found["big_vision", "resize"]["theirs"] == "bilinear, not antialiased, 48 px"
    assert found["open_clip", "GELU of the image tower"]["theirs"] == EXACT


def test_exact_gelu_is_a_difference_to_those_that_have_the_tanh_approximation(tmp_path, capsys):
    found = report(released(tmp_path / "exact", gelus={"vision": "exact", "text": "tanh"}), capsys)
    for library in ("transformers", "big_vision"):
        line = named(found)[library, "GELU of the image tower"]
        assert (line["ours"], line["theirs"]) == (EXACT, TANH)
        assert 0.99 < line["cosine"]["worst"] < 1
        assert line["cosine"]["changed"] == 1
    same = {(line["library"], line["part"]) for line in found["same"]}
    assert ("open_clip", "GELU of the image tower") in same  # timm's default is the exact one, too
    assert ("transformers", "GELU of the text tower") in same


def test_naflex_pictures_are_made_alike_by_transformers_and_its_bare_tokenizer_is_named(tmp_path, capsys):
    found = report(released(tmp_path / "naflex", native=True), capsys)
    assert ("transformers", "resize") in {(line["library"], line["part"]) for line in found["same"]}
    assert ("big_vision", "positions, one column") in {(line["library"], line["part"]) for line in found["same"]}
    assert ("transformers", "positions, one column") in named(found)
    padding = named(found)["transformers", "padding and EOS"]
    assert (padding["theirs"], padding["usual"]) == (BARE, False)
    assert padding["cosine"]["worst"] < 0.999


def test_cost_on_given_pictures_is_that_of_these_pictures_alone(tmp_path, capsys):
    path = released(tmp_path / "weights")
    for number, value in enumerate((10, 200)):  # one grey: nothing that a resize could change
        Image.new("RGB", (90, 70), (value,) * 3).save(tmp_path / f"{number}.png")
    smooth = named(report(path, capsys, "--sample", str(tmp_path / "0.png"), str(tmp_path / "1.png")))
    assert smooth["big_vision", "resize"]["cosine"]["worst"] > 1 - 1e-6
    assert smooth["big_vision", "resize"]["cosine"]["changed"] == 0
    odd = named(report(path, capsys))
    assert odd["big_vision", "resize"]["cosine"]["worst"] < 0.9999


def test_table_names_every_difference(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    path = released(tmp_path / "weights")
    main(["doctor", path])
    printed = capsys.readouterr().out
    model = load(path, packed=False)
    for habit in habits(model, read_weights(path)):
        if habit.differs:
            assert habit.part in printed
            assert habit.theirs in printed
    assert "transformers, the same: GELU of the image tower" in printed


def test_narrow_terminal_folds_values_instead_of_cutting_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["doctor", released(tmp_path / "weights")])
    table = capsys.readouterr().out.partition("┘")[0]
    assert "…" not in table
    rows = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│")]
    column = "".join(cells[3].strip() for cells in rows).replace(" ", "")
    assert "bilinear,notantialiased,48px" in column


def test_sample_of_no_pictures_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "none", "--samples", "0"])
    assert "argument --samples: '0' is no number of 1 or more" in capsys.readouterr().err


def test_one_column_of_patches_and_transparency_are_what_transformers_does_otherwise(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = released(tmp_path / "weights", native=True)
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    model = load(path, "cpu", packed=False)
    rng = np.random.default_rng(0)
    pictures = {
        "square": Image.fromarray(rng.integers(0, 256, (40, 44, 3), np.uint8)),
        "row": Image.fromarray(rng.integers(0, 256, (8, 100, 3), np.uint8)),
        "column": Image.fromarray(rng.integers(0, 256, (100, 8, 3), np.uint8)),
        "transparent": Image.new("RGBA", (40, 44), (250, 0, 0, 0)),
    }
    with torch.no_grad():
        made = processor(images=list(pictures.values()), max_num_patches=9, return_tensors="pt")
        vectors_BE = torch.nn.functional.normalize(theirs.get_image_features(**made).pooler_output, dim=-1)
    far = dict(
        zip(pictures, (model.encode_image(list(pictures.values())) - vectors_BE).abs().amax(-1).tolist(), strict=True)
    )
    assert max(far["square"], far["row"]) < 1e-5
    assert min(far["column"], far["transparent"]) > 1e-3
    white = model.encode_image(Image.new("RGB", (40, 44), (255, 255, 255)))
    torch.testing.assert_close(white[0], vectors_BE[3], atol=1e-5, rtol=0)
    parts = {
        habit.part for habit in habits(model, read_weights(path)) if habit.library == "transformers" and habit.differs
    }
    assert {"positions, one column", "transparency"} <= parts


@pytest.fixture
def loaded(tmp_path):
    """Folder, model and its own way."""
    path = released(tmp_path / "weights")
    model = load(path, "cpu", packed=False)
    return path, model, our_way(model, read_weights(path))


def test_exact_gelu_is_what_transformers_computes_with_gelu_in_its_configuration(loaded):
    transformers = pytest.importorskip("transformers")
    path, model, ours = loaded
    config = transformers.AutoConfig.from_pretrained(path)
    for tower in (config.vision_config, config.text_config):
        tower.hidden_act = "gelu"
    theirs = transformers.AutoModel.from_pretrained(path, config=config).eval()
    exact = replace(ours, exact=frozenset({"vision", "text"}))
    before = embed_texts(model, ours, TEXTS)
    found = embed_texts(model, exact, TEXTS)
    with torch.no_grad():
        pooled = theirs.text_model(model.tokenizer.encode(TEXTS)).pooler_output
        expected = torch.nn.functional.normalize(pooled, dim=-1)
        pixels = torch.stack([torch.from_numpy(p[:48, :48].copy()) for p in odd_inputs().pictures[:3]])
        values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        images = torch.nn.functional.normalize(theirs.vision_model(values).pooler_output, dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embed_images(model, exact, list(pixels.numpy())), images, atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 2e-5
    assert torch.equal(embed_texts(model, ours, TEXTS), before)  # and the towers are as they were


def test_way_with_the_tanh_gelu_is_taken_by_towers_that_have_the_exact_one(loaded, tmp_path):
    _, tanh_model, tanh = loaded
    path = released(tmp_path / "exact", gelus={"vision": "exact", "text": "exact"})
    model = load(path, "cpu", packed=False)
    ours = our_way(model, read_weights(path))
    assert ours.exact == {"vision", "text"}
    expected = embed_texts(tanh_model, tanh, TEXTS)
    assert torch.equal(embed_texts(model, replace(ours, exact=frozenset()), TEXTS), expected)
    assert (embed_texts(model, ours, TEXTS) - expected).abs().max() > 2e-5
    towers = altogether("transformers", "text", habits(model, read_weights(path)), ours)
    assert towers.exact == {"vision"}


@pytest.mark.parametrize("rows", [ALONE, BARE])
def test_odd_rows_are_embedded_as_transformers_does(loaded, rows):
    transformers = pytest.importorskip("transformers")
    path, model, ours = loaded
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    contract, text = ours.contract, TEXTS[0]
    ids = model.tokenizer.ids(text)
    if rows == ALONE:
        row, mask = torch.tensor([[*ids, contract.eos_id]]), None
    else:
        missing = contract.length - len(ids)
        row = torch.tensor([[contract.pad_id] * missing + ids])
        mask = torch.tensor([[0] * missing + [1] * len(ids)])
    with torch.no_grad():
        pooled = theirs.text_model(row, attention_mask=mask).pooler_output
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(embed_texts(model, replace(ours, rows=rows), [text]), expected, atol=1e-5, rtol=0)


def test_own_way_is_what_the_model_answers(loaded):
    _, model, ours = loaded
    pictures = odd_inputs().pictures
    assert isinstance(ours, Way)
    torch.testing.assert_close(embed_texts(model, ours, TEXTS), model.encode_text(TEXTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(embed_images(model, ours, pictures), model.encode_image(pictures), atol=1e-6, rtol=0)
    assert np.isfinite(embed_texts(model, replace(ours, rows=BARE), TEXTS).numpy()).all()
