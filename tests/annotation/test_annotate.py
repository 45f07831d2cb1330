"""Shards are written again with boxes and nothing else changed; the emoji world's truth comes back as it was."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.annotation.detector import plain
from siglip2.annotation.queries import GENERIC_WORDS
from siglip2.annotation.settings import Settings
from siglip2.annotation.walk import annotate
from siglip2.cli.main import main
from siglip2.core.data.fields import Fields
from siglip2.core.data.index_shards import index_shards
from siglip2.core.data.loader import Maker, join
from siglip2.core.data.tar_source import TarSource
from siglip2.core.regions import regions
from siglip2.emoji_world import write_emoji_world
from siglip2.plugins.locca import LocCa
from siglip2.testing import tiny_module
from siglip2.testing.tiny import PATCHIFIER

FIELDS = Fields(caption="json.captions")
TRUTH = Settings(caption="json.captions")
TEXT = Settings(caption="txt|json.caption")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three shards of sixteen scenes in two languages."""
    out = tmp_path_factory.mktemp("world")
    small = {"num_emoji": 24, "unseen": 0, "size": 48, "samples_per_shard": 16}
    write_emoji_world(out, scenes=40, singles=8, val=1, languages=("en", "de"), **small)
    return out / "train"


@pytest.fixture(scope="module")
def annotated(world, tmp_path_factory):
    """The world annotated by its truth in one go, and what was said about it."""
    out = tmp_path_factory.mktemp("annotated") / "out"
    return out, annotate(str(world), str(out), TRUTH)


def contents(shard):
    """Name -> content of each member of a tar, in order."""
    with tarfile.open(shard) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def files(folder):
    """What a run wrote, without the indexes that readers leave."""
    written = [path for path in folder.iterdir() if path.name != "sizes.json" and path.suffix != ".index"]
    return {path.name: path.read_bytes() for path in written}


def picture(colour=0):
    stored = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), colour, dtype=np.uint8)).save(stored, "PNG")
    return stored.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def meta(text="red apple", **more):
    return json.dumps({"regions": [{"box": [0.1, 0.2, 0.5, 0.6], "caption": text}], **more}).encode()


def test_the_truth_of_an_emoji_world_comes_back(world, annotated):
    out, summary = annotated
    named = 0
    for shard in sorted(world.glob("*.tar")):
        before, after = contents(shard), contents(out / shard.name)
        assert list(after) == list(before)
        for name in before:
            if not name.endswith(".json"):
                assert after[name] == before[name]
                continue
            old, new = json.loads(before[name]), json.loads(after[name])
            names = {tuple(region["box"]): region["captions"]["en"] for region in old.pop("regions")}
            expected = {box: plain(text) for box, text in names.items() if not GENERIC_WORDS & set(text.split())}
            found = new.pop("regions")
            assert {tuple(region["box"]): plain(region["captions"]["en"]) for region in found} == expected
            assert all(region["score"] == 1.0 and region["query"] == "ngram" for region in found)
            assert new == old
            named += len(expected)
    assert named > 100
    assert summary.counts["kept"] == summary.counts["boxes"] == named
    assert summary.counts["samples"] == summary.counts["images"] == summary.counts["regions_replaced"] == 48
    assert summary.counts["captions_skipped_de"] == 48
    assert summary.faults == ()


