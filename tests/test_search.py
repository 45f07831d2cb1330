"""`siglip2 search`: what a text or a picture finds in embeddings, best first, the same with FAISS as without."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

import siglip2
from siglip2.cli.main import main
from siglip2.search.index import nearest, open_index
from siglip2.testing.tiny import TinySource

TEXTS = ["a gold disc", "eine Kiste"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoint lies that the tests of this file share."""
    return tmp_path_factory.mktemp("search")


@pytest.fixture
def checkpoint(tiny_recipe, folder):
    path = folder / "step=2.ckpt"
    if not path.exists():
        short = ["--trainer.max_steps", "2", "--report", "false", "--model.warmup", "1"]
        main(["fit", *tiny_recipe, *short, "--trainer.default_root_dir", str(folder)])
    return path


@pytest.fixture
def embed(checkpoint):
    """Runs `siglip2 embed` on a data set."""

    def run(data, *more):
        use = ["--name", "toy", "--field", "caption=json.caption", "--accelerator", "cpu", "--num-workers", "0"]
        main(["embed", str(checkpoint), str(data), *use, "--precision", "fp32", *map(str, more)])

    return run


@pytest.fixture
def shards(toy_shards, tmp_path, embed):
    """The toy shards with embeddings beside them; the fourth picture of the first is broken."""
    from webdataset import TarWriter

    folder = tmp_path / "shards"
    shutil.copytree(toy_shards, folder)
    with open(folder / "00000.tar", "wb") as file, TarWriter(file) as tar:
        for i in range(8):
            record = TinySource().read(i).record
            tar.write({"__key__": f"{i:04d}", "png": b"broken" if i == 3 else record["png"], "json": record["json"]})
    embed(folder)
    return folder


@pytest.fixture
def searched(capsys):
    """Runs `siglip2 search --json` and returns what it printed, query by query."""

    def run(*arguments):
        capsys.readouterr()
        main(["search", *map(str, arguments), "--json", "--device", "cpu"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_texts_and_pictures_find_what_a_whole_product_finds(searched, shards, checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(TinySource().read(9).record["png"])
    found = searched(shards, *TEXTS, "--image", tmp_path / "a.png", "--k", "6")
    model, seen = siglip2.load(checkpoint, device="cpu"), [i for i in range(16) if i != 3]
    z_BE = model.encode_image([TinySource().read(i).record["png"] for i in seen])
    cosines = torch.cat([model.encode_text(TEXTS), model.encode_image(tmp_path / "a.png")]) @ z_BE.T
    assert [query["query"] for query in found] == [*TEXTS, str(tmp_path / "a.png")]
    for query, row in zip(found, cosines, strict=True):
        values, order = row.topk(6)
        assert [hit["cosine"] for hit in query["hits"]] == pytest.approx(values.tolist(), abs=1e-6)
        assert [hit["key"] for hit in query["hits"]] == [f"{seen[i]:04d}" for i in order]
        assert [hit["rank"] for hit in query["hits"]] == [1, 2, 3, 4, 5, 6]
    logit = found[0]["hits"][0]["cosine"] * model.model.logit_scale.exp() + model.model.logit_bias
    assert found[0]["hits"][0]["match"] == pytest.approx(logit.sigmoid().item(), rel=1e-4)
    assert found[2]["hits"][0]["key"] == "0009"
    assert found[2]["hits"][0]["match"] is None
    assert found[2]["hits"][0]["where"].endswith("00001.tar")


def test_small_blocks_find_the_same_and_a_broken_picture_is_never_found(shards):
    index = open_index(str(shards))
    query = torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    whole = index.search(query, 20)
    keys = [[hit.key for hit in hits] for hits in whole]
    assert [[hit.key for hit in hits] for hits in index.search(query, 20, block=3)] == keys
    assert [len(hits) for hits in whole] == [15, 15, 15]
    assert index.num_images == 15
    assert "0003" not in keys[0] + keys[1] + keys[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_faiss_and_multiplication_find_the_same(monkeypatch, dtype):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    rows, query = torch.randn(500, 32).to(dtype), torch.randn(4, 32)
    scores, found = nearest(query, rows, 7)
    monkeypatch.setitem(sys.modules, "faiss", None)
    expected_scores, expected = nearest(query, rows, 7)
    assert torch.equal(found, expected)
    assert torch.allclose(scores, expected_scores, atol=1e-4)
    assert torch.equal(found, (query.double() @ rows.double().T).topk(7).indices)


def test_page_holds_the_pictures_and_escapes_what_is_asked(searched, shards, tmp_path):
    query = "<b>gold</b> & disc"
    (found,) = searched(shards, query, "--k", "4", "--html", tmp_path / "out" / "page.html")
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 4
    assert "&lt;b&gt;gold&lt;/b&gt; &amp; disc: 4 pictures" in page
    assert re.findall(r">(\d{4})</span>", page) == [hit["key"] for hit in found["hits"]]
    assert "<script" not in page


def test_page_shows_a_hit_whose_shard_is_gone_without_its_picture(searched, shards, tmp_path):
    (shards / "00001.tar").unlink()
    searched(shards, "a gold disc", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 7
    assert page.count("not there any more") == 8


def test_folder_of_pictures_is_searched_where_it_lies(searched, embed, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(TinySource().read(i).record["png"])
    embed(tmp_path / "flat", "--only", "image")
    (found,) = searched(tmp_path / "flat", "--image", tmp_path / "flat" / "1.png", "--k", "2")
    assert found["hits"][0]["key"] == "1"
    assert found["hits"][0]["cosine"] == pytest.approx(1, abs=1e-5)


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["search", *map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().err


def test_damaged_file_of_embeddings_is_an_error_and_one_of_something_else_is_left_out(
    capsys, searched, shards, tmp_path
):
    save_file({"weight": torch.ones(3)}, shards / "model.safetensors")
    (found,) = searched(shards, "a", "--k", "16")
    assert len(found["hits"]) == 15
    (damaged,) = shards.glob("00001.tar.*.safetensors")
    whole = damaged.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (len(whole) - 1, header, header // 2, 4, 0):
        damaged.write_bytes(whole[:size])
        message = " ".join(refused(capsys, shards, "a").split())
        assert str(damaged) in message
        assert "write it again (`siglip2 embed` does" in message


def test_embed_writes_a_damaged_file_again(searched, shards, embed):
    (damaged,) = shards.glob("00001.tar.*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    embed(shards)
    (found,) = searched(shards, "a", "--k", "16")
    assert len(found["hits"]) == 15


def test_other_towers_than_those_that_embedded_are_refused(capsys, shards, checkpoint, tmp_path):
    changed = torch.load(checkpoint, weights_only=True)
    changed["state_dict"]["model.logit_bias"] += 1
    torch.save(changed, tmp_path / "other.ckpt")
    message = refused(capsys, shards, "a", "--ckpt_path", tmp_path / "other.ckpt")
    assert "other.ckpt is not the checkpoint that made these embeddings" in message


def test_search_without_query_name_or_embeddings_says_what_is_missing(capsys, shards, embed, tmp_path):
    assert "search needs a text or a picture" in refused(capsys, shards)
    assert "`siglip2 embed CKPT DATA --name NAME` writes them" in refused(capsys, tmp_path, "a")
    embed(shards, "--name", "second")
    assert "several names" in refused(capsys, shards, "a")
    main(["search", str(shards), "a", "--name", "second", "--device", "cpu", "--k", "1"])
    assert "cosine" in capsys.readouterr().out
