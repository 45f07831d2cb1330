"""Runs of `siglip2 fit` with `--trainer.strategy xla` on two replicas, and on one CPU; prints as JSON what came out.

Run by test_replica_training.py in processes of their own: `whole` from the start, with scores and a report, `resumed`
from a CPU's checkpoint, `stopped` by errors, `interrupted` as by Ctrl-C, `late` with one that the others wait for.
"""

import csv
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch_xla
from lightning.pytorch import Callback
from recipes import CPU, OUT, RECIPE, SHARDS, TOKENIZER
from spmd_training import distance, tensors

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.watchdog import Watchdog
from siglip2.core.checkpoint import read_checkpoint

REPLICAS = ["--trainer.accelerator", "xla", "--trainer.strategy", "xla"]
EXACT = ["--config", str(Path(__file__).with_name("exact.yaml"))]
ONLY_PAIRS = [part for name in ("locca", "ema_teacher", "silc", "tips") for part in (f"--plugins.{name}", "off")]
SAVING = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"dirpath": "${trainer.default_root_dir}", "filename": "{step}", "every_n_train_steps": 2},
}
SAVING["init_args"]["save_top_k"] = -1
SAVED = ["--trainer.callbacks", json.dumps([SAVING]), "--trainer.enable_checkpointing", "true"]
ASLEEP = [word for name in ("ema_teacher", "silc", "tips") for word in (f"--plugins.{name}.start", "0.5")]


class Notes(Callback):
    """Notes of every step the mean loss over replicas and every gradient; raises `error` in the second step."""

    def __init__(self, error=None):
        self.losses, self.gradients, self.ranks, self.error = [], [], (), error

    def on_train_start(self, trainer, pl_module):
        self.ranks = trainer.world_size, type(trainer.strategy).__name__

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and trainer.global_rank == 1 and self.error is not None:
            if self.error == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.error == "interrupted":
                os.killpg(0, signal.SIGINT)
                return
            raise ValueError(self.error)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.device.type == "xla":
            torch_xla.sync()  # all in one graph, not one for each
        named = [(n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None]
        self.gradients.append({name: grad.cpu().clone() for name, grad in named})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach())))


