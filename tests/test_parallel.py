"""Several ranks train as one process does, under DDP and FSDP2; and what FSDP2 writes, everyone can read."""

import json

import pytest
import torch
from parallel_ranks import arguments, errors_on_two_ranks, fit, install_curator, on_ranks

from siglip2.core.checkpoint import read_checkpoint

pytestmark = pytest.mark.dist

DDP = ["--trainer.strategy", "ddp_find_unused_parameters_true"]
FSDP2 = ["--trainer.strategy", "fsdp2"]
COPIES = ["--trainer.strategy", "siglip2.core.parallel.FSDP2Strategy", "--trainer.strategy.replicas", "2"]
BLOCKS = ["--model.compile", "aot_eager", "--model.checkpoint_blocks", "true"]
SSL = ("ema_teacher", "silc", "tips")
# Wide heads, and cosines that are not divided by 0.04: else float32's last digit weighs more than 1e-6 in gradients,
# on one process too (that runs a batch in two parts, for example)
SGD = """
plugins:
  fixed: {batch_size: 8}
  silc: {hidden: 512, bottleneck: 64, student_temperature: 1.0, teacher_temperature: 1.0}
  tips: {hidden: 512, bottleneck: 64, student_temperature: 1.0, teacher_temperature: 1.0}
model:
  warmup: 0
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001, fused: false}}
trainer:
  callbacks: null
  enable_checkpointing: false
"""


def off(*names):
    return [word for name in names for word in (f"--plugins.{name}", "off")]


def distilling(name, *others):
    """One self-distilling objective alone, awake from the start."""
    awake = [word for n in ("ema_teacher", name) for word in (f"--plugins.{n}.start", "0")]
    return ["--trainer.max_steps", "1", *off("sigmoid", "locca", *others), *awake]


