"""Runs of `siglip2 fit` in processes of their own, to be killed or sent signals.

They are forked from a server that has imported everything, so that twenty of them start in the time of one.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import signal
from pathlib import Path

import PIL.Image
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import XLAAccelerator

import siglip2.core.checkpoint
from siglip2.cli.training import SigLIP2CLI
from siglip2.registry import catalogue

# what would be imported only when a run needs it
PIL.Image.init()
XLAAccelerator.is_available()
catalogue()

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["killable"])
LIMIT_S = 240  # for what takes seconds on an idle machine


class Notes(Callback):
    """Tells every step to the parent as it begins, and writes what it was made of into diary.jsonl when it is done."""

    def __init__(self, pipe, path):
        self.pipe, self.path = pipe, path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pipe.send(("step", trainer.global_step))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        line = {"step": trainer.global_step, "keys": batch.keys, "loss": outputs["loss"].item().hex()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.pipe.send(("validation", trainer.global_step))


class Pause(Callback):
    """Waits at the end of one step, before or after it is saved, until the parent says so."""

    def __init__(self, pipe, step):
        self.pipe, self.step = pipe, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.pipe.send(("paused", trainer.global_step))
            self.pipe.recv()


def main(pipe, arguments, folder, *, pause=None, die_in_write=None, environment=None):
    """Runs `siglip2 fit` in this process, which `Run` has made.

    Args:
        pipe: to the parent.
        arguments: of the command.
        folder: for diary.jsonl and what is printed.
        pause: step at the end of which it waits for the parent.
        die_in_write: step whose checkpoint this process kills itself in, when half of it is written.
        environment: variables to set.
    """
    os.setsid()  # so that its loader workers can be ended with it
    os.environ.update(environment or {})
    multiprocessing.set_start_method("fork", force=True)  # for the loader, as in a run from the command line
    torch.set_num_threads(1)
    with open(f"{folder}/{os.environ.get('LOCAL_RANK', 0)}.log", "a") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    if die_in_write is not None:
        siglip2.core.checkpoint.torch = HalfWriting(die_in_write)
    cli = SigLIP2CLI(arguments, command="fit")
    cli.trainer.callbacks.insert(0, Notes(pipe, f"{folder}/diary-{os.environ.get('LOCAL_RANK', 0)}.jsonl"))
    if pause is not None:
        cli.trainer.callbacks.insert(1, Pause(pipe, pause))
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from())
    pipe.send(("end", cli.trainer.global_step))


class HalfWriting:
    """torch for the module that writes checkpoints: that of one step is cut in the middle by SIGKILL."""

    def __init__(self, step):
        self.step = step

    def __getattr__(self, name):
        return getattr(torch, name)

    def save(self, checkpoint, file):
        if checkpoint["global_step"] != self.step:
            torch.save(checkpoint, file)
            return
        torch.save(checkpoint, file)
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)


class Run:
    """One process that trains; a context that ends it and all that it started.

    Args:
        arguments: of `siglip2 fit`.
        folder: for diary.jsonl and the log.
        more: options of `main`.
    """

    def __init__(self, arguments, folder, **more):
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # or the server would not find this module
        forkserver.ensure_running()
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
        self.pipe, child = SERVER.Pipe()
        self.process = SERVER.Process(target=main, args=(child, list(arguments), str(folder)), kwargs=more)
        self.process.start()
        child.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def until(self, kind, count=1):
        """The number that came with the `count`-th word of a kind from now on; None if the process ends before."""
        while count:
            assert self.pipe.poll(LIMIT_S), f"no word from the run in {LIMIT_S} s"
            try:
                word, number = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                return None
            count -= word == kind
        return number

    def send(self, signal_number):
        os.kill(self.process.pid, signal_number)

    def go_on(self):
        """Lets a run that is paused go on."""
        self.pipe.send("go on")

    def exit_code(self):
        """Waits for the end of the process and returns its status; negative for a signal."""
        while self.until("end") is not None:
            pass
        self.process.join(LIMIT_S)
        return self.process.exitcode


def diary(folder, rank=0):
    """Step -> what it was made of; each step that was run more than once was the same each time."""
    steps = {}
    for line in Path(folder, f"diary-{rank}.jsonl").read_text().splitlines():
        seen = json.loads(line)
        assert steps.setdefault(seen.pop("step"), seen) == seen
    return steps


def assert_same_checkpoint(path, other):
    """Weights and optimizer state of two checkpoints are bitwise the same."""
    a, b = (torch.load(p, weights_only=True) for p in (path, other))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert [n for n, t in a["state_dict"].items() if not torch.equal(t, b["state_dict"][n])] == []
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    assert states[0].keys() == states[1].keys()
    moments = [(n, key) for n, found in states[0].items() for key in found]
    assert [(n, k) for n, k in moments if not torch.equal(states[0][n][k], states[1][n][k])] == []
