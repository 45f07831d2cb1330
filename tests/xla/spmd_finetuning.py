"""Adapters and spikes on the CPU and on four XLA devices; prints as JSON how far they are apart.

Run by test_spmd_finetuning.py in a process of its own.
"""

import json
import math

import torch
from lightning.pytorch import Callback
from recipes import CPU, OUT, XLA, fit, start_xla

from siglip2.core.checkpoint import read_checkpoint

SHARDED = [*XLA[:2], "--trainer.strategy.class_path", "siglip2.xla.XLASPMDStrategy"]
SHARDED += ["--trainer.strategy.init_args.shard_parameters", "true", "--trainer.strategy.init_args.min_shard", "256"]
LORA = ["--config", "finetune/lora", "--plugins.temperature.frozen", "0.5", "--model.logit_scale", "1.0"]
LORA += [word for name in ("locca", "ema_teacher", "silc", "tips") for word in (f"--plugins.{name}", "off")]
LORA += ["--model.optimizer.init_args.lr", "0.01", "--model.optimizer.init_args.eps", "0.001"]
SPIKE = [
    "--trainer.callbacks+=siglip2.core.callbacks.spikes.RewindSpikes",
    "--trainer.callbacks+=spmd_finetuning.Poison",
]


class Poison(Callback):
    """Makes the bias no number before the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.logit_bias.fill_(math.nan)


def apart(some, others):
    """The largest difference of any number of two sets of tensors."""
    assert some.keys() == others.keys(), some.keys() ^ others.keys()
    return max((tensor.float() - others[name].float()).abs().max().item() for name, tensor in some.items())


def weights(name, step=4):
    """The tensors of a checkpoint: the towers with their adapters inside, and the adapters beside them."""
    return read_checkpoint(f"{OUT}/{name}/step={step}.ckpt")["state_dict"]


def main():
    start_xla()
    cpu, spmd = fit("cpu", *CPU, *LORA, gradients=True), fit("spmd", *XLA, "xla_spmd", *LORA, gradients=True)
    spikes = {
        name: fit(name, *device, *LORA, *SPIKE) for name, device in {"cpu-spike": CPU, "sharded": SHARDED}.items()
    }
    result = {
        "losses": {"cpu": cpu.losses, "spmd": spmd.losses},
        "after the spike": {name: watch.losses[3] for name, watch in spikes.items()},
        "gradients": [apart(a, b) for a, b in zip(cpu.gradients, spmd.gradients, strict=True)],
        "weights": {
            "spmd": apart(weights("spmd"), weights("cpu")),
            "sharded": apart(weights("sharded"), weights("cpu-spike")),
        },
        "learned": apart(weights("cpu"), weights("cpu", 2)),
        "left out": apart(weights("cpu"), weights("cpu-spike")),
        "fallbacks": spmd.fallbacks_in_step,
        "cut": spikes["sharded"].cut,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
