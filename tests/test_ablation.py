"""The ablation's probes find what is in the tokens and nothing else; its table says what the numbers say."""

# M pictures, N patches, D width, R regions

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.ops import box_iou

from siglip2.recipes import expand_arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation
import probes
import scores

SIDE, CLASSES = 4, 3  # patches along an edge
PIXELS = 6 * SIDE


def checkerboards(num_images, *, informative=True, seed=0):
    """Pictures in which each class fills one patch; each token is its patch's class and place, or noise."""
    draws = torch.Generator().manual_seed(seed)
    patches_MR = torch.stack([torch.randperm(SIDE**2, generator=draws)[:CLASSES] for _ in range(num_images)])
    classes_MN = torch.zeros(num_images, SIDE**2, dtype=torch.int64)
    classes_MN.scatter_(1, patches_MR, torch.arange(1, CLASSES + 1).expand(num_images, -1))
    place_ND = F.one_hot(torch.arange(SIDE**2), SIDE**2).float()
    tokens_MND = torch.cat([F.one_hot(classes_MN, CLASSES + 1).float(), place_ND.expand(num_images, -1, -1)], dim=-1)
    if not informative:
        tokens_MND = torch.randn(tokens_MND.shape, generator=draws)
    rows, columns = patches_MR // SIDE, patches_MR % SIDE
    boxes_MR4 = torch.stack([columns, rows, columns + 1, rows + 1], dim=-1) / SIDE
    masks_MHW = classes_MN.reshape(-1, SIDE, SIDE).repeat_interleave(6, 1).repeat_interleave(6, 2).to(torch.uint8)
    labels_MR = torch.arange(CLASSES).expand(num_images, -1).clone()
    labels_MR[::5, -1] = probes.NOTHING  # some pictures have fewer regions
    return probes.Scenes(tokens_MND, labels_MR, boxes_MR4, masks_MHW)


@pytest.mark.parametrize("informative", [True, False])
def test_referring_probe_finds_boxes_that_the_tokens_tell_and_no_others(informative):
    train_on, test_on = (checkerboards(256, informative=informative, seed=seed) for seed in (0, 1))
    how = probes.Training(steps=250, batch_size=64, lr=3e-3)
    found = probes.referring_accuracy(train_on, test_on, CLASSES, seed=0, how=how)
    # a box that ignores the tokens hits at most a few of the 16 places
    assert found > 0.9 if informative else found < 0.25


@pytest.mark.parametrize("informative", [True, False])
def test_segmentation_probe_reads_classes_that_are_linear_in_the_tokens_and_no_others(informative):
    train_on, test_on = (checkerboards(128, informative=informative, seed=seed) for seed in (0, 1))
    how = probes.Training(steps=150, batch_size=32, lr=0.05)
    found = probes.segmentation_miou(train_on, test_on, CLASSES, (SIDE, SIDE), seed=0, how=how)
    # bilinear logits round the corners of the patches off, so it cannot be 1; background alone gives about 0.2
    assert found > 0.7 if informative else found < 0.3


def test_probes_with_the_same_seed_agree_and_leave_the_tokens_alone():
    train_on, test_on = checkerboards(32), checkerboards(32, seed=1)
    before = train_on.tokens_MND.clone()
    how = probes.Training(steps=5, batch_size=8, lr=1e-2)
    found = {probes.segmentation_miou(train_on, test_on, CLASSES, (SIDE, SIDE), seed=3, how=how) for _ in range(2)}
    assert len(found) == 1
    assert torch.equal(train_on.tokens_MND, before)


