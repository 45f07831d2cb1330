"""One run with all losses: teacher, silc and tips sleep until their start, then wake together; resume is exact."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from staged import SLEEPERS, arguments, assert_same_end, optimizer_steps, run

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import read_checkpoint

BOUNDARY = 5
RANKS = 2


@pytest.fixture(scope="module")
def recipe(toy_shards, toy_tokenizer, tmp_path_factory):
    """The arguments and the folder of a run of ten steps."""
    folder = tmp_path_factory.mktemp("staged")
    return arguments(toy_shards, toy_tokenizer, folder), folder


@pytest.fixture(scope="module")
def whole(recipe):
    """The diary of that run."""
    return run(recipe[0])


def test_crops_are_made_and_the_teacher_runs_only_once_their_plugins_are_awake(whole):
    before = {"views": ["caption", "image", "locca", "locca_parallel"]}
    after = {"views": sorted([*before["views"], "global", "local", "mask"])}
    for step, seen in whole.steps.items():
        assert sorted(seen["views"]) == (before if step <= BOUNDARY else after)["views"]


def test_no_view_is_encoded_twice_by_the_same_network(whole):
    """Student: the image, the local crops together, the masked global view. Teacher: the global view."""
    early = {"student": 1, "text": 1, "ema_teacher": 0, "decoder": 1}
    late = {"student": 3, "text": 1, "ema_teacher": 1, "decoder": 1}
    for step, seen in whole.steps.items():
        assert seen["calls"] == (early if step <= BOUNDARY else late)


def test_sigmoid_and_locca_see_the_same_views_with_and_without_crops_beside(whole, recipe, tmp_path):
    off = [word for name in ("ema_teacher", "silc", "tips") for word in (f"--plugins.{name}", "off")]
    alone = run(recipe[0], *off, "--trainer.default_root_dir", tmp_path)
    assert alone.steps.keys() == whole.steps.keys()
    for step, seen in alone.steps.items():
        image, beside = (views["image"] for views in (seen["views"], whole.steps[step]["views"]))
        assert torch.equal(image.patches, beside.patches)
        assert torch.equal(image.coords, beside.coords)
        for name in ("caption", "locca", "locca_parallel"):
            assert torch.equal(seen["views"][name], whole.steps[step]["views"][name]), name


def test_sleeping_plugins_do_not_move_and_awake_ones_do(whole):
    names = [n for n in whole.initial if n.startswith(SLEEPERS)]
    asleep = [n for n in names if not torch.equal(whole.initial[n], whole.steps[BOUNDARY]["state"][n])]
    assert asleep == []
    still = [n for n in names if torch.equal(whole.initial[n], whole.steps[10]["state"][n])]
    assert still == []


def test_teacher_starts_as_the_student_of_the_step_at_which_it_wakes(whole):
    states = {step: seen["state"] for step, seen in whole.steps.items()}
    name = "blocks.0.attn.qkv.weight"
    student = [states[step][f"model.vision.{name}"].double() for step in (BOUNDARY, BOUNDARY + 1)]
    teacher = states[BOUNDARY + 1][f"plugins.ema_teacher.vision.{name}"].double()
    torch.testing.assert_close(teacher, 0.9 * student[0] + 0.1 * student[1], rtol=1e-6, atol=1e-7)


def test_optimizer_state_of_new_parameters_is_fresh_and_the_rest_goes_on(whole, recipe):
    counts, names = optimizer_steps(read_checkpoint(str(recipe[1] / f"step={BOUNDARY + 1}.ckpt")))
    assert counts["model.text.norm.weight"] == BOUNDARY + 1
    assert counts["plugins.locca.decoder.out.weight"] == BOUNDARY + 1
    assert counts["plugins.silc.head.prototype_weight"] == 1
    assert counts["plugins.tips.mask_token"] == 1
    assert not any(name.startswith("plugins.ema_teacher.") for name in names)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_resume_on_either_side_of_the_boundary_is_bitwise(whole, recipe, step, tmp_path):
    middle = recipe[1] / f"step={step}.ckpt"
    again = run(recipe[0], "--trainer.default_root_dir", tmp_path, "--ckpt_path", middle)
    assert min(again.steps) == step + 1
    assert_same_end(again, whole, after=step)


def one_rank(number, port, arguments, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number)}
    diary = run(arguments)
    found = {step: {key: seen[key] for key in ("loss", "state")} for step, seen in diary.steps.items()}
    torch.save(found, f"{folder}/{number}.pt")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.dist
def test_two_processes_cross_the_boundary_with_the_losses_of_one(whole, recipe, tmp_path):
    ranks = ["--trainer.devices", str(RANKS), "--trainer.strategy", "ddp_find_unused_parameters_true"]
    there = [*recipe[0], "--trainer.default_root_dir", str(tmp_path), *ranks]
    mp.spawn(one_rank, args=(free_port(), there, str(tmp_path)), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(RANKS))
    assert first.keys() == whole.steps.keys()
    for step, seen in whole.steps.items():
        mean = (first[step]["loss"] + second[step]["loss"]) / RANKS  # each rank has half of the rows
        assert mean == pytest.approx(seen["loss"], rel=1e-4), step
        for name, tensor in seen["state"].items():
            assert torch.equal(first[step]["state"][name], second[step]["state"][name]), name
            if step <= BOUNDARY and name.startswith(SLEEPERS):
                assert torch.equal(first[step]["state"][name], tensor), name


def test_recipe_with_silc_and_no_teacher_fails_with_the_plugin_to_add(recipe):
    with pytest.raises((SystemExit, ValueError), match="needs the encoder 'teacher': add `ema_teacher`"):
        SigLIP2CLI([*recipe[0], "--plugins.ema_teacher", "off"], command="fit")
