"""Branches: a run that goes on from another one's checkpoint, in the same or in another resolution or patchifier."""

import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from staged import arguments, optimizer_steps, run

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.loader import TrainBatches
from siglip2.core.surgery import resize_kernel, resize_positions
from siglip2.core.timeline import Timeline
from siglip2.core.warm_start import Surgery
from siglip2.plugins.fixed import Fixed

TABLE, TEACHER = "model.vision.pos_embed", "plugins.ema_teacher.vision.pos_embed"
KERNEL = "model.vision.embed.weight"
TOWERS = ("--model.vision.width", 64, "--model.vision.depth", 2, "--model.vision.mlp_dim", 128)
TOWERS += ("--model.vision.num_heads", 2, "--model.text.width", 64, "--model.text.depth", 2)
TOWERS += ("--model.text.mlp_dim", 128, "--model.text.num_heads", 2)  # those of tiny/16
NAFLEX = ("--plugins.fixed", "off", "--plugins.naflex.table", 2, "--plugins.naflex.batch_size", 4)
NAFLEX += ("--plugins.naflex.seq_lens", "[4, 9]", "--plugins.naflex.eval_seq_len", 4)
NO_SSL = ("--plugins.ema_teacher", "off", "--plugins.silc", "off", "--plugins.tips", "off")


@pytest.fixture(scope="module")
def recipe(toy_shards, toy_tokenizer):
    """Returns the arguments of a run of ten steps of four into a folder; SSL losses from half of them on."""
    return lambda folder: arguments(toy_shards, toy_tokenizer, folder)


