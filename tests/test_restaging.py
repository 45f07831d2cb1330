"""Runs staged otherwise: plugins that are new or changed on resume, that fall asleep again, that wake one by one."""

import pytest
import torch
from staged import SLEEPERS, arguments, assert_same_end, optimizer_steps, run

from siglip2.core.checkpoint import read_checkpoint

MOMENTUM = 0.9  # of the teacher in staged.yaml
STRETCH = [word for name in ("ema_teacher", "silc", "tips") for word in (f"--plugins.{name}.start", "0.2")]
STRETCH += [word for name in ("ema_teacher", "silc", "tips") for word in (f"--plugins.{name}.stop", "0.6")]
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def recipe(toy_shards, toy_tokenizer):
    """Returns the arguments of a run of ten steps into a folder."""
    return lambda folder: arguments(toy_shards, toy_tokenizer, folder)


def pairs(state):
    """Each tensor of the teacher with the student's, float64, by the student's name."""
    for name, tensor in state.items():
        part, _, rest = name.removeprefix("plugins.ema_teacher.").partition(".")
        if part == "vision":
            yield f"model.vision.{rest}", tensor.double(), state[f"model.vision.{rest}"].double()
        if part == "heads":
            plugin, _, inside = rest.partition(".")
            yield f"{plugin}.head.{inside}", tensor.double(), state[f"plugins.{plugin}.head.{inside}"].double()


def assert_average(before, after):
    """The teacher of a step is 0.9 of `before` (by the student's names) and 0.1 of the student."""
    for name, teacher, student in pairs(after):
        expected = MOMENTUM * before[name] + (1 - MOMENTUM) * student
        torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-7)


def test_teacher_whose_heads_are_new_on_resume_copies_the_student_again(recipe, tmp_path):
    run(recipe(tmp_path), "--plugins.tips", "off")
    again = run(recipe(tmp_path / "more"), "--ckpt_path", tmp_path / "step=6.ckpt")
    assert min(again.steps) == 7
    assert_average({name: student for name, _, student in pairs(again.initial)}, again.steps[7]["state"])


@pytest.fixture(scope="module")
def stretch(recipe, tmp_path_factory):
    """The diary and the folder of a run in which teacher, silc and tips are awake in steps 3 to 6."""
    folder = tmp_path_factory.mktemp("stretch")
    return run(recipe(folder), *STRETCH), folder


def test_plugins_that_have_stopped_cost_nothing_and_stay_as_they_are(stretch):
    awake = {step for step, seen in stretch[0].steps.items() if "global" in seen["views"]}
    assert awake == {3, 4, 5, 6}
    for step, seen in stretch[0].steps.items():
        assert seen["calls"]["ema_teacher"] == (1 if step in awake else 0)
        assert seen["calls"]["student"] == (3 if step in awake else 1)
        assert any(name.startswith(SLEEPERS) for name in seen["warm"]) == (step in awake)
    then, end = (stretch[0].steps[step]["state"] for step in (6, 10))
    names = [name for name in end if name.startswith(SLEEPERS)]
    assert [name for name in names if torch.equal(then[name], stretch[0].initial[name])] == []
    assert [name for name in names if not torch.equal(then[name], end[name])] == []


@pytest.mark.parametrize("step", [5, 7])
def test_resume_across_the_end_of_a_stretch_is_bitwise(recipe, stretch, step, tmp_path):
    again = run(recipe(tmp_path), *STRETCH, "--ckpt_path", stretch[1] / f"step={step}.ckpt")
    assert min(again.steps) == step + 1
    assert_same_end(again, stretch[0], after=step)


def test_plugin_that_starts_fresh_on_resume_has_no_moments_of_its_former_parameters(recipe, stretch, tmp_path):
    middle = stretch[1] / "step=4.ckpt"
    run(recipe(tmp_path), *STRETCH, "--plugins.silc.prototypes", 24, "--ckpt_path", middle)
    counts, _ = optimizer_steps(read_checkpoint(str(tmp_path / "step=5.ckpt")))
    assert {count for name, count in counts.items() if name.startswith("plugins.silc.")} == {1}
    assert {count for name, count in counts.items() if name.startswith("plugins.tips.")} == {3}
    assert {count for name, count in counts.items() if name.startswith("model.")} == {5}


def test_teacher_that_is_awake_before_its_objectives_follows_from_the_first_step(recipe, tmp_path):
    diary = run(recipe(tmp_path), "--plugins.ema_teacher.start", 0)
    before = {name: student for name, _, student in pairs(diary.initial)}
    for step, seen in diary.steps.items():
        assert seen["calls"]["ema_teacher"] == (1 if step > 5 else 0)
        assert_average(before, seen["state"])
        before = {name: teacher for name, teacher, _ in pairs(seen["state"])}
