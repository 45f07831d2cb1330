"""A written world repeats byte for byte, keeps held-out emoji out of training, and marks its planted noise."""

import argparse
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglip2.emoji_world.command import add_arguments, run
from siglip2.emoji_world.plan import WorldOptions, plan_train
from siglip2.emoji_world.write import SPLITS, write_emoji_world

LANGUAGES = ("en", "ru", "zh")
SMALL = {"scenes": 60, "singles": 90, "val": 20, "num_emoji": 30, "unseen": 6, "languages": LANGUAGES}


def write(out: Path, **changes) -> dict:
    return write_emoji_world(out, **({**SMALL, "samples_per_shard": 64} | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(folder: Path) -> dict[str, dict]:
    """Samples of a split by key, in order; each holds "jpg", "mask.png" as bytes and "json" parsed."""
    found: dict[str, dict] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, extension = member.name.split(".", 1)
                data = archive.extractfile(member).read()
                found.setdefault(key, {})[extension] = json.loads(data) if extension == "json" else data
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "world"
    write(out)
    return out


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "noisy"
    write(out, wrong_captions=0.2, duplicates=0.1)
    return samples(out / "train")


def test_same_options_give_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    write(tmp_path / "again")
    write(tmp_path / "other", seed=1)
    first, again, other = files(world), files(tmp_path / "again"), files(tmp_path / "other")
    assert first == again
    assert first["classes.json"] == other["classes.json"]
    assert first["train/000000.tar"] != other["train/000000.tar"]


def test_a_world_holds_the_promised_files(world):
    names = {name for name in files(world) if not name.endswith(".tar")}
    assert names == {"README.md", "classes.json", "unseen-classes.json", "world.json"}
    assert [len(samples(world / split)) for split in SPLITS] == [150, 20, 20, 20]
    assert [path.name for path in sorted((world / "train").iterdir())] == ["000000.tar", "000001.tar", "000002.tar"]
    assert json.loads((world / "world.json").read_text())["counts"]["train"] == 150


def test_singles_and_scenes_are_mixed_evenly(world):
    kinds = [sample["json"]["kind"] for sample in samples(world / "train").values()]
    assert kinds.count("scene") == 60
    assert all(kinds[start : start + 10].count("scene") == 4 for start in range(0, 150, 10))


def test_held_out_emoji_never_occur_in_training(world):
    unseen = {row["id"] for row in json.loads((world / "unseen-classes.json").read_text())["classes"]}
    assert len(unseen) == 6
    for split in ("train", "val-single", "val-scene"):
        assert not unseen & {emoji for sample in samples(world / split).values() for emoji in sample["json"]["emoji"]}
    assert {sample["json"]["emoji"][0] for sample in samples(world / "unseen").values()} == unseen


def test_labels_and_captions_agree_with_the_class_names(world):
    for split, table in (("train", "classes"), ("val-single", "classes"), ("unseen", "unseen-classes")):
        classes = json.loads((world / f"{table}.json").read_text(encoding="utf-8"))
        assert classes["languages"] == list(LANGUAGES)
        for sample in samples(world / split).values():
            record = sample["json"]
            assert set(record["captions"]) == set(LANGUAGES)
            for region in record["regions"]:
                row = classes["classes"][region["label"]]
                assert (row["id"], row["names"]) == (region["emoji"], region["captions"])
            if record["kind"] == "single":
                assert classes["classes"][record["label"]]["names"] == record["captions"]
            else:
                assert "label" not in record


def test_class_names_are_unique_in_every_language(world):
    rows = [json.loads((world / name).read_text())["classes"] for name in ("classes.json", "unseen-classes.json")]
    for language in LANGUAGES:
        names = [row["names"][language] for table in rows for row in table]
        assert len(set(names)) == len(names) == 36


def test_encoded_pictures_masks_and_boxes_belong_together(world):
    for sample in samples(world / "val-scene").values():
        record = sample["json"]
        image, mask = (Image.open(io.BytesIO(sample[name])) for name in ("jpg", "mask.png"))
        assert image.size == mask.size == (record["width"], record["height"])
        pixels = np.asarray(mask)
        for k, region in enumerate(record["regions"], start=1):
            xmin, ymin, xmax, ymax = region["box"]
            rows, columns = np.nonzero(pixels == k)
            assert (columns.min(), columns.max() + 1) == (round(xmin * mask.width), round(xmax * mask.width))
            assert (rows.min(), rows.max() + 1) == (round(ymin * mask.height), round(ymax * mask.height))


def test_wrong_captions_have_the_asked_rate_and_come_from_the_named_sample(noisy):
    wrong = {key: sample["json"] for key, sample in noisy.items() if "wrong_caption" in sample["json"]}
    assert len(wrong) == 30
    clean = {key: sample["json"] for key, sample in noisy.items() if key not in wrong}
    for record in wrong.values():
        assert not all(region["captions"]["en"] in record["captions"]["en"] for region in record["regions"])
        if record["caption_of"] in clean:
            assert record["captions"] == clean[record["caption_of"]]["captions"]
    assert any(record["caption_of"] in clean for record in wrong.values())


def test_duplicates_have_the_asked_rate_and_copy_an_earlier_sample(noisy):
    copies = {key: sample for key, sample in noisy.items() if "duplicate_of" in sample["json"]}
    assert len(copies) == 15
    for key, sample in copies.items():
        source = noisy[sample["json"]["duplicate_of"]]
        assert sample["json"]["duplicate_of"] < key
        assert "duplicate_of" not in source["json"]
        assert source["jpg"] == sample["jpg"]
        assert source["json"]["captions"] == sample["json"]["captions"]


def test_all_noise_at_once_leaves_the_first_sample_to_copy_from():
    plan = plan_train(WorldOptions(scenes=5, singles=5, duplicates=1.0))
    assert plan.duplicates == dict.fromkeys(range(1, 10), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": -1}, "found scenes=-1; expected an integer of at least 0"),
        ({"scenes": 0, "singles": 0}, "at least one training sample"),
        ({"size": 8}, "found size=8; expected 32 to 512 pixels"),
        ({"bias": 1.5}, "found bias=1.5; expected a share in"),
        ({"scene_aspect": 0.5}, "found scene_aspect=0.5; expected 1 to 6, a short side of 16 pixels or more"),
        ({"size": 64, "single_aspect": 4.1}, "found single_aspect=4.1; expected 1 to 4"),
        ({"duplicates": float("nan")}, "found duplicates=nan"),
        ({"wrong_captions": 0.6, "duplicates": 0.6}, "add up to more than 1"),
        ({"languages": ("en", "klingon")}, "found languages .*klingon"),
        ({"num_emoji": 1800}, "1800 \\+ 6 emoji were asked for"),
        ({"num_emoji": 1, "wrong_captions": 0.5}, "wrong_captions=0.5 needs another sample"),
    ],
)
def test_bad_options_are_errors_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_world_from_before_an_option_is_still_up_to_date(world, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(world, out)
    summary = json.loads((out / "world.json").read_text())
    del summary["options"]["scene_aspect"], summary["options"]["single_aspect"]
    (out / "world.json").write_text(json.dumps(summary))
    before = files(out)
    assert write(out)["up_to_date"]
    with pytest.raises(ValueError, match=r"a world with scene_aspect=2.0 \(asked for: 3.0\);"):
        write(out, scene_aspect=3.0)
    assert files(out) == before


def test_aspect_options_shape_training_and_evaluation_alike(tmp_path):
    write(tmp_path / "wide", scene_aspect=4.0, single_aspect=3.0)
    most = {"scene": 4.0, "single": 3.0}
    for split in SPLITS:
        records = [sample["json"] for sample in samples(tmp_path / "wide" / split).values()]
        for kind in {record["kind"] for record in records}:
            sides = [(record["width"], record["height"]) for record in records if record["kind"] == kind]
            assert most[kind] * 0.7 < max(max(side) / min(side) for side in sides) <= most[kind] * 1.05


def test_progress_counts_every_sample(tmp_path):
    calls = []
    write(tmp_path / "out", scenes=3, singles=4, val=2, unseen=0, progress=lambda *call: calls.append(call))
    assert calls == [(done, 11) for done in range(1, 12)]
    assert not (tmp_path / "out" / "unseen").exists()


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_command_writes_once_refuses_another_world_and_replaces_it_when_told(tmp_path, capsys):
    tiny = ("--out", tmp_path / "w", "--scenes", 4, "--singles", 4, "--val", 2, "--emoji", 12, "--unseen", 2)
    arguments = (*tiny, "--languages", "en,de", "--single-aspect", 1.5)
    first = run(parse(*arguments))
    assert not first["up_to_date"]
    assert first["options"]["single_aspect"] == 1.5
    before = files(tmp_path / "w")
    assert run(parse(*arguments))["up_to_date"]
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"seed=0 \(asked for: 7\).*--overwrite"):
        run(parse(*arguments, "--seed", 7))
    assert files(tmp_path / "w") == before
    (tmp_path / "w" / "notes.txt").write_text("mine")
    run(parse(*arguments, "--seed", 7, "--overwrite"))
    assert (tmp_path / "w" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "w" / "world.json").read_text())["options"]["seed"] == 7


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="files but no finished world"):
        write(tmp_path)


def test_every_option_has_a_help_text():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert all(action.help and "None" not in action.help for action in parser._actions)
    assert "--emoji N" in parser.format_help()
    assert "--scene-aspect RATIO" in parser.format_help()
