"""One run with all losses: teacher, silc and tips sleep until their start, then wake together; resume is exact."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import read_checkpoint

STAGED = ("--config", str(Path(__file__).parent / "staged.yaml"))
SLEEPERS = ("plugins.ema_teacher.", "plugins.silc.", "plugins.tips.")
BOUNDARY = 5


class Diary(Callback):
    """Notes what each step was made of, and how often each network ran in it."""

    def __init__(self):
        self.steps = {}

    def on_fit_start(self, trainer, pl_module):
        self.initial = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_start(self, trainer, pl_module):
        self.calls = []
        networks = {"student": pl_module.model.vision, "text": pl_module.model.text}
        networks |= {"teacher": pl_module.plugins["ema_teacher"], "decoder": pl_module.plugins["locca"].decoder}
        for name, network in networks.items():
            network.register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        counts = {name: self.calls.count(name) for name in ("student", "text", "teacher", "decoder")}
        self.steps[trainer.global_step] = {
            "views": sorted(batch.views),
            "calls": counts,
            "loss": outputs["loss"].item(),
            "state": {name: tensor.clone() for name, tensor in pl_module.state_dict().items()},
        }


def run(arguments, *extra):
    cli, diary = SigLIP2CLI([*arguments, *STAGED, *extra], command="fit"), Diary()
    cli.trainer.callbacks.append(diary)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    return diary


@pytest.fixture(scope="module")
def whole(toy_shards, toy_tokenizer, tmp_path_factory):
    """A run of ten steps, its arguments and its folder."""
    folder = tmp_path_factory.mktemp("staged")
    arguments = [
        *("--config", str(Path(__file__).parent / "tiny.yaml")),
        *("--data.train.path", str(toy_shards)),
        *("--data.tokenizer", str(toy_tokenizer)),
        *("--trainer.default_root_dir", str(folder)),
    ]
    return run(arguments), arguments, folder


def test_crops_are_made_and_the_teacher_runs_only_once_their_plugins_are_awake(whole):
    before = {"views": ["caption", "image", "locca", "locca_parallel"]}
    after = {"views": sorted([*before["views"], "global", "local", "mask"])}
    for step, seen in whole[0].steps.items():
        assert seen["views"] == (before if step <= BOUNDARY else after)["views"]


def test_no_view_is_encoded_twice_by_the_same_network(whole):
    """Student: the image, the local crops together, the masked global view. Teacher: the global view."""
    early = {"student": 1, "text": 1, "teacher": 0, "decoder": 1}
    late = {"student": 3, "text": 1, "teacher": 1, "decoder": 1}
    for step, seen in whole[0].steps.items():
        assert seen["calls"] == (early if step <= BOUNDARY else late)


def test_sleeping_plugins_do_not_move_and_awake_ones_do(whole):
    diary = whole[0]
    names = [n for n in diary.initial if n.startswith(SLEEPERS)]
    asleep = [n for n in names if not torch.equal(diary.initial[n], diary.steps[BOUNDARY]["state"][n])]
    assert asleep == []
    still = [n for n in names if torch.equal(diary.initial[n], diary.steps[10]["state"][n])]
    assert still == []


def test_teacher_starts_as_the_student_of_the_step_at_which_it_wakes(whole):
    states = {step: seen["state"] for step, seen in whole[0].steps.items()}
    name = "blocks.0.attn.qkv.weight"
    student = [states[step][f"model.vision.{name}"].double() for step in (BOUNDARY, BOUNDARY + 1)]
    teacher = states[BOUNDARY + 1][f"plugins.ema_teacher.vision.{name}"].double()
    torch.testing.assert_close(teacher, 0.9 * student[0] + 0.1 * student[1], rtol=1e-6, atol=1e-7)


def test_optimizer_state_of_new_parameters_is_fresh_and_the_rest_goes_on(whole):
    saved = read_checkpoint(str(whole[2] / f"step={BOUNDARY + 1}.ckpt"))["optimizer_states"][0]
    names = {i: n for g in saved["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    counts = {names[i]: int(state["step"]) for i, state in saved["state"].items()}
    assert counts["model.text.norm.weight"] == BOUNDARY + 1
    assert counts["plugins.locca.decoder.out.weight"] == BOUNDARY + 1
    assert counts["plugins.silc.head.prototype_weight"] == 1
    assert counts["plugins.tips.mask_token"] == 1
    assert not any(name.startswith("plugins.ema_teacher.") for name in names.values())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_resume_on_either_side_of_the_boundary_is_bitwise(whole, step, tmp_path):
    diary, arguments, folder = whole
    again = run(
        arguments, "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(folder / f"step={step}.ckpt")
    )
    assert {s: seen["loss"] for s, seen in again.steps.items()} == {
        s: seen["loss"] for s, seen in diary.steps.items() if s > step
    }
    end, other = again.steps[10]["state"], diary.steps[10]["state"]
    assert [name for name in other if not torch.equal(end[name], other[name])] == []


def test_recipe_with_silc_and_no_teacher_fails_with_the_plugin_to_add(tiny_recipe):
    with pytest.raises((SystemExit, ValueError), match="needs the encoder 'teacher': add `ema_teacher`"):
        SigLIP2CLI([*tiny_recipe, *STAGED, "--plugins.ema_teacher", "off"], command="fit")