@pytest.fixture(scope="module")
def base(recipe, tmp_path_factory):
    """The diary and the folder of the run that branches leave; a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("base")
    return run(recipe(folder)), folder


@pytest.fixture
def branch(recipe, base, tmp_path):
    """Runs a branch from a step of the base."""

    def from_step(step, *, steps, folder="branch", extra=()):
        start = ("--model.warm_start", base[1] / f"step={step}.ckpt", "--trainer.max_steps", steps)
        return run(recipe(tmp_path / folder), *start, *extra)

    return from_step


@pytest.mark.parametrize("step", [3, 5, 6])
def test_branch_of_the_same_shape_is_the_rest_of_the_run_to_the_bit(base, branch, step):
    """Weights, optimizer, learning rate, samples, crops, losses that wake at half, the teacher: nothing is lost."""
    other = branch(step, steps=10 - step)
    wanted = {n: seen for n, seen in base[0].steps.items() if n > step}
    assert {n + step: seen["loss"] for n, seen in other.steps.items()} == {n: s["loss"] for n, s in wanted.items()}
    end = other.steps[10 - step]["state"]
    assert [n for n, tensor in wanted[10]["state"].items() if not torch.equal(tensor, end[n])] == []


def test_branch_of_a_branch_is_the_rest_of_the_run(recipe, base, branch, tmp_path):
    branch(3, steps=7)
    start = ("--model.warm_start", tmp_path / "branch" / "step=4.ckpt", "--trainer.max_steps", 3)
    again = run(recipe(tmp_path / "again"), *start)
    assert [s["loss"] for s in again.steps.values()] == [base[0].steps[n]["loss"] for n in (8, 9, 10)]


def test_branch_that_was_stopped_resumes_to_the_bit_without_the_file_it_came_from(recipe, branch, tmp_path):
    whole = branch(6, steps=4, extra=("--plugins.fixed.image_size", 48))
    resumed = run([], "--ckpt_path", tmp_path / "branch" / "step=2.ckpt", "--model.warm_start", "gone.ckpt")
    assert {n: s["loss"] for n, s in resumed.steps.items()} == {n: whole.steps[n]["loss"] for n in (3, 4)}
    end = resumed.steps[4]["state"]
    assert [n for n, tensor in whole.steps[4]["state"].items() if not torch.equal(tensor, end[n])] == []


def test_branch_into_another_resolution_resizes_the_positions_of_student_and_teacher_and_keeps_the_rest(base, branch):
    other = branch(6, steps=4, extra=("--plugins.fixed.image_size", 48))
    saved = base[0].steps[6]["state"]
    begin = other.steps[1]["before"]
    for name in (TABLE, TEACHER):
        assert torch.equal(begin[name], resize_positions(saved[name], (3, 3)))
    assert [n for n in saved if n not in (TABLE, TEACHER) and not torch.equal(saved[n], begin[n])] == []
    assert other.steps[1]["views"]["image"].grid == (3, 3)
    assert other.steps[1]["views"]["global"].grid == (3, 3)


def test_optimizer_state_stays_for_parameters_that_kept_their_shape(branch, tmp_path):
    branch(6, steps=4, extra=("--plugins.fixed.image_size", 48))
    taken, _ = optimizer_steps(read_checkpoint(str(tmp_path / "branch" / "step=4.ckpt")))
    assert taken[TABLE] == 4
    assert taken[KERNEL] == taken["model.text.token_embed.weight"] == 10
    assert taken["plugins.tips.mask_token"] == 5  # awake in steps 6 to 10


def test_optimizer_starts_fresh_on_request(branch, tmp_path):
    branch(6, steps=2, extra=("--model.surgery.optimizer", "false"))
    taken, _ = optimizer_steps(read_checkpoint(str(tmp_path / "branch" / "step=2.ckpt")))
    assert set(taken.values()) == {2}


@pytest.mark.parametrize("corners", [False, True])
def test_branch_into_another_patch_size_resizes_the_kernel_by_its_pseudo_inverse(base, branch, corners):
    input = ("--plugins.fixed.patch_size", 32, "--plugins.fixed.image_size", 96)
    how = ("--model.surgery.corners", str(corners).lower())
    other = branch(4, steps=1, extra=("--model.size", "B/32", *TOWERS, *NO_SSL, *input, *how))
    saved, begin = base[0].steps[4]["state"], other.steps[1]["before"]
    assert torch.equal(begin[KERNEL], resize_kernel(saved[KERNEL], 32))
    assert torch.equal(begin[TABLE], resize_positions(saved[TABLE], (3, 3), corners=corners))
    assert torch.equal(begin["model.vision.embed.bias"], saved["model.vision.embed.bias"])


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})


def test_naflex_branch_follows_the_tail_of_the_cosine_stretched(recipe, base, tmp_path):
    """lr(0.8 T + k / 3.75) for the k-th step, as SigLIP 2 stretches its last tenth."""
    start = ("--model.warm_start", base[1] / "step=6.ckpt", "--trainer.max_steps", 15)
    cli = SigLIP2CLI(list(map(str, [*recipe(tmp_path), *start, *NO_SSL, *NAFLEX])), command="fit")
    cli.trainer.callbacks.append(rates := Rates())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    total, warmup = 10, 2
    positions = [6 + k / 3.75 for k in range(15)]
    wanted = [1e-3 * 0.5 * (1 + math.cos(math.pi * (p - warmup) / (total - warmup))) for p in positions]
    assert [min(found) for found in rates.rates] == pytest.approx(wanted, rel=1e-9)
    assert all(len(found) == 1 for found in rates.rates)
    assert cli.model.progress == pytest.approx(1)


def test_naflex_branch_drops_what_it_does_not_train_and_goes_on_in_the_stream(base, branch):
    other = branch(6, steps=15, extra=(*NO_SSL, *NAFLEX))
    assert {view.patches.shape[1] for s in other.steps.values() for view in [s["views"]["image"]]} == {4, 9}
    assert other.steps[1]["views"].keys() == {"image", "caption", "locca", "locca_parallel"}
    captions = torch.cat([other.steps[n]["views"]["caption"] for n in (1, 2)])
    assert torch.equal(captions, torch.cat([base[0].steps[n]["views"]["caption"] for n in (7, 8)]))


def test_warm_start_says_what_it_kept_resized_and_dropped(branch, caplog):
    warm_start = logging.getLogger("siglip2.core")
    warm_start.addHandler(caplog.handler)  # the command line's logger does not hand on
    branch(6, steps=2, extra=("--plugins.fixed.image_size", 48, "--plugins.tips", "off"))
    warm_start.removeHandler(caplog.handler)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for line in (
        "warm start from .*step=6.ckpt: kept",
        f"resized {TABLE}: positions 2 x 2 -> 3 x 3, bilinear, antialiased",
        f"resized {TEACHER}: positions 2 x 2 -> 3 x 3",
        "plugin 'tips' is in the checkpoint but not in this recipe: it is dropped",
        r"continues at 60.0 % \(step 6 of 10, 24 examples seen\): the 4 steps left there are 2 here, 0.5 times",
        r"optimizer state: kept for \d+ parameters",
    ):
        assert re.search(line, said), line


def test_fresh_schedule_begins_at_progress_0_with_its_own_warm_up(branch, base):
    other = branch(9, steps=4, extra=("--model.surgery.schedule", "fresh", "--model.warmup", 1))
    assert other.steps[1]["views"].keys() == base[0].steps[1]["views"].keys()  # SSL sleeps again until half
    assert "global" in other.steps[3]["views"]


def test_end_of_a_run_leaves_nothing_to_continue(branch):
    with pytest.raises(ValueError, match=r"from the end of its run \(10 of 10 steps\).* set model.surgery.schedule"):
        branch(10, steps=2)


def test_other_towers_are_an_error_that_names_the_tensors(branch):
    with pytest.raises(ValueError, match=r"model.text.pos_embed: found \[16, 64\], expected \[16, 32\]"):
        branch(6, steps=2, extra=("--model.text.width", 32, "--model.text.num_heads", 2))


def test_another_text_contract_is_an_error(branch):
    with pytest.raises(ValueError, match="another text contract: .*length"):
        branch(6, steps=2, extra=("--data.text.length", 12))


def test_resuming_at_another_resolution_points_to_warm_start(recipe, base, tmp_path):
    with pytest.raises(ValueError, match="image_size: here 48, there 32.* give it as model.warm_start"):
        run(recipe(tmp_path), "--plugins.fixed.image_size", 48, "--ckpt_path", base[1] / "step=6.ckpt")


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, {0.8: 8, 0.9: 9, 0.95: 10}), (7, {0.8: 6, 0.9: 7}), (20, {0.8: 16, 0.9: 18, 0.95: 19})]
)
def test_checkpoints_are_saved_at_exact_shares_of_a_run(tiny_recipe, tmp_path, steps, expected):
    callback = ("--trainer.callbacks+", "siglip2.core.callbacks.milestones.SaveAtProgress")
    run(tiny_recipe, *callback, "--trainer.max_steps", steps)
    for fraction, step in expected.items():
        assert read_checkpoint(str(tmp_path / f"progress-{fraction:g}.ckpt"))["global_step"] == step


def test_shares_of_a_branch_are_those_of_the_whole_run(branch, base, tmp_path):
    callback = ("--trainer.callbacks+", "siglip2.core.callbacks.milestones.SaveAtProgress")
    branch(6, steps=8, extra=(*callback, *NO_SSL))
    assert read_checkpoint(str(tmp_path / "branch" / "progress-0.8.ckpt"))["global_step"] == 4
    assert not (tmp_path / "branch" / "progress-0.5.ckpt").exists()


def test_loader_and_module_agree_on_progress_to_the_last_bit():
    """0.7 + 0.3 / 3 is not 0.8 in floating point: a loss that wakes there must find its views."""
    for total in (10, 20, 100, 1300):
        for first in range(0, total, max(1, total // 25)):
            for steps in (1, 3, 7, total - first, 2 * (total - first)):
                timeline = Timeline(total, 0, first)
                views = [(edge, (edge,)) for edge in (0.0, 0.5, 0.8, 0.9, 0.95)]
                maker = SimpleNamespace(patchifier=Fixed(batch_size=4).patchifier())
                batches = TrainBatches(maker, None, views, max_batches=steps, timeline=timeline)
                for step in range(steps):
                    progress = timeline.progress(step, steps)
                    seen = batches.views_at(batches.timeline.progress(step, batches.max_batches))
                    assert seen == (max(edge for edge, _ in views if edge <= progress),)


def test_branch_that_reaches_the_start_of_a_loss_after_a_third_of_its_steps_has_its_views(branch):
    """(0.2 + 0.8 / 3 ...) falls on the edge at 0.5 only up to rounding."""
    for first, steps in ((2, 8), (4, 6), (2, 3), (1, 9)):
        other = branch(first, steps=steps, folder=f"{first}-{steps}")
        for n, seen in other.steps.items():
            assert ("global" in seen["views"]) == (seen["calls"]["ema_teacher"] == 1), n


def test_teacher_is_woken_again_by_a_schedule_that_starts_afresh(branch):
    """It would stay the teacher of the old run, asleep for half of the new one."""
    other = branch(9, steps=10, extra=("--model.surgery.schedule", "fresh"))
    for name, teacher, student, before in teachers(other, step=6):
        torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student, rtol=1e-5, atol=1e-6, msg=name)


def test_loss_that_starts_after_the_branch_point_is_woken_there(branch):
    later = [word for name in ("ema_teacher", "silc", "tips") for word in (f"--plugins.{name}.start", "0.8")]
    other = branch(6, steps=4, extra=later)
    for name, teacher, student, before in teachers(other, step=3):
        torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student, rtol=1e-5, atol=1e-6, msg=name)


def teachers(diary, *, step):
    """Each tensor of the teacher after its first step, with the student's then and before that step."""
    after, before = diary.steps[step]["state"], diary.steps[step]["before"]
    for name, tensor in after.items():
        if name.startswith("plugins.ema_teacher.vision."):
            student = name.replace("plugins.ema_teacher", "model")
            yield name, tensor, after[student], before[student]