RECIPES = {
    "all": ["--trainer.max_steps", "2"],  # the teacher, silc and tips wake between the two
    "sigmoid": ["--trainer.max_steps", "1", *off("locca", *SSL)],
    "locca": ["--trainer.max_steps", "1", *off("sigmoid", *SSL)],
    "silc": distilling("silc", "tips"),
    "tips": distilling("tips", "silc"),
    "curated": ["--trainer.max_steps", "1", *off("locca", *SSL), "--plugins.brighter", "on"],
}
STRATEGIES = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "fsdp2, compiled and recomputed": [*FSDP2, *BLOCKS],
    "fsdp2, in two copies": COPIES,
    "fsdp2, in two parts": [*FSDP2, "--model.accumulate", "2"],
}
ON_TWO = [
    *((kind, recipe) for recipe in RECIPES for kind in ("ddp", "fsdp2")),
    *((kind, "all") for kind in STRATEGIES if kind not in ("ddp", "fsdp2", "fsdp2, in two copies")),
]
ON_FOUR = [*((kind, recipe) for recipe in RECIPES for kind in ("ddp", "fsdp2")), ("fsdp2, in two copies", "all")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def recipes(toy_shards, toy_tokenizer, folder):
    """The arguments of each recipe: global batches of eight rows, and steps in which nothing is normalised."""
    overlay = folder / "sgd.yaml"
    overlay.write_text(SGD)
    base = [*arguments(toy_shards, toy_tokenizer, folder), "--config", str(overlay)]
    return {name: [*base, *words] for name, words in RECIPES.items()}


@pytest.fixture(scope="module")
def alone(recipes):
    """The steps of one process."""
    install_curator()
    return {name: fit(words).steps for name, words in recipes.items()}


@pytest.fixture(scope="module")
def saving(toy_shards, toy_tokenizer, folder):
    """The arguments of four steps of the published optimizer, clipped, each saved, scored twice."""
    names = [{"names": {"en": f"number {i}"}} for i in range(8)]
    (folder / "classes.json").write_text(json.dumps({"classes": names}))
    toys = {"toys": {"path": str(toy_shards), "classes": str(folder / "classes.json")}}
    boxes = {"boxes": {"path": str(toy_shards)}}
    sets = ["--data.zero_shot", json.dumps(toys), "--data.referring", json.dumps(boxes)]
    scored = [*sets, "--data.eval_batch_size", "5", "--trainer.limit_val_batches", "1.0"]
    steps = ["--trainer.max_steps", "4", "--trainer.gradient_clip_val", "0.5", "--trainer.val_check_interval", "2"]
    wide = [word for name in ("silc", "tips") for word in (f"--plugins.{name}.hidden", "512")]
    base = [*arguments(toy_shards, toy_tokenizer, folder), *wide]

    def into(name, *more):
        return [*base, *scored, *steps, "--trainer.default_root_dir", str(folder / name), *map(str, more)]

    return into


@pytest.fixture(scope="module")
def saved(saving, folder):
    """What one process noted of four steps, and of two more after a warm start from the second."""
    whole = fit(saving("one"))
    warm = fit(saving("one-warm", "--model.warm_start", folder / "one" / "step=2.ckpt", "--trainer.max_steps", "2"))
    return {"whole": whole, "warm": warm}


@pytest.fixture(scope="module")
def two(recipes, saving, saved, folder):
    """What two ranks noted of everything."""
    one, sharded = folder / "one" / "step=2.ckpt", folder / "two" / "step=2.ckpt"
    runs = {f"{kind} {recipe}": [*recipes[recipe], *STRATEGIES[kind]] for kind, recipe in ON_TWO}
    runs |= {
        "whole": saving("two", *FSDP2, "--trainer.callbacks+", "parallel_ranks.SaveInValidation"),
        "resumed": saving("two-resumed", *FSDP2, "--ckpt_path", sharded),
        "resumed from a URL": saving("two-from-a-url", *FSDP2, "--ckpt_path", f"local://{sharded}"),
        "resumed from one": saving("two-from-one", *FSDP2, "--ckpt_path", one),
        "warm": saving("two-warm", *FSDP2, "--model.warm_start", one, "--trainer.max_steps", "2"),
    }
    return on_ranks(2, runs, folder)


@pytest.fixture(scope="module")
def four(recipes, saving, saved, folder):
    """What four ranks noted; two of them have nothing to evaluate but rows that fill up the batch."""
    runs = {f"{kind} {recipe}": [*recipes[recipe], *STRATEGIES[kind]] for kind, recipe in ON_FOUR}
    start = ["--model.warm_start", folder / "one" / "step=2.ckpt", "--trainer.max_steps", "2"]
    runs["warm"] = saving("four-warm", *COPIES, *start, "--data.eval_batch_size", "8")
    (folder / "four").mkdir()
    return on_ranks(4, runs, folder / "four")


def assert_same_steps(found, wanted, *, tolerance=1e-6):
    """Every loss, gradient and weight differs by no more than the tolerance; a loss, by so much of itself."""
    assert len(found) == len(wanted)
    for here, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(here["loss"], there["loss"], rtol=tolerance, atol=tolerance)
        for what in ("gradients", "state"):
            assert here[what].keys() == there[what].keys()
            off = {name: float((here[what][name] - tensor).abs().max()) for name, tensor in there[what].items()}
            assert {name: by for name, by in off.items() if not by <= tolerance} == {}, what


@pytest.mark.parametrize(("kind", "recipe"), ON_TWO)
def test_two_ranks_have_the_losses_gradients_and_weights_of_one(alone, two, kind, recipe):
    assert_same_steps(two[f"{kind} {recipe}"]["steps"], alone[recipe])


@pytest.mark.parametrize(("kind", "recipe"), ON_FOUR)
def test_four_ranks_have_the_losses_gradients_and_weights_of_one(alone, four, kind, recipe):
    assert_same_steps(four[f"{kind} {recipe}"]["steps"], alone[recipe])


def test_fsdp2_cuts_every_parameter_and_ddp_none(alone, two):
    parameters = [n for n in alone["all"][0]["state"] if "centre" not in n]
    assert two["fsdp2 all"]["sharded"] == sorted(parameters)
    assert two["ddp all"]["sharded"] == []


def test_scores_under_fsdp2_are_those_of_one_process_and_leave_no_trace(saved, two):
    assert {n for n in saved["whole"].scores if n.startswith(("zero_shot/toys/", "referring/boxes/"))}
    assert two["whole"]["scores"] == pytest.approx(saved["whole"].scores, abs=1e-3)
    losses, wanted = ([s["loss"] for s in steps] for steps in (two["whole"]["steps"], saved["whole"].steps))
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)


