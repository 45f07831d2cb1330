"""Runs of staged.yaml, and what each of their steps was made of."""

from pathlib import Path

from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI

FOLDER = Path(__file__).parent
SLEEPERS = ("plugins.ema_teacher.", "plugins.silc.", "plugins.tips.")


class Diary(Callback):
    """Notes what each step was made of, and how often each network ran in it."""

    def __init__(self):
        self.steps = {}

    def on_fit_start(self, trainer, pl_module):
        self.initial = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_start(self, trainer, pl_module):
        self.calls = []
        plugins = pl_module.plugins
        networks = {"student": pl_module.model.vision, "text": pl_module.model.text}
        networks |= {"decoder": plugins["locca"].decoder} if "locca" in plugins else {}
        networks |= {n: p for n, p in plugins.items() if n == "ema_teacher"}
        for name, network in networks.items():
            network.register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.clear()
        self.before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        networks = ("student", "text", "ema_teacher", "decoder")
        self.steps[trainer.global_step] = {
            "views": batch.views,
            "calls": {name: self.calls.count(name) for name in networks},
            "loss": outputs["loss"].item(),
            "before": self.before,
            "gradients": self.gradients,
            "terms": {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("train/")},
            "warm": [name for name, p in pl_module.named_parameters() if p.grad is not None],
            "state": {name: tensor.clone() for name, tensor in pl_module.state_dict().items()},
        }


def arguments(shards, tokenizer, folder):
    """Arguments of `siglip2 fit` for staged.yaml, into a folder."""
    return [
        *("--config", str(FOLDER / "tiny.yaml")),
        *("--data.train.path", str(shards)),
        *("--data.tokenizer", str(tokenizer)),
        *("--trainer.default_root_dir", str(folder)),
        *("--config", str(FOLDER / "staged.yaml")),
    ]


def run(arguments, *extra):
    """Trains and returns the diary."""
    cli, diary = SigLIP2CLI([*arguments, *map(str, extra)], command="fit"), Diary()
    cli.trainer.callbacks.append(diary)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    return diary


def optimizer_steps(checkpoint):
    """How many steps the optimizer has taken with each parameter, by name."""
    saved = checkpoint["optimizer_states"][0]
    names = {i: n for g in saved["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    return {names[i]: int(state["step"]) for i, state in saved["state"].items()}, set(names.values())


def assert_same_end(diary, other, *, after):
    """The losses after a step and the last state are bitwise the same."""
    assert {s: seen["loss"] for s, seen in diary.steps.items() if s > after} == {
        s: seen["loss"] for s, seen in other.steps.items() if s > after
    }
    end, wanted = diary.steps[10]["state"], other.steps[10]["state"]
    assert [name for name in wanted if not (name in end and bool((end[name] == wanted[name]).all()))] == []