def test_annotated_shards_are_indexed_read_and_trained_on(annotated):
    out, _ = annotated
    assert index_shards(str(out)).num_samples == 48
    source = TarSource(str(out), fields=FIELDS)
    module = tiny_module([LocCa(depth=1, length=48)])
    module.wake_due(0.0)
    maker = Maker(source, PATCHIFIER, module.tokenizer, seed=0)
    views = module.views_at(0.0)
    rows = [maker.row(i, position=i, views=views, layout=PATCHIFIER.layout(0)) for i in range(4)]
    batch = join(rows, size=4, index=0)
    refer_4T = batch.views["locca"].reshape(3, 4, 2, -1)[1, :, 0]  # copies-major: the second task
    for i in range(4):
        found = {f"{next(iter(r.captions.values()))[0]} : {numbers(r.box)}" for r in regions(source.read(i))}
        assert module.tokenizer.decode(refer_4T[i].tolist()).removeprefix("aref: ") in found
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(3):
        losses.append(sum(module(batch, 0.0).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert any(bool(p.grad.any()) for p in module.model.vision.parameters() if p.grad is not None)


def numbers(box):
    """A box in bins of 500 as locca writes it."""
    return "[" + ", ".join(f"{round(edge * 500)}" for edge in box) + "]"


def test_a_second_run_does_nothing_and_says_the_same(world, annotated, monkeypatch):
    out, first = annotated
    before = files(out)
    monkeypatch.setattr(Settings, "open_detector", None)  # would raise
    again = annotate(str(world), str(out), TRUTH)
    assert (again.counts, again.num_done_before) == (first.counts, 3)
    assert files(out) == before


KILLED = """
import os, signal, sys
from siglip2.annotation.settings import Settings
from siglip2.annotation.walk import annotate

def kill(at):
    if at.samples == 24:  # the second shard is half written
        os.kill(os.getpid(), signal.SIGKILL)

annotate(sys.argv[1], sys.argv[2], Settings(caption="json.captions"), progress=kill)
"""


def test_a_run_killed_in_the_middle_of_a_shard_ends_with_the_same_bytes(world, annotated, tmp_path):
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, str(world), str(out)], check=False)
    assert died.returncode == -signal.SIGKILL
    left = files(out)
    assert set(left) == {"000000.tar", "000000.tar.annotated", ".000001.tar.part", "annotate.json"}
    again = annotate(str(world), str(out), TRUTH)
    assert again.num_done_before == 1
    assert files(out) == files(annotated[0])


def test_two_workers_write_what_one_does_also_after_one_was_killed(world, annotated, tmp_path):
    out = str(tmp_path / "out")

    def kill(at):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with status -9"):
        annotate(str(world), out, TRUTH, workers=2, progress=kill)
    assert multiprocessing.active_children() == []
    annotate(str(world), out, TRUTH, workers=2)
    assert multiprocessing.active_children() == []
    assert files(tmp_path / "out") == files(annotated[0])


@pytest.mark.slow
def test_an_error_in_a_worker_names_its_shard(world, tmp_path):
    shards = [str(world / "000000.tar"), str(tmp_path / "packed.tar")]
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(1024))
    with pytest.raises(ValueError, match="is compressed") as error:
        annotate(shards, str(tmp_path / "out"), TRUTH, workers=2)
    assert error.value.__notes__ == [f"while annotating {shards[1]}"]


def test_other_settings_are_refused_and_named(world, annotated):
    out, _ = annotated
    before = files(out)
    with pytest.raises(ValueError, match=r"was annotated with threshold=0.3 \(asked for: 0.5\); choose another"):
        annotate(str(world), str(out), Settings(caption="json.captions", threshold=0.5))
    with pytest.raises(ValueError, match="annotated with categories="):
        annotate(str(world), str(out), Settings(caption="json.captions", categories=("cat",)))
    assert files(out) == before


def test_batches_of_another_size_are_no_other_settings(world, annotated):
    again = annotate(str(world), str(annotated[0]), Settings(caption="json.captions", batch_size=3))
    assert again.num_done_before == 3


