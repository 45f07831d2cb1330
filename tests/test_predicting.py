"""`siglip2 predict --out` and `--explain`, and released weights: many pictures in, a file or the terminal out."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import siglip2
from siglip2.cli.main import main
from siglip2.core.data.embedding_file import EmbeddingFile
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels
from siglip2.prediction import files
from siglip2.testing import tiny_model, tiny_tokenizer
from siglip2.testing.tiny import TinySource

TEXTS = ["a gold disc", "eine Kiste", "number 3"]


@pytest.fixture
def weights(tmp_path):
    """Tiny NaFlex weights in a folder of transformers."""
    state = {name: tensor.detach() for name, tensor in tiny_model(grid=(4, 4)).state_dict().items()}
    shapes = {"heads": {"vision": 2, "text": 2}, "native": True, "pixels": native_pixels(16, 4)}
    found = assemble("siglip2", state, place="test", tokenizer=tiny_tokenizer(), **shapes)
    return write(found, "hf", tmp_path / "weights", check=False).folder


@pytest.fixture
def pictures(tmp_path):
    """Five pictures in a folder, the third cut short."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        png = TinySource().read(i).record["png"]
        (folder / f"{i}.png").write_bytes(png[:80] if i == 2 else png)
    return folder


@pytest.fixture
def ran(weights, capsys):
    """Runs `siglip2 predict --json` with the weights and returns the lines it printed."""

    def run(*arguments):
        capsys.readouterr()
        main(["predict", "--ckpt_path", str(weights), "--device", "cpu", "--json", *map(str, arguments)])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def expected(weights, folder, numbers):
    """Embeddings, and the probabilities of all texts, of some pictures of a folder, by the API."""
    model = siglip2.load(weights, device="cpu")
    z_BE = model.encode_image([folder / f"{i}.png" for i in numbers])
    return z_BE.numpy(), model.probabilities(z_BE, model.encode_text(TEXTS)).numpy()


def test_array_has_a_row_for_every_picture_and_a_line_that_names_it(weights, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    out = tmp_path / "new" / "found.npy"
    asked = ["--images", str(pictures), "--texts", *TEXTS, "--out", str(out), "--batch-size", "2", "--num-workers", "0"]
    main(["predict", "--ckpt_path", str(weights), *asked, "--device", "cpu", "--json"])
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["pictures"], summary["skipped"]) == (4, 1)
    found, (_, matches) = np.load(out), expected(weights, pictures, [0, 1, 3, 4])
    assert np.isnan(found[2]).all()
    assert np.allclose(found[[0, 1, 3, 4]], matches, atol=1e-6)
    lines = [json.loads(line) for line in (out.parent / "found.npy.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [str(pictures / f"{i}.png") for i in range(5)]
    assert [line["text"] for line in lines] == [None if i == 2 else TEXTS[found[i].argmax()] for i in range(5)]
    assert [line["error"] is None for line in lines] == [True, True, False, True, True]
    assert f"skipped {pictures / '2.png'}" in printed.err
    assert sorted(p.name for p in out.parent.iterdir()) == ["found.npy", "found.npy.jsonl"]


def test_shards_without_texts_give_embeddings_from_loader_processes(ran, weights, toy_shards, tmp_path):
    ran("--images", toy_shards, "--out", tmp_path / "found.npy", "--batch-size", "5", "--num-workers", "2")
    model = siglip2.load(weights, device="cpu")
    z_BE = model.encode_image([TinySource().read(i).record["png"] for i in range(16)])
    assert np.allclose(np.load(tmp_path / "found.npy"), z_BE.numpy(), atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "found.npy.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{i:04d}" for i in range(16)]
    assert [line["where"].rpartition("/")[2] for line in lines] == ["00000.tar"] * 8 + ["00001.tar"] * 8


def test_rows_of_embed_give_the_probabilities_of_predict_shard_by_shard(ran, weights, toy_shards, tmp_path):
    ran("--images", toy_shards, "--texts", *TEXTS, "--out", tmp_path / "found.npy", "--num-workers", "0")
    main(["embed", str(weights), str(toy_shards), "--name", "x", "--only", "image", "--out", str(tmp_path / "z")])
    model = siglip2.load(weights, device="cpu")
    embedded = [EmbeddingFile(str(path)) for path in sorted((tmp_path / "z").glob("*.safetensors"))]
    rows = torch.cat([file.all_rows("image").float() for file in embedded])
    found = model.probabilities(rows, model.encode_labels(TEXTS))
    assert np.allclose(np.load(tmp_path / "found.npy"), found.numpy(), atol=1e-3)  # stored in half precision


@pytest.mark.parametrize("texts", [TEXTS, []], ids=["texts", "embeddings"])
def test_parquet_holds_the_same_in_columns(ran, weights, pictures, tmp_path, monkeypatch, texts):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "ROW_GROUP", 3)  # more than one group
    asked = ["--texts", *texts] if texts else []
    ran("--images", pictures, *asked, "--out", tmp_path / "a.parquet", "--batch-size", "2", "--num-workers", "0")
    table = parquet.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [str(pictures / f"{i}.png") for i in range(5)]
    assert [row["error"] is None for row in rows] == [True, True, False, True, True]
    values = [row["matches" if texts else "embedding"] for row in rows]
    assert values[2] is None
    found = np.array([value for value in values if value is not None], dtype=np.float32)
    assert np.allclose(found, expected(weights, pictures, [0, 1, 3, 4])[1 if texts else 0], atol=1e-6)
    about = json.loads(table.schema.metadata[b"siglip2"])
    assert about["texts"] == texts
    assert about["logit_bias"] == -2.0
    if texts:
        assert rows[0]["text"] == TEXTS[int(found[0].argmax())]
        assert rows[0]["match"] == pytest.approx(found[0].max())


def test_parquet_without_pyarrow_says_what_to_do(weights, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(weights), "--images", str(pictures), "--out", str(tmp_path / "a.parquet")])
    assert "pip install pyarrow" in capsys.readouterr().err


