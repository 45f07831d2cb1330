"""Runs of `siglip2 fit` inside the processes that the XLA tests start."""

import sys
from pathlib import Path

import torch_xla
import torch_xla.debug.metrics as metrics
import torch_xla.runtime as xr
from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI
from siglip2.xla import register

SHARDS, TOKENIZER, OUT = sys.argv[1:4]
RECIPE = str(Path(__file__).with_name("spmd.yaml"))
CPU = ["--trainer.accelerator", "cpu"]
XLA = ["--trainer.accelerator", "xla", "--trainer.strategy"]


def start_xla():
    """Starts the devices, which has to happen before the first backward pass of the process."""
    register()
    xr.use_spmd()
    xr.global_runtime_device_count()


def compiled():
    """Graphs compiled since the process began."""
    return (metrics.metric_data("CompileTime") or [0])[0]


def fallbacks():
    """How often XLA handed an operation back to the CPU since the process began; reading a value counts."""
    return sum(metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::"))


class Watch(Callback):
    """Notes of every step loss, sequence length, graphs, fallbacks, and gradients if asked to.

    A step is here what `optimizer_step` does: losses, backward, clipping, optimizer, and what plugins do after it.
    """

    def __init__(self, gradients):
        self.want_gradients = gradients
        self.losses, self.gradients, self.lengths, self.cut = [], [], [], {}
        self.compiled, self.compiled_in_step, self.fallbacks_in_step = [], [], []

    def on_train_start(self, trainer, pl_module):
        take_step = pl_module.optimizer_step

        def counted(*args, **kwargs):
            before = compiled(), fallbacks()
            take_step(*args, **kwargs)
            self.compiled_in_step.append(compiled() - before[0])
            self.fallbacks_in_step.append(fallbacks() - before[1])

        pl_module.optimizer_step = counted

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.want_gradients:
            torch_xla.sync()  # all in one graph, not one for each
            named = [(n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None]
            self.gradients.append({name: grad.cpu().clone() for name, grad in named})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())
        self.lengths += [batch.views["image"].patches.shape[1]] if "image" in batch.views else []
        self.compiled.append(compiled())

    def on_train_end(self, trainer, pl_module):
        moments = {p: s["exp_avg"] for p, s in trainer.optimizers[0].state.items()}
        parameters = [p for p in pl_module.parameters() if cut(p)]
        trained = [moments[p] for p in parameters if p in moments]
        self.cut = {"parameters": len(parameters), "trained": len(trained), "moments": sum(map(cut, trained))}
        self.losses = [loss.item() for loss in self.losses]


def cut(tensor):
    """Whether a tensor lies in parts on the devices."""
    return tensor.device.type == "xla" and "devices=" in torch_xla._XLAC._get_xla_sharding_spec(tensor)


def fit(name, *arguments, gradients=False, resume=None):
    """Trains into the folder `name` of OUT; returns what was watched."""
    watch = Watch(gradients)
    given = ["--data.train.path", SHARDS, "--data.tokenizer", TOKENIZER, "--trainer.default_root_dir", f"{OUT}/{name}"]
    cli = SigLIP2CLI(["--config", RECIPE, *given, *arguments], command="fit")
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    logged = cli.trainer.callback_metrics
    watch.scores = {k: float(v) for k, v in logged.items() if k.startswith(("zero_shot/", "retrieval/", "referring/"))}
    return watch