def test_ranks_without_a_row_of_an_evaluation_set_find_the_scores_of_one_process(saved, four):
    assert four["warm"]["scores"] == pytest.approx(saved["warm"].scores, abs=1e-3)


def test_checkpoint_that_is_saved_in_the_midst_of_an_evaluation_is_whole(two, folder):
    assert_same_file(folder / "two" / "in-validation.ckpt", folder / "one" / "step=4.ckpt")


def test_report_is_written_under_fsdp2(two, folder):
    assert (folder / "two" / "report.html").stat().st_size > 1000


def assert_same_file(ours, theirs):
    """Two checkpoints have the same parts, tensors and moments, up to what rounding makes of a few steps."""
    ours, theirs = (read_checkpoint(str(path)) for path in (ours, theirs))
    assert ours.keys() == theirs.keys()
    shapes = [[(n, t.shape) for n, t in file["state_dict"].items()] for file in (ours, theirs)]
    assert shapes[0] == shapes[1]
    (our_state,), (their_state,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert our_state["param_groups"] == their_state["param_groups"]
    assert our_state["state"].keys() == their_state["state"].keys()
    for number, moments in their_state["state"].items():
        for name, value in moments.items():
            found = our_state["state"][number][name]
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, value, rtol=1e-2, atol=1e-5)


def test_checkpoint_of_fsdp2_has_what_that_of_one_process_has(two, folder):
    assert_same_file(folder / "two" / "step=4.ckpt", folder / "one" / "step=4.ckpt")


@pytest.mark.parametrize("run", ["resumed", "resumed from a URL"])
def test_resume_under_fsdp2_is_bitwise(two, run):
    for again, first in zip(two[run]["steps"], two["whole"]["steps"][2:], strict=True):
        assert torch.equal(again["loss"], first["loss"])
        assert all(torch.equal(tensor, first["state"][name]) for name, tensor in again["state"].items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fsdp2_goes_on_from_the_file_of_one_process_and_the_reverse(two, saved, saving, folder):
    back = fit(saving("one-from-two", "--ckpt_path", folder / "two" / "step=2.ckpt")).steps
    for found, name in ((two["resumed from one"]["steps"], "two-from-one"), (back, "one-from-two")):
        losses, wanted = ([step["loss"] for step in steps] for steps in (found, saved["whole"].steps[2:]))
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
        assert_same_file(folder / name / "step=4.ckpt", folder / "one" / "step=4.ckpt")


def test_warm_start_under_fsdp2_takes_weights_and_moments(two, saved, folder):
    losses, wanted = ([step["loss"] for step in steps] for steps in (two["warm"]["steps"], saved["warm"].steps))
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
    assert_same_file(folder / "two-warm" / "step=2.ckpt", folder / "one-warm" / "step=2.ckpt")


def test_batches_that_do_not_divide_are_an_error_on_every_rank(recipes, tmp_path):
    runs = {
        "ranks": [*recipes["sigmoid"], *DDP, "--plugins.fixed.batch_size", "9"],
        "parts": [*recipes["sigmoid"], *FSDP2, "--plugins.fixed.batch_size", "6", "--model.accumulate", "2"],
    }
    errors = errors_on_two_ranks(runs, tmp_path)
    for rank in range(2):
        assert "the global batch of 9 (those of 4 patches) does not divide over 2 processes" in errors["ranks"][rank]
        assert "global batch of 6 does not divide into 2 parts on each of 2 processes" in errors["parts"][rank]
