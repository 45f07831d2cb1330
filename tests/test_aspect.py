"""The experiment with wide and tall pictures gives both branches the same, and its table says what the numbers say."""

# M pictures, E embedding dimension, K classes

import json
import sys
from pathlib import Path

import pytest
import torch

from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex
from siglip2.recipes import expand_arguments, load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import aspect


class Picture:
    """A sample of which only the picture is asked for."""

    def __init__(self, height, width):
        self.pixels = torch.full((3, height, width), 7, dtype=torch.uint8)

    def image(self):
        return self.pixels


def options_of(words, prefix):
    pairs = zip(words[::2], words[1::2], strict=True)
    return {flag.removeprefix(prefix): json.loads(value) for flag, value in pairs if flag.startswith(prefix)}


@pytest.fixture
def patchifiers():
    fixed = load_recipe(str(aspect.RECIPE))["plugins"][0]["fixed"]
    naflex = options_of(aspect.naflex_options(), "--plugins.naflex.")
    return {"fixed": Fixed(**fixed).patchifier(), "naflex": NaFlex(**naflex).patchifier()}


def test_both_branches_have_the_same_tokens_examples_and_position_table(patchifiers):
    fixed, naflex = patchifiers["fixed"], patchifiers["naflex"]
    assert [fixed.layout(i) for i in range(9)] == [naflex.layout(i) for i in range(9)]
    assert fixed.eval_layout(5) == naflex.eval_layout(5)
    assert (fixed.grid, fixed.patch_size) == (naflex.grid, naflex.patch_size)


def test_patches_are_counted_without_padding(patchifiers):
    pictures = [Picture(32, 128), Picture(128, 128), Picture(40, 120)]
    counts = {row: aspect.num_patches(aspect.stacked(pictures, p)).tolist() for row, p in patchifiers.items()}
    assert counts == {"fixed": [16, 16, 16], "naflex": [2 * 8, 4 * 4, 2 * 6]}


@pytest.mark.parametrize(
    ("row", "plugins", "steps"),
    [
        ("base", ["fixed", "sigmoid"], "40"),
        ("fixed", ["fixed", "sigmoid"], "20"),
        ("naflex", ["sigmoid", "naflex"], "20"),
    ],
)
def test_branches_go_on_from_the_base_of_their_seed_and_differ_in_the_patchifier_alone(row, plugins, steps, tmp_path):
    run = aspect.Run(row, 7, 40, tmp_path)
    command = run.training()
    words = command[command.index("fit") + 1 :]
    assert expand_arguments(words)[1] == plugins
    assert words[words.index("--trainer.max_steps") + 1] == steps
    if row == "base":
        assert words[words.index("--trainer.limit_train_batches") + 1] == "20"
        assert "--model.warm_start" not in words
    else:
        assert words[words.index("--model.warm_start") + 1] == str(tmp_path / "base-7" / "progress-0.5.ckpt")
        assert "--trainer.limit_train_batches" not in words


def test_the_base_saves_the_checkpoint_that_the_branches_start_from():
    callbacks = load_recipe(str(aspect.RECIPE))["trainer"]["callbacks"]
    saving = next(c["init_args"] for c in callbacks if c["class_path"].endswith("SaveAtProgress"))
    assert saving["fractions"] == [aspect.BRANCHING]


def test_a_picture_is_named_right_by_any_of_its_classes_and_never_by_the_filling():
    z = torch.eye(3)
    labels = torch.tensor([[0, 1], [2, -1], [2, -1]])
    assert aspect.named_right(z, torch.eye(3), labels).tolist() == [1, 0, 1]


def test_a_pair_is_found_first_in_both_one_or_no_direction():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.1]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.1, 0.0]])
    # the third text is nearest to the second picture, the third picture to the second text
    assert aspect.found_first(images, texts).tolist() == [1, 1, 0]
    # the third text is longer: both pictures find it first, and it finds the second
    longer = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])
    assert aspect.found_first(images, longer).tolist() == [1, 0.5, 0.5]


def test_scores_are_split_at_two_to_one():
    hits, ratios = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.9, 2.0, 4.0])
    found = aspect.by_shape("retrieval", hits, ratios)
    assert found == {"retrieval": 0.75, "retrieval_wide": 1.0, "retrieval_square": 0.5}
    assert found.keys() <= aspect.METRICS.keys()


def test_table_gives_mean_deviation_and_paired_difference_in_per_cent():
    scores = {
        "fixed": {s: dict.fromkeys(aspect.METRICS, value) for s, value in {0: 0.10, 1: 0.20}.items()},
        "naflex": {s: dict.fromkeys(aspect.METRICS, value) for s, value in {0: 0.14, 1: 0.26, 5: 0.50}.items()},
    }
    table = aspect.markdown(scores, {"retrieval": 0.01})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    found = {row[0]: row[1:] for row in rows}
    # seed 5 has no partner, so it counts for its row and not for the difference
    assert found[aspect.METRICS["retrieval"]] == ["1.0", "15.0 ± 7.1", "30.0 ± 18.3", "+5.0 ± 1.0"]
    assert found[aspect.METRICS["zero_shot_single_wide"]][0] == ""
    assert {len(row) for row in rows} == {5}


def test_a_branch_that_has_not_run_leaves_its_cells_empty():
    table = aspect.markdown({"fixed": {0: dict.fromkeys(aspect.METRICS, 0.5)}}, {})
    assert f"| {aspect.METRICS['retrieval']} |  | 50.0 |  |  |" in table


def test_branches_of_a_base_that_fails_are_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def fail_with_seed_1(run):
        if run.seed == 1:
            raise RuntimeError("no such shard")
        run.folder.mkdir(parents=True)
        run.scores.write_text(json.dumps({"scores": {"retrieval": run.seed}}))

    monkeypatch.setattr(aspect, "train", fail_with_seed_1)
    runs = [aspect.Run(row, seed, 10, tmp_path) for seed in (0, 1, 2) for row in ("naflex", "fixed")]
    found, wrong = aspect.finish_all(runs, jobs=2)
    assert {(run.row, run.seed) for run in found} == {(row, seed) for row in ("naflex", "fixed") for seed in (0, 2)}
    assert wrong == ["naflex, seed 1: no such shard", "fixed, seed 1: no such shard"]


def test_a_run_without_its_last_checkpoint_is_not_taken_for_trained(tmp_path):
    base = aspect.Run("base", 0, 10, tmp_path)
    assert not base.trained()
    base.folder.mkdir()
    torch.save({"siglip2": {}, "global_step": 5}, base.checkpoint)
    assert base.trained()
    assert not aspect.Run("base", 0, 12, tmp_path).trained()


def test_a_base_of_odd_steps_reaches_the_fraction_at_which_it_is_saved(tmp_path):
    base, branch = (aspect.Run(row, 0, 11, tmp_path) for row in ("base", "fixed"))
    assert base.own_steps / 11 >= aspect.BRANCHING
    assert base.own_steps + branch.own_steps == 11
