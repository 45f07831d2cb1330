"""Runs recipes under the overlays for TPUs, with everything that `siglip2 fit` adds to a run; prints JSON.

Run by test_spmd_overlays.py in a process of its own.
"""

import json
import logging
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from recipes import CPU, OUT, RECIPE, SHARDS, TOKENIZER, start_xla

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.watchdog import Watchdog
from siglip2.core.checkpoint import read_checkpoint

ONLY_PAIRS = [part for name in ("locca", "ema_teacher", "silc", "tips") for part in (f"--plugins.{name}", "off")]
IN_A_THREAD = ["--trainer.plugins", "lightning.pytorch.plugins.AsyncCheckpointIO"]
PATIENCE_S = 0.5


class Trouble(Callback):
    """Gets SIGUSR1 in the second step, and takes its time before the last; notes losses."""

    def __init__(self):
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            signal.raise_signal(signal.SIGUSR1)
        if batch_idx == 3:
            time.sleep(3 * PATIENCE_S)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Said(logging.Handler):
    """The lines of the log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def fit(name, *arguments):
    """`siglip2 fit` for four steps into the folder `name`; the trainer, losses, what was logged."""
    given = ["--data.train.path", SHARDS, "--data.tokenizer", TOKENIZER, "--trainer.default_root_dir", f"{OUT}/{name}"]
    cli = SigLIP2CLI(["--config", RECIPE, *given, *ONLY_PAIRS, *arguments], command="fit")
    trouble, said = Trouble(), Said()
    cli.trainer.callbacks.append(trouble)
    next(c for c in cli.trainer.callbacks if isinstance(c, Watchdog)).stall_after = PATIENCE_S
    logging.getLogger("siglip2").addHandler(said)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.finish()
    return cli.trainer, trouble.losses, said.lines


def refused(*arguments):
    """The error of a run."""
    try:
        fit("refused", *arguments)
    except ValueError as error:
        return str(error)
    return None


def main():
    start_xla()
    # a CPU multiplies in float32 here, so that weights can be compared
    exact = ["--trainer.precision", "32-true"]
    _, on_cpu, _ = fit("cpu", *CPU)
    trainer, losses, said = fit("host", "--config", "hardware/tpu_host", *exact, *IN_A_THREAD)
    states = [read_checkpoint(f"{OUT}/{name}/step=4.ckpt")["state_dict"] for name in ("cpu", "host")]
    host = {
        "strategy": type(trainer.strategy).__name__,
        "losses": losses,
        "weights": max((states[0][name] - states[1][name]).abs().max().item() for name in states[0]),
        "saved on signal": torch.load(f"{OUT}/host/last.ckpt", weights_only=True)["global_step"],
        "left over": [path.name for path in Path(OUT, "host").glob(".*")],
        "said": [line for line in said if "SIGUSR1" in line or "in training step 3" in line],
        "report": "1 x 4 XLA devices" in Path(OUT, "host", "report.html").read_text(),
    }
    trainer, losses, _ = fit("pod", "--config", "hardware/tpu_pod")
    pod = {
        "precision": trainer.precision,
        "sharded": trainer.strategy.shard_parameters,
        "losses": losses,
        "folders": sorted(path.name for path in Path(OUT, "pod").glob("*.ckpt") if path.is_dir()),
    }
    error = refused("--config", "hardware/tpu_pod", *IN_A_THREAD)
    print(json.dumps({"cpu": on_cpu, "host": host, "pod": pod, "refused": error}))


if __name__ == "__main__":
    main()