def test_file_of_an_earlier_run_stays_when_nothing_can_be_read(weights, pictures, tmp_path, capsys):
    for path in pictures.iterdir():
        path.write_bytes(b"no picture")
    (tmp_path / "found.npy").write_bytes(b"earlier")
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(weights), "--images", str(pictures), "--out", str(tmp_path / "found.npy")])
    assert "none of the 5 pictures" in capsys.readouterr().err
    assert (tmp_path / "found.npy").read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".writing-*"))


def test_released_weights_rank_on_the_terminal(ran, weights, pictures):
    (pictures / "2.png").unlink()
    printed = ran("--images", pictures, "--texts", *TEXTS)
    _, matches = expected(weights, pictures, [0, 1, 3, 4])
    for line, row in zip(printed, matches, strict=True):
        assert {t["text"]: t["match"] for t in line["texts"]} == pytest.approx(dict(zip(TEXTS, row, strict=True)))
        assert [t["text"] for t in line["texts"]] == [TEXTS[i] for i in (-row).argsort()]


def test_picture_that_cannot_be_read_is_named_and_left_out_on_the_terminal(weights, pictures, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    use = ["predict", "--ckpt_path", str(weights), "--images", str(pictures), "--device", "cpu"]
    main([*use, "--texts", *TEXTS, "--json"])
    printed = capsys.readouterr()
    _, matches = expected(weights, pictures, [0, 1, 3, 4])
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["image"] for line in lines] == [str(pictures / f"{i}.png") for i in (0, 1, 3, 4)]
    assert [line["texts"][0]["match"] for line in lines] == pytest.approx(matches.max(1))
    assert f"skipped: {pictures / '2.png'} cannot be read" in printed.err
    assert "1 of 5 pictures were skipped" in printed.err
    main([*use, "--explain"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_only_pictures_that_cannot_be_read_are_an_error_on_the_terminal(weights, pictures, capsys):
    use = ["predict", "--ckpt_path", str(weights), "--images", str(pictures / "2.png"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*use, "--texts", *TEXTS])
    assert ended.value.code == 2
    assert "none of the 1 pictures could be read" in capsys.readouterr().err


def test_folders_in_a_folder_are_read_but_for_hidden_ones(ran, weights, pictures, tmp_path):
    for name in ("b/c", ".hidden"):
        (pictures / name).mkdir(parents=True)
        shutil.copy(pictures / "0.png", pictures / name / "9.png")
    shutil.copy(pictures / "0.png", pictures / "b" / "._8.png")
    (pictures / "b" / "notes.txt").write_text("no picture")
    ran("--images", pictures, "--out", tmp_path / "found.npy", "--num-workers", "0")
    lines = [json.loads(line) for line in (tmp_path / "found.npy.jsonl").read_text().splitlines()]
    places = [str(pictures / place) for place in ("0.png", "1.png", "2.png", "3.png", "4.png", "b/c/9.png")]
    assert [line["key"] for line in lines] == places
    assert [line["image"] for line in ran("--images", pictures, "--texts", *TEXTS)] == [
        p for p in places if "2" not in p[-5:]
    ]


@pytest.mark.parametrize("size", ["0", "-1", "x"])
def test_batch_size_below_one_is_refused_before_anything_is_read(tmp_path, capsys, size):
    use = ["predict", "--ckpt_path", "none", "--images", "none", "--out", str(tmp_path / "z.npy")]
    with pytest.raises(SystemExit):
        main([*use, "--batch-size", size])
    assert f"argument --batch-size: '{size}' is no number of 1 or more" in capsys.readouterr().err


def test_checkpoint_of_ours_gives_the_same_in_a_file_as_on_the_terminal_and_leaves_out_what_is_no_picture(
    tiny_recipe, toy_shards, tmp_path, capsys
):
    short = ["--trainer.max_steps", "2", "--report", "false", "--model.warmup", "1"]
    main(["fit", *tiny_recipe, *short])
    picture = tmp_path / "a.png"
    picture.write_bytes(TinySource().read(3).record["png"])
    use = ["predict", "--ckpt_path", str(tmp_path / "step=2.ckpt"), "--images", str(picture), "--texts", *TEXTS]
    capsys.readouterr()
    main([*use, "--json"])
    terminal = {t["text"]: t["match"] for t in json.loads(capsys.readouterr().out)["texts"]}
    main([*use, "--out", str(tmp_path / "found.npy"), "--device", "cpu"])
    assert dict(zip(TEXTS, np.load(tmp_path / "found.npy")[0], strict=True)) == pytest.approx(terminal)
    folder = tmp_path / "[pictures]"
    (folder / "in it").mkdir(parents=True)
    shutil.copy(picture, folder / "in it" / "a*.png")
    (folder / "bad.png").write_bytes(b"no picture")
    use[use.index(str(picture))] = str(folder)
    capsys.readouterr()
    main([*use, "--json"])
    printed = capsys.readouterr()
    (line,) = [json.loads(line) for line in printed.out.splitlines()]
    assert line["image"] == str(folder / "in it" / "a*.png")
    assert {t["text"]: t["match"] for t in line["texts"]} == pytest.approx(terminal)
    assert "1 of 2 pictures were skipped" in " ".join(printed.err.split())


def test_explain_prints_the_grid_and_draws_it(weights, tmp_path, capsys):
    Image.new("RGB", (30, 120), (7, 8, 9)).save(tmp_path / "tall.png")
    use = ["predict", "--ckpt_path", str(weights), "--images", str(tmp_path / "tall.png"), "--device", "cpu"]
    main([*use, "--explain", str(tmp_path / "drawn")])
    assert "tall.png: 30 x 120 px -> 32 x 128 px" in capsys.readouterr().out
    with Image.open(tmp_path / "drawn" / "0000-tall.png") as drawn:
        assert drawn.size == (32, 128)
        assert drawn.getpixel((3, 3)) == (7, 8, 9)
        assert drawn.getpixel((16, 3)) == (255, 255, 255)


def test_pictures_and_shards_are_not_mixed(weights, pictures, toy_shards, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.npy"), "--images", str(pictures / "0.png"), f"{toy_shards}/00000.tar"]
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(weights), *out])
    assert "expected picture files, or shards and tables, found both" in capsys.readouterr().err


def test_end_of_a_shard_that_was_cut_off_costs_only_its_own_rows(ran, toy_shards, tmp_path):
    shards = shutil.copytree(toy_shards, tmp_path / "shards")
    ran("--images", shards, "--out", tmp_path / "whole.npy", "--num-workers", "0")
    with open(shards / "00000.tar", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    (summary,) = ran("--images", shards, "--out", tmp_path / "found.npy", "--num-workers", "0")
    whole, found = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "found.npy")
    assert 8 < len(found) == summary["pictures"] + summary["skipped"] < 16
    assert np.allclose(whole[-8:], found[-8:], atol=1e-6)