def test_a_shard_that_changed_and_one_that_was_lost_are_made_anew(world, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for shard in world.glob("*.tar"):
        (data / shard.name).write_bytes(shard.read_bytes())
    annotate(str(data), str(out), TRUTH)
    write_tar(data / "000001.tar", {"a.png": picture(), "a.json": meta(captions={"en": "red apple"})})
    (out / "000002.tar").unlink()
    again = annotate(str(data), str(out), TRUTH)
    assert (again.num_done_before, again.counts["samples"]) == (1, 33)
    assert list(contents(out / "000001.tar")) == ["a.png", "a.json"]
    assert (out / "000002.tar").exists()


def test_a_folder_with_other_things_is_not_written_to(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt but no annotate\.json; choose a new or empty folder"):
        annotate(str(world), str(tmp_path), TRUTH)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_shards_are_not_written_over_themselves_or_one_another(world, tmp_path):
    with pytest.raises(ValueError, match="would be written over itself"):
        annotate(str(world), f"{world}/", TRUTH)
    write_tar(tmp_path / "000000.tar", {"a.png": picture()})
    with pytest.raises(ValueError, match="would both become"):
        annotate([str(world), str(tmp_path)], str(tmp_path / "out"), TRUTH)
    assert not (tmp_path / "out").exists()


def test_a_wrong_field_name_is_an_error_before_anything_is_written(world, tmp_path):
    with pytest.raises(ValueError, match=r"no caption under 'txt'; it has .*json\.captions.*name the field with --cap"):
        annotate(str(world), str(tmp_path / "out"), Settings(caption="txt"))
    with pytest.raises(ValueError, match="no image under 'webp'"):
        annotate(str(world), str(tmp_path / "out"), Settings(caption="json.captions", image="webp"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_shard_is_an_error_before_anything_is_written(world, tmp_path):
    out, table = str(tmp_path / "out"), tmp_path / "t.csv"
    table.write_text("filepath,title\na.jpg,one\n" * 40)
    with pytest.raises(ValueError, match=r"t\.csv is no tar shard"):
        annotate([str(world), str(table)], out, TRUTH)
    table.rename(tmp_path / "t.tar")
    with pytest.raises(ValueError, match=r"t\.tar has no sample \(t\.tar: no tar header at byte 0"):
        annotate(str(tmp_path / "t.tar"), out, TRUTH)
    with pytest.raises(ValueError, match=r"empty\.tar has no sample: expected a tar"):
        annotate(str(write_tar(tmp_path / "empty.tar", {})), out, TRUTH)
    assert not (tmp_path / "out").exists()


def test_samples_that_cannot_be_read_are_copied_counted_and_named(tmp_path):
    members = {
        "good.png": picture(),
        "good.txt": b"a red apple",
        "good.json": meta(),
        "torn.png": picture()[:40],
        "torn.txt": b"a red apple",
        "torn.json": meta(),
        "list.png": picture(),
        "list.txt": b"a red apple",
        "list.json": b"[1]",
        "broken.png": picture(),
        "broken.txt": b"a red apple",
        "broken.json": b'{"regions": [',
    }
    shard = write_tar(tmp_path / "0.tar", members)
    made = annotate(str(shard), str(tmp_path / "out"), TEXT)
    after = contents(tmp_path / "out" / "0.tar")
    assert {name: after[name] for name in members if name != "good.json"} == {
        name: content for name, content in members.items() if name != "good.json"
    }
    assert list(after) == list(members)
    assert (made.counts["samples"], made.counts["unreadable"], made.counts["kept"]) == (4, 3, 1)
    assert [fault.split("'")[1] for fault in made.faults] == ["torn", "list", "broken"]
    assert made.faults[1].endswith("'json' holds a list, expected a mapping that regions can be added to")


def test_a_sample_without_json_gets_one_and_one_without_caption_gets_no_regions(tmp_path):
    members = {"a.png": picture(), "a.txt": b"a red apple", "b.png": picture(1), "b.json": meta(n=1), "b.txt": b" "}
    made = annotate(str(write_tar(tmp_path / "0.tar", members)), str(tmp_path / "out"), TEXT)
    after = contents(tmp_path / "out" / "0.tar")
    assert list(after) == ["a.png", "a.txt", "a.json", "b.png", "b.json", "b.txt"]
    assert json.loads(after["a.json"]) == {"regions": []}
    assert json.loads(after["b.json"]) == {"regions": [], "n": 1}
    counted = {name: made.counts[name] for name in ("without_caption", "without_queries", "images", "unreadable")}
    assert counted == {"without_caption": 1, "without_queries": 1, "images": 1, "unreadable": 0}


def test_the_rest_of_a_json_keeps_its_order_its_numbers_and_its_scripts(tmp_path):
    stored = b'{"z":1e-3,"n":12345678901234567890,"t":"\xc3\xa9 \xf0\x9f\x90\xb1","half":"\\ud83d","a":null}'
    members = {"a.png": picture(), "a.txt": b"a red apple", "a.json": stored}
    annotate(str(write_tar(tmp_path / "0.tar", members)), str(tmp_path / "out"), TEXT)
    after = json.loads(contents(tmp_path / "out" / "0.tar")["a.json"])
    assert after.pop("regions") == []
    assert list(after.items()) == list(json.loads(stored).items())


def test_keys_and_texts_of_any_script_come_through(tmp_path):
    key = "bilder/" + "ä猫" * 60  # longer than a tar header has room for
    members = {
        f"{key}.png": picture(),
        f"{key}.json": meta("🐱 猫", captions={"": "ein 🐱 猫, Grün"}),
        f"{key}.seg.png": b"as it is",
    }
    annotate(str(write_tar(tmp_path / "0.tar", members)), str(tmp_path / "out"), TRUTH)
    after = contents(tmp_path / "out" / "0.tar")
    assert list(after) == list(members)
    assert after[f"{key}.seg.png"] == b"as it is"
    assert json.loads(after[f"{key}.json"])["regions"] == [
        {"box": [0.1, 0.2, 0.5, 0.6], "captions": {"": "🐱 猫,"}, "score": 1.0, "query": "ngram"}
    ]
    sample = TarSource(str(tmp_path / "out"), fields=FIELDS).read(0)
    assert (sample.key, [region.captions for region in regions(sample)]) == (key, [{"": ["🐱 猫,"]}])


def test_only_the_languages_that_are_asked_for_are_queried(tmp_path):
    captions = {"de": ["roter Apfel", "Apfel"], "en": "red apple", "": "an apple"}
    members = {"a.png": picture(), "a.json": meta("Apfel", captions=captions)}
    shard = str(write_tar(tmp_path / "0.tar", members))
    english = annotate(shard, str(tmp_path / "en"), Settings(caption="json.captions", languages=("en",)))
    assert (english.counts["kept"], english.counts["queries_ngram"]) == (0, 3)
    assert (english.counts["captions_skipped_de"], english.counts["captions_skipped_none"]) == (2, 1)
    german = annotate(shard, str(tmp_path / "de"), Settings(caption="json.captions", languages=("de",)))
    found = json.loads(contents(tmp_path / "de" / "0.tar")["a.json"])["regions"]
    assert [region["captions"] for region in found] == [{"de": "apfel"}]
    assert german.counts["captions_skipped_en"] == 1


def test_categories_are_asked_of_every_picture_with_their_factor(tmp_path):
    entries = [{"box": [0, 0, 0.5, 0.5], "caption": name, "score": 0.8} for name in ("dog", "cat", "bus")]
    members = {
        "a.png": picture(),
        "a.json": json.dumps({"captions": {"en": "a dog"}, "regions": entries}).encode(),
        "b.png": picture(),
        "b.json": json.dumps({"captions": {"de": "ein Hund"}, "regions": entries}).encode(),
    }
    settings = Settings(caption="json.captions", categories=("cat", "dog"), category_factor=0.5, category_language="")
    made = annotate(str(write_tar(tmp_path / "0.tar", members)), str(tmp_path / "out"), settings)
    after = contents(tmp_path / "out" / "0.tar")
    found = [[(*r["captions"].items(), r["score"], r["query"]) for r in json.loads(after[k])["regions"]] for k in
             ("a.json", "b.json")]  # fmt: skip
    assert found == [
        [(("en", "dog"), 0.8, "ngram"), (("", "cat"), 0.4, "category")],
        [(("", "dog"), 0.4, "category"), (("", "cat"), 0.4, "category")],
    ]
    assert (made.counts["queries_ngram"], made.counts["queries_category"]) == (2, 3)
    assert (made.counts["kept_ngram"], made.counts["kept_category"]) == (1, 3)


def test_of_a_damaged_shard_the_whole_samples_are_kept_and_the_damage_is_named(world, tmp_path):
    whole = (world / "000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    made = annotate(str(tmp_path / "cut.tar"), str(tmp_path / "out"), TRUTH)
    assert 0 < made.counts["samples"] < 16
    assert made.counts["damaged_shards"] == 1
    assert "cut.tar: cut at byte" in made.faults[0]
    assert index_shards(str(tmp_path / "out")).damaged == ()


def test_shards_behind_urls_are_read_and_written(world, annotated):
    memory = fsspec.filesystem("memory")
    for shard in world.glob("*.tar"):
        memory.pipe_file(f"/world/{shard.name}", shard.read_bytes())
    try:
        annotate("memory://world/{000000..000002}.tar", "memory://made/", TRUTH)
        again = annotate("memory://world/*.tar", "memory://made", TRUTH)
        assert again.num_done_before == 3
        for shard in world.glob("*.tar"):
            assert memory.cat_file(f"/made/{shard.name}") == (annotated[0] / shard.name).read_bytes()
    finally:
        memory.rm("/", recursive=True)


def test_the_command_prints_what_was_kept_and_why_the_rest_was_not(world, tmp_path, capsys):
    words = ["annotate", str(world), "--out", str(tmp_path / "out"), "--detector", "truth"]
    main([*words, "--caption", "json.captions", "--languages", "de", "none"])
    printed = capsys.readouterr().out
    assert "3 shards" in printed
    assert "captions skipped: en" in printed
    stored = json.loads((tmp_path / "out" / "annotate.json").read_text())
    assert stored["settings"]["languages"] == ["de", ""]
    assert f"│ {stored['counts']['kept']} │" in printed
    with pytest.raises(SystemExit) as status:
        main([*words, "--caption", "json.captions"])
    assert status.value.code == 2
    assert "was annotated with languages=['de', ''] (asked for: ['en', ''])" in capsys.readouterr().err