class Late(Callback):
    """Replica 1 is 20 s late, XLA would wait for 10; each reads a gradient that nothing has been computed of yet."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        words = logging.FileHandler(f"{trainer.default_root_dir}/rank{trainer.global_rank}.log")
        logging.getLogger(Watchdog.__module__).addHandler(words)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and trainer.global_rank == 1:
            time.sleep(20)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = pl_module.model.logit_scale.grad
        self.seen.append([torch.equal(gradient, gradient * 2), float(gradient.to("cpu"))])


def fit(name, *arguments, resume=None, error=None, others=()):
    """Trains into the folder `name` of OUT and finishes as `siglip2 fit` does; what was noted, and the CLI."""
    notes = Notes(error)
    given = ["--data.train.path", SHARDS, "--data.tokenizer", TOKENIZER, "--trainer.default_root_dir", f"{OUT}/{name}"]
    cli = SigLIP2CLI(["--config", RECIPE, *EXACT, *given, *arguments], command="fit")
    cli.trainer.callbacks += [*others, notes]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    cli.finish()
    return notes, cli


def read(name, step):
    return tensors(read_checkpoint(f"{OUT}/{name}/step={step}.ckpt"))


def furthest(runs):
    """Largest difference of any gradient of any step of two runs."""
    a, b = (run.gradients for run in runs)
    assert [g.keys() for g in a] == [g.keys() for g in b]
    return [max(float((x[name] - y[name]).abs().max()) for name in x) for x, y in zip(a, b, strict=True)]


def scores_of(cli):
    logged = cli.trainer.callback_metrics
    return {k: float(v) for k, v in logged.items() if k.startswith(("zero_shot/", "retrieval/"))}


def whole(classes):
    """All losses for two steps, then scores: 320 prompts, of which replicas encode 256 and 64, and batches of five."""
    prompts = [f"{number} {{}}" for number in range(40)]
    sets = {
        "zero_shot": {"toys": {"path": SHARDS, "classes": classes, "templates": prompts}},
        "retrieval": {"pairs": {"path": SHARDS, "fields": {"caption": "json.caption"}}},
    }
    words = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1.0", "--data.eval_batch_size", "5"]
    words += [*SAVED, "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "${trainer.default_root_dir}"]
    words += [part for kind, found in sets.items() for part in (f"--data.{kind}", json.dumps(found))]
    replicas, cli = fit("replicas", *REPLICAS, *words)
    cpu, cli_cpu = fit("cpu", *CPU, *words)  # not before: replicas need a process without a backward pass so far
    states = [dict(c.model.state_dict()) for c in (cli_cpu, cli)]
    report = Path(OUT, "replicas", "report.html").read_text()
    (table,) = Path(OUT, "replicas").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(table.open()) if row["train/loss"]]
    return {
        "ranks": replicas.ranks,
        "losses": [cpu.losses, replicas.losses],
        "gradients": furthest((cpu, replicas)),
        **saved(2),
        "in the process that started them": max(
            float((states[0][name] - states[1][name]).abs().max()) for name in states[0]
        ),
        "step": cli.trainer.global_step,
        "scores": [scores_of(c) for c in (cli_cpu, cli)],
        "rows": [[len(c.zero_shot.rows), len(c.retrieval.rows)] for c in (cli_cpu, cli)],
        "logged": [int(row["step"]) for row in rows],
        "curve": sorted(cli.report.history["train/loss"]),
        "report": "1 x 2 XLA devices" in report,
        "files": sorted(path.name for path in Path(OUT, "replicas").glob("*.ckpt")),
    }


def resumed():
    """Two phases on a CPU; its file after the first of them, with what sleeps until then, is gone on with by both."""
    words = ["--trainer.max_steps", "4", *ASLEEP, *SAVED, "--report", "false"]
    words += ["--plugins.silc.freeze_prototypes", "0.2"]  # in the first step after it wakes, not in the second
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        expected = pool.submit(losses_on_cpu, words).result()
    replicas, _ = fit("replicas", *REPLICAS, *words, resume=f"{OUT}/cpu/step=2.ckpt")
    before, after = (parts(read("cpu", step))[0] for step in (2, 4))
    return {"losses": [expected[2:], replicas.losses], **saved(4), "moved": distance(before, after)}


def losses_on_cpu(words):
    return fit("cpu", *CPU, *words)[0].losses


def parts(named):
    """Parameters and buffers, and moments."""
    moments = {name: tensor for name, tensor in named.items() if "/" in name}
    return {name: tensor for name, tensor in named.items() if name not in moments}, moments


def saved(step):
    """How far the replicas' checkpoint of a step is from the CPU's."""
    kinds = zip(("weights", "moments"), parts(read("cpu", step)), parts(read("replicas", step)), strict=True)
    return {kind: distance(expected, found) for kind, expected, found in kinds}


def caught(name, *arguments, **settings):
    try:
        fit(name, *REPLICAS, *ONLY_PAIRS, "--trainer.max_steps", "3", *arguments, **settings)
    except (ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error), str(error.__cause__)]
    return None


def stopped():
    """The errors of runs that one replica or both end."""
    return {
        "one": caught("one", error="replica 1 does not like this batch"),
        "killed": caught("killed", error="killed"),
        "both": caught("both", "--plugins.fixed.batch_size", "7"),
    }


def interrupted():
    """The exit status of a run whose processes all get SIGINT in its second step, and whether one of them is left."""

    def run():
        os.setsid()
        fit("interrupted", *REPLICAS, *ONLY_PAIRS, "--trainer.max_steps", "100000", error="interrupted")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(240)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return {"status": process.exitcode, "left": False}
    return {"status": process.exitcode, "left": True}


def late():
    """What `Late` saw on two replicas, and on one CPU, and what a watchdog said that speaks after 4 s."""
    seen = []
    for name, devices in (("replicas", REPLICAS), ("cpu", CPU)):
        words = [*devices, *ONLY_PAIRS, "--trainer.max_steps", "2", "--report", "false"]
        callback = Late()
        fit(name, *words, others=[callback, Watchdog(4.0)])
        seen.append(callback.seen)
    return {"seen": seen, "words": Path(OUT, "replicas", "rank0.log").read_text()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {run.__name__: run for run in (whole, resumed, stopped, interrupted, late)}
    print(json.dumps(kinds[sys.argv[4]](*sys.argv[5:])))
