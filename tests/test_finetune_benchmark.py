"""The fine-tuning experiment scores what was not trained on, starts every mode from its base, and its table adds up."""

# H W height and width in pixels

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglip2.recipes import expand_arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import finetune


def options_of(words):
    return dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word and word.startswith("--"))


@pytest.mark.parametrize(
    ("mode", "plugins"),
    [
        ("full", ["fixed", "temperature", "sigmoid"]),
        ("lit", ["fixed", "temperature", "sigmoid"]),
        ("text-locked", ["fixed", "temperature", "sigmoid"]),
        ("lora", ["fixed", "temperature", "sigmoid", "lora"]),
    ],
)
def test_modes_are_the_preset_under_its_overlays_from_the_base_of_their_seed(mode, plugins, tmp_path):
    run = finetune.Run(tmp_path, 7, 40, mode, "recoloured", 3e-4)
    words = run.training()
    assert expand_arguments(words[words.index("fit") + 1 :])[1] == plugins
    options = options_of(words)
    assert options["model.warm_start"] == str(finetune.Run(tmp_path, 7, 99).checkpoint)
    assert options["model.optimizer.init_args.lr"] == "0.0003"
    assert options["data.train.path"] == str(tmp_path / "recoloured-tune")


def test_replay_takes_every_second_picture_from_what_the_base_was_trained_on(tmp_path):
    options = options_of(finetune.Run(tmp_path, 7, 40, finetune.REPLAY, "emoji").training())
    sources = json.loads(options["data.train.sources"])
    assert {name: source["weight"] for name, source in sources.items()} == {"new": 0.5, "old": 0.5}
    assert sources["new"]["path"] == str(tmp_path / "emoji-tune")
    assert sources["old"]["path"] == options_of(finetune.Run(tmp_path, 7, 40).training())["data.train.path"]
    assert "data.train.path" not in options


def test_rates_lie_within_what_was_piloted_and_not_at_an_end():
    assert all(finetune.RATES[mode] in rates[1:-1] for mode, rates in finetune.PILOTED.items())


@pytest.mark.parametrize(("seed", "split"), [(0, "test"), (finetune.PILOT_SEED, "pilot")])
def test_a_run_is_scored_on_its_domain_and_on_what_is_kept_and_the_pilot_on_pictures_of_its_own(seed, split, tmp_path):
    options = options_of(finetune.Run(tmp_path, seed, 40, "full", "recoloured").training())
    zero_shot = {name: Path(found["path"]).name for name, found in json.loads(options["data.zero_shot"]).items()}
    assert zero_shot == {n: f"{n}-{split}" for n in ("recoloured", "recoloured_other", "kept_emoji")}
    retrieval = {name: Path(found["path"]).name for name, found in json.loads(options["data.retrieval"]).items()}
    assert retrieval == {"kept_scenes": f"kept_scenes-{split}"}


def test_domains_hold_out_what_their_scores_claim():
    ids = {name: {emoji.id for emoji in pool} for name, pool in finetune.pools().items()}
    assert ids["recoloured"] | ids["recoloured_other"] == ids["kept_emoji"]
    assert not ids["recoloured"] & ids["recoloured_other"]
    assert not ids["emoji"] & ids["kept_emoji"]
    assert {name: len(found) for name, found in ids.items()} == {
        "recoloured": 24,
        "recoloured_other": 8,
        "emoji": 16,
        "kept_emoji": 32,
        "kept_scenes": 32,
    }


def drawn(name):
    """The first pictures, uint8 [H, W, 3], and captions of a set."""
    pool = finetune.pools()["recoloured"]
    labels = {emoji.id: label for label, emoji in enumerate(pool)}
    found = []
    for _, files in finetune.pictures(name, pool, labels, 24):
        record = json.loads(files["json"])
        assert record["captions"]["en"] == pool[record["label"]].names["en"]
        found.append(np.asarray(Image.open(io.BytesIO(files["jpg"]))).astype(int))
    return found


def test_pictures_that_are_scored_are_none_that_are_trained_on():
    trained, scored = drawn("recoloured-tune"), drawn("recoloured-test")
    nearest = min(np.abs(a - b).mean() for a in trained for b in scored)
    assert nearest > 2
    assert all(np.array_equal(a, b) for a, b in zip(trained, drawn("recoloured-tune"), strict=True))


def test_recoloured_pictures_have_their_channels_in_other_places_and_the_same_shapes():
    picture = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    assert finetune.recolour(picture)[0, 1].tolist() == [4, 5, 3]
    assert [np.argmax(p.mean((0, 1))) for p in (red(), finetune.recolour(red()))] == [0, 2]


def red():
    """A picture of a red thing, uint8 [H, W, 3]."""
    picture = np.full((8, 8, 3), 20, dtype=np.uint8)
    picture[2:6, 2:6, 0] = 220
    return picture


def test_table_gives_mean_deviation_and_the_difference_to_the_base_paired_by_seed():
    columns = list(finetune.COLUMNS.values())
    found = {
        row: {seed: dict.fromkeys(columns, share) for seed, share in enumerate(shares)}
        for row, shares in {"base": (0.10, 0.30), "full": (0.40, 0.64)}.items()
    }
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in finetune.table("emoji", found).splitlines() if line]
    assert lines[0] == ["emoji", "new emoji", "old emoji", *columns[-2:]]
    assert [line[1] for line in lines if line[0] == "full"] == ["52.0 ± 17.0", "+32.0 ± 2.0"]
    assert [line[1] for line in lines if line[0] == "base"] == ["20.0 ± 14.1"]
    assert {len(line) for line in lines} == {5}


def test_a_folder_of_a_tiny_world_is_not_taken_for_a_full_one(tmp_path):
    (tmp_path / "data.done").write_text("tiny")
    finetune.write_data(tmp_path, tiny=True)  # is there
    with pytest.raises(ValueError, match="holds a tiny world, and full was asked for"):
        finetune.write_data(tmp_path, tiny=False)


def test_columns_are_the_scores_of_a_run_s_retention_table(tmp_path):
    run = finetune.Run(tmp_path, 0, 10, "full", "emoji")
    run.folder.mkdir()
    row = {"dataset": "emoji", "measure": "top-1", "before": 0.1, "after": 0.7}
    (run.folder / "retention.json").write_text(json.dumps({"rows": [row]}))
    assert finetune.retention(run) == ({"new emoji": 0.1}, {"new emoji": 0.7})