def test_state_of_another_optimizer_is_an_error_and_can_be_left_behind(branch):
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1)
    with pytest.raises(ValueError, match="another optimizer: AdamW there, SGD here.* model.surgery.optimizer to false"):
        branch(6, steps=2, extra=sgd)
    branch(6, steps=2, folder="fresh", extra=(*sgd, "--model.surgery.optimizer", "false"))


def test_checkpoint_older_than_branches_says_what_to_do(base, branch):
    path = base[1] / "step=7.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["siglip2"]["timeline"]
    torch.save(checkpoint, base[1] / "step=77.ckpt")
    with pytest.raises(ValueError, match="older than branches are.* model.surgery.schedule to fresh"):
        branch(77, steps=2)


def test_stage_overlay_asks_for_the_checkpoint_that_it_leaves(recipe, tmp_path):
    overlay = ("--config", "stage/p16-384", "--plugins.fixed.image_size", 48, "--trainer.max_steps", 2)
    with pytest.raises(ValueError, match="this recipe is a branch: give the checkpoint that it leaves"):
        run(recipe(tmp_path), *overlay)


def test_change_of_pixels_is_said(branch, caplog):
    warm_start = logging.getLogger("siglip2.core")
    warm_start.addHandler(caplog.handler)
    branch(6, steps=1, extra=("--plugins.fixed.protocol", "open_clip"))
    warm_start.removeHandler(caplog.handler)
    assert "pixels: filter: now bicubic, then bilinear" in caplog.text


def test_unknown_kernel_filter_is_named_before_anything_is_read():
    with pytest.raises(ValueError, match="model.surgery.kernel_filter is 'lanczos', expected bilinear or bicubic"):
        Surgery(kernel_filter="lanczos")