def test_sparse_pixels_have_the_logits_of_the_full_picture():
    probe = probes.SegmentationProbe(8, CLASSES, (SIDE, SIDE)).double()
    tokens_BND = torch.randn(2, SIDE**2, 8, dtype=torch.float64)
    every = slice(probes.EVERY // 2, None, probes.EVERY)
    full, sparse = probe(tokens_BND, (PIXELS, PIXELS)), probe(tokens_BND, (PIXELS // probes.EVERY,) * 2)
    torch.testing.assert_close(full[..., every, every], sparse)


def test_mean_iou_is_that_of_torchmetrics_and_leaves_absent_classes_out():
    true, found = torch.randint(0, 4, (2, 7, 7)), torch.randint(0, 4, (2, 7, 7))  # classes 4 and 5 never occur
    expected = MulticlassJaccardIndex(num_classes=6)(found, true)
    assert probes.mean_iou(probes.confusion(found, true, 6)) == pytest.approx(float(expected))
    assert probes.mean_iou(torch.tensor([[1, 0], [1, 2]])) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_paired_iou_is_the_diagonal_of_torchvision():
    corners = torch.rand(2, 20, 2, 2).sort(dim=2).values
    found, true = corners.flatten(2)
    torch.testing.assert_close(probes.paired_iou(found, true), box_iou(found, true).diagonal())


def test_half_overlap_is_a_hit_and_an_unreadable_box_is_a_miss():
    true = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3)
    found = torch.tensor([[0.0, 0.0, 1.0, 0.5], [math.nan] * 4, [0.0, 0.0, 1.0, 0.4]])
    assert probes.hit_rate(found, true) == pytest.approx(1 / 3)


def test_a_scene_is_classified_right_if_any_of_its_emoji_is_best():
    z = torch.eye(3)
    labels = torch.tensor([[0, 1], [2, probes.NOTHING], [2, probes.NOTHING]])
    assert scores.zero_shot_hits(z, torch.eye(3), labels) == pytest.approx(2 / 3)


def test_retrieval_scores_both_directions_and_ties_lose():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = scores.recall_at_1(images, texts)
    assert found == {"text_to_image": 0.5, "image_to_text": 0.0, "retrieval": 0.25}


def test_paired_difference_and_its_standard_error():
    mean, error = ablation.paired({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.0}, {0: 0.4, 1: 0.5, 2: 0.6})
    assert mean == pytest.approx(0.2)  # of 0.1, 0.2 and 0.3; seed 7 has no partner
    assert error == pytest.approx(0.1 / math.sqrt(3))


def test_table_gives_mean_deviation_and_paired_difference_in_per_cent():
    by_row = {
        "sigmoid": {0: {"segmentation": 0.10}, 1: {"segmentation": 0.20}},
        "all": {0: {"segmentation": 0.14, "referring_decoder": 0.5}, 1: {"segmentation": 0.26}},
    }
    table = ablation.markdown(by_row, {"segmentation": 0.01})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    column = rows[0].index(ablation.METRICS["segmentation"])
    assert [row[column] for row in rows if row[0] == "sigmoid"] == ["15.0 ± 7.1"]
    assert [row[column] for row in rows if row[0] == "all"] == ["20.0 ± 8.5", "+5.0 ± 1.0"]
    decoder = rows[0].index(ablation.METRICS["referring_decoder"])
    assert [row[decoder] for row in rows if row[0] == "all"] == ["50.0", ""]
    assert {len(row) for row in rows} == {len(rows[0])}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("sigmoid", ["fixed", "sigmoid"]),
        ("+locca", ["fixed", "sigmoid", "locca"]),
        ("+silc+tips", ["fixed", "sigmoid", "ema_teacher", "silc", "tips"]),
        ("all", ["fixed", "sigmoid", "locca", "ema_teacher", "silc", "tips"]),
    ],
)
def test_rows_are_one_recipe_with_plugins_taken_out(row, expected, tmp_path):
    command = ablation.Run(row, 0, 10, tmp_path).training()
    arguments, plugins = expand_arguments(command[command.index("fit") + 1 :])
    assert plugins == expected
    others = [{**json.loads(a), "plugins": None} for a in arguments if a.startswith("{")]
    assert others[0]["model"]["size"] == "mini/16"
    assert all(set(o) == {"plugins"} for o in others[1:])  # an overlay changes nothing but plugins


def test_a_failed_run_is_reported_with_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="status 3") as error:
        ablation.logged([sys.executable, "-c", "print('no such shard'); raise SystemExit(3)"], tmp_path / "fit.log")
    assert "no such shard" in str(error.value)


def test_a_run_without_its_last_checkpoint_is_not_taken_for_trained(tmp_path):
    run = ablation.Run("+silc+tips", 1, 10, tmp_path)
    assert not run.trained()
    run.folder.mkdir()
    torch.save({"siglip2": {}, "global_step": 10}, run.checkpoint)
    assert run.trained()
    assert not ablation.Run("+silc+tips", 1, 11, tmp_path).trained()
