"""Embeddings beside shards: those the model makes, found by sample and caption, and refused where they do not fit."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from dataclasses import replace

import fsspec
import pytest
import torch
from safetensors import safe_open
from toy_samples import picture
from webdataset import TarWriter

from siglip2.core.batch import Patches
from siglip2.core.data import storage
from siglip2.core.data.embed_shards import Job, describe_encoder, embed_shards
from siglip2.core.data.embedding_file import DTYPES, EmbeddingFile, sidecar_path
from siglip2.core.data.embeddings import CachedReference, CachedView, EmbeddingStore
from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.data.index_shards import index_shards
from siglip2.core.data.loader import EvalBatches, Maker, Shares, TrainBatches
from siglip2.core.data.mixture import JoinedSource
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.core.data.text import Tokenizer
from siglip2.core.views import CAPTION, IMAGE, TextView
from siglip2.plugins.naflex import NaFlex
from siglip2.testing import TinySource, tiny_module, tiny_tokenizer

# D dimension

MODULE = tiny_module([])
OTHER = tiny_module([], seed=1)
FIELDS = Fields(caption="json.caption", extra={"short": "txt"})
CAPTIONS = ("caption", "short")


@torch.no_grad()
def encode(inputs, module=MODULE):
    towers = module.model
    return (towers.encode_image(inputs) if isinstance(inputs, Patches) else towers.encode_text(inputs)).embedding


def job(data, module=MODULE, *, fields=FIELDS, **more):
    """What `siglip2 embed` makes of its arguments."""
    source = data if hasattr(data, "read") else open_source(str(data), fields=fields)
    encoder = describe_encoder(
        module.model, module.tokenizer, module.patchifier, checkpoint="tiny.ckpt", compute="fp32"
    )
    more = {"captions": CAPTIONS, "batch_size": 3, **more}
    return Job(source, module.patchifier, module.tokenizer, encoder, "t", **more)


def embed(data, module=MODULE, *, overwrite=False, num_workers=0, **more):
    """Embeds what is missing; returns the shards that were."""
    made = job(data, module, **more)
    due = made.due(made.shards(), overwrite=overwrite)
    assert embed_shards(made, due, lambda x: encode(x, module), num_workers=num_workers) == {}
    return [shard.where for shard in due]


@pytest.fixture
def shards(toy_shards, tmp_path):
    """The toy shards in a folder of their own."""
    shutil.copytree(toy_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors", "*.weights"))
    return tmp_path / "shards"


def maker(source, shares=None):
    return Maker(source, MODULE.patchifier, MODULE.tokenizer, seed=5, shares={"": shares or Shares()})


def row(source, i, *views, position=0, shares=None):
    """Views of sample i as a loader worker makes them, by name."""
    layout = MODULE.patchifier.layout(0)
    return maker(source, shares).row(i, position=position, views=views, layout=layout).views


# Round trip


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_what_the_module_embeds_rounded_to_the_stored_precision(shards, dtype):
    embed(shards, dtype=dtype)
    source, store = open_source(str(shards), fields=FIELDS), EmbeddingStore("t")
    views = (IMAGE, *(TextView(f"caption:{code}", language=code) for code in ("en", "de")))
    batch = EvalBatches(maker(source), views, batch_size=16)[0]
    with torch.no_grad():
        expected = MODULE.embed(batch)
    bound = torch.finfo(DTYPES[dtype]).eps / 2 + 2e-6  # relative; batches of another size round otherwise
    for i, key in enumerate(batch.keys):
        for code in ("en", "de"):
            found = store.rows(source.read(i).where, key, batch.views[f"caption:{code}"][i])
            for x_D, name in zip(found, ("image", f"caption:{code}"), strict=True):
                assert x_D.dtype == DTYPES[dtype]
                assert (x_D.float() - expected[name][i]).abs().max() <= bound * expected[name][i].abs().max()


def test_every_caption_of_every_field_and_language_has_its_own_row(shards):
    embed(shards)
    head = EmbeddingFile(f"{shards}/00000.tar.t.safetensors").head
    assert head.num_texts == 8 * 2  # the field `short` repeats the English caption, which is embedded once
    source, store = open_source(str(shards), fields=FIELDS), EmbeddingStore("t")
    sample = source.read(3)
    texts = [text for name in CAPTIONS for texts in sample.captions(name).values() for text in texts]
    found = [store.rows(sample.where, sample.key, MODULE.tokenizer(text))[1] for text in texts]
    assert len(texts) == 3
    for text, x_D in zip(texts, found, strict=True):
        expected_D = encode(MODULE.tokenizer.encode([text]))[0]
        torch.testing.assert_close(x_D.float(), expected_D, rtol=0, atol=1e-3)
        assert (expected_D - encode(MODULE.tokenizer.encode(["a gold box"]))[0]).abs().max() > 5e-3


def test_file_is_read_alike_by_the_safetensors_library(shards):
    embed(shards, dtype="bfloat16")
    path = f"{shards}/00001.tar.t.safetensors"
    ours = EmbeddingFile(path)
    with safe_open(path, "pt") as theirs:
        assert torch.equal(theirs.get_tensor("image"), ours.all_rows("image"))
        assert torch.equal(theirs.get_tensor("text"), ours.all_rows("text"))
        assert json.loads(theirs.metadata()["siglip2_embeddings"])["encoder"]["digest"] == ours.head.encoder.digest
    assert ours.keys == [f"{i:04d}" for i in range(8, 16)]
    assert ours.head.encoder.logit_bias == -2.0


def test_workers_and_batch_size_change_no_row_but_by_rounding(shards, tmp_path):
    embed(shards, folder=str(tmp_path), num_workers=2)
    embed(shards, batch_size=8)
    for number in range(2):
        a = EmbeddingFile(f"{tmp_path}/0000{number}.tar.t.safetensors")
        b = EmbeddingFile(f"{shards}/0000{number}.tar.t.safetensors")
        for name in ("image", "text"):
            torch.testing.assert_close(a.all_rows(name), b.all_rows(name), rtol=1e-3, atol=1e-6)


def test_pictures_at_their_own_aspect_ratio_have_the_rows_of_the_evaluation_layout(shards):
    module = tiny_module([NaFlex(seq_lens=[4, 9], patch_size=16)])
    embed(shards, module, dtype="float32")
    source, layout = open_source(str(shards), fields=FIELDS), module.patchifier.eval_layout(1)
    for i in (0, 5, 15):
        sample = source.read(i)
        expected = encode(module.patchifier(sample.image(), IMAGE, layout), module)[0]
        found = EmbeddingStore("t").file(sample.where).image(sample.key)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# The view


@pytest.mark.parametrize(
    "shares", [Shares(), Shares({"en": 0.7, "de": 0.3}), Shares({"en": 0.2, "de": 0.8}, {"caption": 0.6, "short": 0.4})]
)
def test_view_gives_the_row_of_the_caption_that_is_drawn_at_each_position(shards, shares):
    embed(shards, dtype="float32")
    source, drawn, view = open_source(str(shards), fields=FIELDS), set(), CachedView(EmbeddingStore("t"))
    for position in range(120):
        made = row(source, position % 16, IMAGE, CAPTION, view, position=position, shares=shares)
        drawn.add((position % 16, tuple(made["caption"][0].tolist())))
        assert made["cached"].shape == (1, 128)
        expected = torch.cat([encode(made["image"]), encode(made["caption"])], dim=1)
        torch.testing.assert_close(made["cached"], expected, rtol=0, atol=1e-6)
    assert len(drawn) > 28  # nearly both captions of all 16 samples


def test_view_follows_a_caption_view_of_one_language(shards):
    embed(shards, dtype="float32")
    source, german = open_source(str(shards), fields=FIELDS), TextView("german", language="de")
    for position in range(16):
        made = row(source, position, german, CachedView(EmbeddingStore("t"), caption=german), position=position)
        torch.testing.assert_close(made["cached"][:, 64:], encode(made["german"]), rtol=0, atol=1e-6)


def test_view_is_frozen_equal_and_the_same_in_loader_workers(shards):
    embed(shards)
    source, view = open_source(str(shards), fields=FIELDS), CachedView(EmbeddingStore("t"))
    here = EvalBatches(maker(source), (CAPTION, view), batch_size=4)
    rows = [here[i].views["cached"] for i in range(4)]  # opens files, which must not travel
    copy = pickle.loads(pickle.dumps(view))
    assert copy == view
    assert hash(copy) == hash(view)
    there = EvalBatches(maker(source), (CAPTION, copy), batch_size=4)
    loader = torch.utils.data.DataLoader(there, batch_size=None, num_workers=2)
    assert all(torch.equal(a, b.views["cached"]) for a, b in zip(rows, loader, strict=True))
    assert MODULE.embed(here[0])["cached"] is not None  # passes through evaluation as it is


# What cannot be embedded


def test_broken_picture_and_missing_caption_are_listed_and_make_bad_samples(tmp_path):
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "a", "jpg": picture(1), "txt": "a red disc"})
        tar.write({"__key__": "b", "jpg": b"no picture", "txt": "a blue disc"})
        tar.write({"__key__": "c", "jpg": picture(2), "txt": " "})
    embed(tmp_path, fields=Fields(), captions=("caption",))
    file = EmbeddingFile(f"{tmp_path}/0.tar.t.safetensors")
    assert [row for row, _ in file.failures] == [1, 2]
    assert "caption is blank" in file.failures[1][1]
    assert file.all_rows("image").isnan().any(1).tolist() == [False, True, False]
    assert (file.head.num_images, file.head.num_texts) == (2, 2)
    source, view = open_source(str(tmp_path)), CachedView(EmbeddingStore("t"))
    assert row(source, 0, view)["cached"].isfinite().all()
    with pytest.raises(BadSample, match=r"sample 'b'.*picture could not be embedded: .*image"):
        row(source, 1, view)
    with pytest.raises(BadSample, match="sample 'c'.*caption is blank"):
        row(source, 2, view)


def test_caption_that_cannot_be_read_is_listed_and_the_other_field_is_embedded(tmp_path):
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
        tar.write({"__key__": "a", "jpg": picture(1), "txt": b"\xff\xfe"})
        tar.write({"__key__": "b", "jpg": picture(2), "json": b"{"})
        tar.write({"__key__": "c", "jpg": picture(3), "txt": b"\xff", "json": b'{"alt": "a red disc"}'})
    fields = Fields(extra={"alt": "json.alt"})
    embed(tmp_path, fields=fields, captions=("caption", "alt"))
    file = EmbeddingFile(f"{tmp_path}/0.tar.t.safetensors")
    assert [row for row, _ in file.failures] == [0, 1]
    assert "'txt' is not UTF-8 text" in file.failures[0][1]
    assert "'json' is not JSON" in file.failures[1][1]
    assert (file.head.num_images, file.head.num_texts) == (3, 1)
    source, view = open_source(str(tmp_path), fields=fields), CachedView(EmbeddingStore("t"))
    both = Shares(captions={"caption": 0.5, "alt": 0.5})
    assert row(source, 2, view, shares=both)["cached"].isfinite().all()


def test_caption_that_was_not_embedded_makes_a_bad_sample(shards):
    embed(shards, captions=("short",))
    source, view = open_source(str(shards), fields=FIELDS), CachedView(EmbeddingStore("t"))
    with pytest.raises(BadSample, match=r"none of its embedded captions has these ids; fields .*'short': 'txt'"):
        row(source, 0, view, shares=Shares({"de": 1.0}))


def test_picture_that_is_found_under_two_captions_has_both(tmp_path):
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(picture(100 * number))
    (tmp_path / "set.csv").write_text("filepath,title\na.jpg,a red disc\nb.jpg,a gold box\na.jpg,a blue box\n")
    embed(tmp_path / "set.csv", fields=Fields(), captions=("caption",), dtype="float32")
    source, view = open_source(str(tmp_path / "set.csv")), CachedView(EmbeddingStore("t"))
    for i in range(3):
        made = row(source, i, IMAGE, CAPTION, view)
        expected = torch.cat([encode(made["image"]), encode(made["caption"])], dim=1)
        torch.testing.assert_close(made["cached"], expected, rtol=0, atol=1e-6)
    text = (tmp_path / "set.csv").read_text()
    (tmp_path / "set.csv").write_text(text.replace("red", "big"))
    with pytest.raises(ValueError, match=r"set.csv: stale, .*: its content is another"):
        view.check(open_source(str(tmp_path / "set.csv")), MODULE.tokenizer)


def test_folder_keeps_its_embeddings_hidden_and_notices_another_picture(classes):
    embed(classes, fields=Fields(), captions=("caption",))
    source = open_source(str(classes))
    assert os.path.isfile(sidecar_path(str(classes), "t"))
    assert len(source) == 4
    store = EmbeddingStore("t")
    store.check(source, MODULE.tokenizer)
    assert row(source, 3, CachedView(store))["cached"].isfinite().all()
    (classes / "dog" / "notes.weights").write_bytes(b"not read")
    store.check(source, MODULE.tokenizer)
    (classes / "dog" / "x.JPG").write_bytes(picture(200))  # as many bytes, perhaps: the label stays
    (classes / "dog" / "y.txt").write_text("another dog called y")
    with pytest.raises(ValueError, match="set: stale, the shard changed since"):
        store.check(open_source(str(classes)), MODULE.tokenizer)


def test_training_takes_another_sample_for_one_that_was_not_embedded(tmp_path):
    with open(tmp_path / "0.tar", "wb") as file, TarWriter(file) as tar:
        for number in range(8):
            content = b"no picture" if number == 2 else picture(30 * number)
            tar.write({"__key__": f"{number}", "jpg": content, "txt": f"a red disc, number {number}"})
    embed(tmp_path, fields=Fields(), captions=("caption",), dtype="float32")
    source, view = open_source(str(tmp_path)), CachedView(EmbeddingStore("t"))
    batches = TrainBatches(maker(source), Order([8], 5), ((0.0, (CAPTION, view)),), max_batches=1)
    batch = batches[0]
    assert [fault.key for fault in batch.faults] == ["2"]
    assert "2" not in batch.keys
    torch.testing.assert_close(batch.views["cached"][:, 64:], encode(batch.views["caption"]), rtol=0, atol=1e-6)


# Resuming


def test_only_what_is_missing_is_embedded_and_an_older_shard_again(shards):
    first, second = f"{shards}/00000.tar", f"{shards}/00001.tar"
    assert embed(shards) == [first, second]
    assert embed(shards) == []
    os.truncate(f"{second}.t.safetensors", 900)
    assert embed(shards) == [second]
    rewrite(first)
    assert embed(shards) == [first]
    assert embed(shards, dtype="float32") == [first, second]


def rewrite(shard, *, other=None, mtime=0):
    """Writes the first shard again; `other` gives samples another key, by number."""
    source = TinySource()
    with open(shard, "wb") as file, TarWriter(file, mtime=mtime) as tar:
        for number in range(8):
            sample = source.read(number)
            parts = {"png": sample.record["png"], "txt": "x", "json": json.loads(sample.record["json"])}
            tar.write({"__key__": (other or {}).get(number, sample.key), **parts})


def test_killed_run_leaves_whole_files_only_and_the_next_one_ends_as_if_it_had_not_been(shards, tmp_path, monkeypatch):
    embed(shards, folder=str(tmp_path / "shards"))
    whole = {f"0000{i}.tar": (shards / f"0000{i}.tar.t.safetensors").read_bytes() for i in range(2)}
    for path in shards.glob("*.safetensors"):
        path.unlink()

    def die():
        torch.set_num_threads(1)
        rename = os.replace

        def killed_at_the_second(source, target):
            if "00001.tar.t" in target:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        monkeypatch.setattr(storage.os, "replace", killed_at_the_second)
        embed(shards, folder=str(shards))

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in shards.glob("*.safetensors")] == ["00000.tar.t.safetensors"]
    assert embed(shards, folder=str(shards)) == [f"{shards}/00001.tar"]
    assert {name: (shards / f"{name}.t.safetensors").read_bytes() for name in whole} == whole


def test_parts_share_the_shards_without_one_left_or_done_twice(shards):
    made = job(f"{shards}::{shards}/00000.tar")
    assert [[s.where for s in made.shards((i, 2))] for i in range(2)] == [
        [f"{shards}/00000.tar"],
        [f"{shards}/00001.tar"],
    ]
    assert [s.first for s in made.shards()] == [0, 8]


def test_checkpoints_are_not_mixed_under_one_name(shards):
    embed(shards)
    with pytest.raises(ValueError, match=r"(?s)'t' of another checkpoint.*00000.tar.t.safetensors.*--overwrite"):
        embed(shards, OTHER)
    os.unlink(f"{shards}/00001.tar.t.safetensors")
    assert embed(shards, OTHER, overwrite=True) == [f"{shards}/00000.tar", f"{shards}/00001.tar"]
    assert embed(shards, OTHER) == []


def test_digest_is_that_of_the_weights_and_contracts_not_of_the_file():
    of = {"checkpoint": "a", "compute": "fp32"}
    one = describe_encoder(MODULE.model, MODULE.tokenizer, MODULE.patchifier, **of)
    again = describe_encoder(MODULE.model, MODULE.tokenizer, MODULE.patchifier, **{**of, "checkpoint": "b"})
    assert one.digest == again.digest
    others = [
        describe_encoder(OTHER.model, MODULE.tokenizer, MODULE.patchifier, **of),
        describe_encoder(MODULE.model, tiny_tokenizer(8), MODULE.patchifier, **of),
        describe_encoder(MODULE.model, MODULE.tokenizer, replace(MODULE.patchifier, antialias=False), **of),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_two_shards_of_one_name_are_not_written_to_one_file(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "more")
    both = f"{shards}::{tmp_path}/more"
    with pytest.raises(ValueError, match=r"shards/00000.tar and .*more/00000.tar would share one file"):
        job(both, folder=str(tmp_path)).shards()
    embed(shards, folder=str(tmp_path))
    assert embed(tmp_path / "more", folder=str(tmp_path)) == []  # the same shards, copied to another place
    rewrite(f"{tmp_path}/more/00000.tar")
    with pytest.raises(ValueError, match=r"holds the embeddings of .*shards/00000.tar, not of .*more/00000.tar"):
        embed(tmp_path / "more", folder=str(tmp_path))


# The check before step 0


def refusal(data, tokenizer=None, **options):
    source = data if hasattr(data, "read") else open_source(str(data), fields=FIELDS)
    with pytest.raises(ValueError) as refused:
        EmbeddingStore("t", **options).check(source, tokenizer or MODULE.tokenizer)
    return str(refused.value)


def test_check_passes_what_was_just_embedded_also_where_it_was_moved_to(shards, tmp_path):
    embed(shards)
    moved = shards.rename(tmp_path / "moved")
    head = EmbeddingStore("t").check(open_source(str(moved), fields=FIELDS), MODULE.tokenizer)
    assert (head.encoder.checkpoint, head.encoder.dim) == ("tiny.ckpt", 64)


def test_check_names_shards_without_embeddings_and_the_command(shards):
    message = refusal(shards)
    assert f"00000.tar: no embeddings at {shards}/00000.tar.t.safetensors" in message
    assert (
        f"`siglip2 embed CHECKPOINT {shards} --name t --field caption=json.caption` embeds what is missing" in message
    )
    embed(shards)
    os.unlink(f"{shards}/00001.tar.t.safetensors")
    message = refusal(shards)
    assert "00000.tar:" not in message
    assert "00001.tar: no embeddings" in message
    assert f"siglip2 embed tiny.ckpt {shards}" in message


def test_check_says_what_changed_of_a_stale_shard(shards):
    embed(shards)
    rewrite(shards / "00000.tar", mtime=1)  # without `cls`
    message = refusal(shards)
    assert "00000.tar: stale, the shard changed since: it has" in message
    assert "00001.tar" not in message
    embed(shards)
    rewrite(shards / "00000.tar", mtime=2)
    assert "00000.tar: stale, the shard changed since: its first or last file is another" in refusal(shards)


def test_check_finds_another_key_between_the_first_and_the_last_of_a_shard(shards):
    rewrite(shards / "00000.tar")
    embed(shards)
    rewrite(shards / "00000.tar", other={3: "0x03"})
    os.unlink(shards / "00000.tar.index")
    assert "00000.tar: stale, sample '0x03' was '0003'" in refusal(shards)


def test_check_refuses_half_of_the_embeddings_and_those_of_two_checkpoints(shards):
    embed(shards, images=False)
    assert "00000.tar: only captions were embedded" in refusal(shards)
    embed(shards)
    mine = (shards / "00000.tar.t.safetensors").read_bytes()
    embed(shards, OTHER, overwrite=True)
    (shards / "00000.tar.t.safetensors").write_bytes(mine)
    assert "were not all made by one checkpoint in one precision" in refusal(shards)
    assert "--overwrite` makes them so" in refusal(shards)


def test_check_lists_how_the_text_contracts_differ(shards):
    embed(shards)
    tokenizer = MODULE.tokenizer
    assert "length: 8 here, 16 there" in refusal(shards, tiny_tokenizer(8))
    cased = Tokenizer(f"{tokenizer.file}\n", replace(tokenizer.contract, canonicalize=True))
    message = refusal(shards, cased)
    assert "vocabulary: sha256" in message
    assert "canonicalize: True here, False there" in message


def test_check_and_view_work_on_joined_sources(shards, tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(50))
    (tmp_path / "set.csv").write_text("filepath,title\na.jpg,a red disc\n")
    embed(shards, dtype="float32")
    sources = {"tars": open_source(str(shards), fields=FIELDS), "table": open_source(str(tmp_path / "set.csv"))}
    joined = JoinedSource(sources)
    assert "set.csv: no embeddings" in refusal(joined)
    embed(tmp_path / "set.csv", fields=Fields(), captions=("caption",), dtype="float32")
    store = EmbeddingStore("t")
    store.check(joined, MODULE.tokenizer)
    for i in (0, 15, 16):
        made = row(joined, i, IMAGE, CAPTION, CachedView(store))
        expected = torch.cat([encode(made["image"]), encode(made["caption"])], dim=1)
        torch.testing.assert_close(made["cached"], expected, rtol=0, atol=1e-6)


def test_check_refuses_the_pictures_of_another_field(shards, tmp_path):
    embed(shards)
    other = open_source(str(shards), fields=replace(FIELDS, image="jpg"))
    message = refusal(other)
    assert "00000.tar: the pictures of field image 'jpg;jpeg;png;webp' were embedded, the run reads 'jpg'" in message
    assert "--field image=jpg --field caption=json.caption --field short=txt --captions caption short`" in message
    spaced = open_source(str(shards), fields=replace(FIELDS, image="jpg | jpeg | png | webp"))
    EmbeddingStore("t").check(spaced, MODULE.tokenizer)
    (tmp_path / "a.jpg").write_bytes(picture(50))
    (tmp_path / "set.csv").write_text("filepath,cropped,title\na.jpg,a.jpg,a red disc\n")
    embed(tmp_path / "set.csv", fields=Fields(), captions=("caption",))
    named, cropped = (open_source(str(tmp_path / "set.csv"), fields=Fields(image=x)) for x in ("filepath", "cropped"))
    EmbeddingStore("t").check(JoinedSource({"tars": spaced, "table": named}), MODULE.tokenizer)
    message = refusal(JoinedSource({"tars": spaced, "table": cropped}))
    assert "set.csv: the pictures of field image 'filepath' were embedded, the run reads 'cropped'" in message
    assert "00000.tar" not in message


# The reference


def test_reference_of_another_checkpoint_than_the_rows_is_refused(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "elsewhere")
    embed(shards)
    embed(tmp_path / "elsewhere", OTHER)
    source = open_source(str(shards), fields=FIELDS)
    view = CachedReference(f"{tmp_path}/elsewhere/t").view()
    with pytest.raises(ValueError) as refused:
        view.check(source, MODULE.tokenizer)
    mine, other = (EmbeddingFile(f"{folder}/00000.tar.t.safetensors") for folder in (shards, tmp_path / "elsewhere"))
    message = str(refused.value)
    assert f"are those of tiny.ckpt ({mine.head.encoder.digest}), float16" in message
    assert f"of tiny.ckpt ({other.head.encoder.digest}), float16. Give {mine.path} in place of" in message
    CachedReference(mine.path).view().check(source, MODULE.tokenizer)
    embed(tmp_path / "elsewhere", overwrite=True, dtype="float32")
    with pytest.raises(ValueError, match="float16; temperature, bias and width .*, float32"):
        CachedReference(f"{tmp_path}/elsewhere/t").view().check(source, MODULE.tokenizer)


def test_reference_in_one_damaged_file_says_that_it_is_damaged(shards):
    embed(shards)
    whole, cut = f"{shards}/00000.tar.t.safetensors", f"{shards}/00001.tar.t.safetensors"
    os.truncate(cut, os.path.getsize(cut) - 1)
    assert CachedReference(f"{shards}/t").head.shard == f"{shards}/00000.tar"
    os.unlink(whole)
    with pytest.raises(ValueError, match=r"00001.tar.t.safetensors is cut short or damaged"):
        CachedReference(f"{shards}/t")
    os.truncate(cut, 100)
    with pytest.raises(ValueError, match=r"00001.tar.t.safetensors holds no embeddings of version 1"):
        CachedReference(f"{shards}/t")


def test_reference_is_found_by_folder_and_name_and_has_temperature_and_bias(shards, tmp_path):
    embed(shards)
    out = tmp_path / "out"
    out.mkdir()
    embed(shards, folder=str(out))
    source = open_source(str(shards), fields=FIELDS)
    for place in (f"{shards}/t", f"{shards}/00001.tar.t.safetensors", f"{out}/t"):
        reference = CachedReference(place)
        assert reference.logit_scale == pytest.approx(2.302585092994046)
        assert (reference.logit_bias, reference.dim) == (-2.0, 64)
        reference.view().check(source, MODULE.tokenizer)
        batch = EvalBatches(maker(source), (IMAGE, reference.view()), batch_size=16)[0]
        z_image_BD, z_text_BD = reference.split(batch.views["cached"])
        torch.testing.assert_close(z_image_BD, encode(batch.views["image"]), rtol=0, atol=1e-3)
        torch.testing.assert_close(z_text_BD.norm(dim=1), torch.ones(16), rtol=0, atol=1e-6)
    assert CachedReference(f"{out}/t").store.folder == str(out)
    shutil.copy(f"{out}/00000.tar.t.safetensors", f"{out}/00000.tar.a.u.safetensors")
    with pytest.raises(FileNotFoundError, match="no embeddings called 'u' in .*out"):
        CachedReference(f"{out}/u")
    with pytest.raises(FileNotFoundError, match=r"no embeddings called 'u' in .*shards; .*shards holds 00000.tar"):
        CachedReference(f"{shards}/u")


# Remote


@pytest.fixture
def bucket(shards):
    """The toy shards behind a URL, indexed."""
    system = fsspec.filesystem("memory")
    system.put(str(shards), "/embedded", recursive=True)
    index_shards("memory://embedded/")
    yield "memory://embedded"
    system.rm("/embedded", recursive=True)


def test_remote_shards_are_embedded_and_read_by_ranges_or_from_a_copy(bucket, tmp_path):
    assert len(embed(bucket, dtype="float32")) == 2
    assert embed(bucket, dtype="float32") == []
    source = open_source(bucket, fields=FIELDS)
    assert CachedReference(f"{bucket}/t").logit_bias == -2.0
    for cache in (None, str(tmp_path / "cache")):
        store = EmbeddingStore("t", cache_dir=cache)
        store.check(source, MODULE.tokenizer)
        for i in range(16):
            made = row(source, i, IMAGE, CAPTION, CachedView(store), position=i)
            expected = torch.cat([encode(made["image"]), encode(made["caption"])], dim=1)
            torch.testing.assert_close(made["cached"], expected, rtol=0, atol=1e-6)
    copies = [p.name for p in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(name.partition("-")[2] for name in copies) == ["00000.tar.t.safetensors", "00001.tar.t.safetensors"]


def test_copy_of_older_embeddings_is_not_taken_for_the_new_ones(bucket, tmp_path):
    embed(bucket, dtype="float32")
    source, fresh = open_source(bucket, fields=FIELDS), lambda: EmbeddingStore("t", cache_dir=str(tmp_path / "cache"))
    before = row(source, 0, CachedView(fresh()))["cached"]
    embed(bucket, OTHER, overwrite=True, dtype="float32")
    after = row(source, 0, CachedView(fresh()))["cached"]
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after[:, :64], encode(row(source, 0, IMAGE)["image"], OTHER), rtol=0, atol=1e-6)
