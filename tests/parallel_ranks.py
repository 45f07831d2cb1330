"""Runs of `siglip2 fit` on one process or several, and what each step's gradients were."""

import contextlib
import os
import socket
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from staged import arguments
from torch.distributed.tensor import DTensor

import siglip2.registry
from siglip2 import IMAGE, Plugin, hookimpl
from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI

SCORES = ("zero_shot/", "retrieval/", "referring/")
LIMIT_S = 240  # for what takes seconds on an idle machine


class Brighter(Plugin):
    """Keeps of every two neighbouring rows the one whose picture is brighter, after a look at all embeddings."""

    name = "brighter"

    @hookimpl
    def views(self):
        return [IMAGE]

    @hookimpl
    def curate(self, step):
        assert step.encode_image("image").embedding.shape[0] == step.batch.size
        light = step.view("image").patches.flatten(1).float().mean(1).unflatten(0, (-1, 2))
        return light.argmax(1) + 2 * torch.arange(len(light), device=light.device)


def install_curator(cls=Brighter):
    """Makes a curator known as a plugin of another package."""

    class Module:
        @hookimpl
        def register_plugins(self):
            return [cls]

    dist = SimpleNamespace(name="curator-package", version="0")
    point = SimpleNamespace(name=cls.name, value=cls.name, dist=dist, load=Module)
    siglip2.registry.entry_points = lambda group: [point]
    siglip2.registry.catalogue.cache_clear()


def full(tensor):
    """A tensor as one process has it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Notes(Callback):
    """Notes losses and gradients of every step, and which parameters lie in shards."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.named_parameters())
        self.sharded = sorted(name for name, p in named.items() if isinstance(p, DTensor))
        self.gradients = {name: full(p.grad) for name, p in named.items() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {name: full(tensor) for name, tensor in pl_module.state_dict().items()}
        loss = trainer.callback_metrics["train/loss"].clone()
        self.steps.append({"loss": loss, "gradients": self.gradients, "state": state})


class SaveInValidation(Callback):
    """Saves after the first batch of each evaluation set, as SIGUSR1 would."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/in-validation.ckpt")


def fit(words):
    """Trains and scores as `siglip2 fit` does; returns what was noted."""
    cli, notes = SigLIP2CLI([str(word) for word in words], command="fit"), Notes()
    cli.trainer.callbacks.append(notes)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    cli.finish()
    notes.scores = {n: float(v) for n, v in cli.trainer.callback_metrics.items() if n.startswith(SCORES)}
    return notes


def _meet(rank, port):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(rank, port, runs, folder):
    _meet(rank, port)
    install_curator()
    for name, words in runs.items():
        notes = fit(words)
        if rank == 0:
            found = {"steps": notes.steps, "sharded": notes.sharded, "scores": notes.scores}
        else:
            found = {"steps": [{"loss": step["loss"]} for step in notes.steps]}
        torch.save(found, f"{folder}/{name}-{rank}.pt")


def on_ranks(count, runs, folder):
    """Trains each of the runs on `count` processes, one after the other; what rank 0 noted, with the mean losses."""
    runs = {name: [*words, "--trainer.devices", str(count)] for name, words in runs.items()}
    mp.spawn(_rank, args=(_free_port(), runs, str(folder)), nprocs=count)
    noted = {}
    for name in runs:
        ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(count)]
        for number, step in enumerate(ranks[0]["steps"]):
            step["loss"] = torch.stack([rank["steps"][number]["loss"] for rank in ranks]).mean()
        noted[name] = ranks[0]
    return noted


def _failing_rank(rank, port, runs, folder, curator):
    _meet(rank, port)
    install_curator(curator)
    for name, words in runs.items():
        with (
            open(f"{folder}/{name}-{rank}.txt", "w") as file,
            contextlib.redirect_stderr(file),
            contextlib.suppress(SystemExit),
        ):
            main(["fit", *words])
            raise AssertionError(f"{name} was not refused")


def errors_on_two_ranks(runs, folder, curator=Brighter):
    """What each of two ranks prints as its error, by run; all runs fail, and none leaves a rank behind."""
    runs = {name: [str(word) for word in (*words, "--trainer.devices", 2)] for name, words in runs.items()}
    ranks = mp.spawn(_failing_rank, args=(_free_port(), runs, str(folder), curator), nprocs=2, join=False).processes
    for process in ranks:
        process.join(LIMIT_S)
    hanging = [number for number, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    assert (hanging, [process.exitcode for process in ranks]) == ([], [0, 0])
    return {name: [(folder / f"{name}-{number}.txt").read_text() for number in range(2)] for name in runs}


__all__ = ["arguments", "errors_on_two_ranks", "fit", "install_curator", "on_ranks"]
