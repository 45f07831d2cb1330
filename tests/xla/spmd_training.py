"""Trains on the CPU and on four XLA devices, whole and sharded, with stops; prints as JSON how far they are apart.

Run by test_spmd.py in a process of its own: XLA has to be up before the first backward, and reads its settings once.
"""

import json
from pathlib import Path

from recipes import CPU, OUT, XLA, fit, start_xla

from siglip2.core.checkpoint import read_checkpoint
from siglip2.xla.checkpoint import read_sharded

SHARDED = [*XLA[:2], "--trainer.strategy.class_path", "siglip2.xla.XLASPMDStrategy"]
SHARDED += ["--trainer.strategy.init_args.shard_parameters", "true"]
MOVING = ("model.", "plugins.ema_teacher.", "plugins.silc.")
TIPS = [word for name in ("sigmoid", "locca", "silc") for word in (f"--plugins.{name}", "off")]
TIPS += [word for name in ("ema_teacher", "tips") for word in (f"--plugins.{name}.start", "0")]
TIPS += ["--trainer.max_steps", "2"]
FOLDERS = ["--trainer.strategy.init_args.sharded_checkpoints", "true"]


def read(name, step):
    """The checkpoint of a run at a step, file or folder."""
    path = Path(OUT, name, f"step={step}.ckpt")
    return read_sharded(path) if path.is_dir() else read_checkpoint(str(path))


def fit_and_read(name, *arguments):
    """Trains for two steps; the checkpoint."""
    fit(name, *arguments)
    return read(name, 2)


def tensors(checkpoint):
    """Parameters, buffers and moments of a checkpoint, by name."""
    (optimizer,) = checkpoint["optimizer_states"]
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    moments = {f"{names[n]}/{k}": v for n, state in optimizer["state"].items() for k, v in state.items()}
    return {**checkpoint["state_dict"], **moments}


def only(part, named):
    """The parameters whose names begin with `part`."""
    return {name: tensor for name, tensor in named.items() if name.startswith(part) and "/" not in name}


def distance(some, others):
    """Largest difference of any number, as a share of the largest of its kind: the product, a plugin, or moments."""
    assert some.keys() == others.keys(), some.keys() ^ others.keys()
    kinds = {}
    for name, tensor in some.items():
        kind = name.split("/")[-1] if "/" in name else name.removeprefix("plugins.").split(".")[0]
        apart, size = kinds.get(kind, (0.0, 0.0))
        apart = max(apart, (tensor - others[name]).abs().max().item())
        kinds[kind] = apart, max(size, tensor.abs().max().item())
    return max(apart / max(size, 1e-12) for apart, size in kinds.values())


def main():
    start_xla()
    cpu = fit("cpu", *CPU, gradients=True)
    spmd = fit("spmd", *XLA, "xla_spmd", gradients=True)
    sharded = fit("sharded", *SHARDED, *FOLDERS)
    expected = {step: tensors(read("cpu", step)) for step in (2, 4)}
    result = {
        "losses": {"cpu": cpu.losses, "spmd": spmd.losses, "sharded": sharded.losses},
        "gradients": [distance(a, b) for a, b in zip(cpu.gradients, spmd.gradients, strict=True)],
        "moved": {part: distance(*(only(part, expected[step]) for step in (2, 4))) for part in MOVING},
        "cut": {"spmd": spmd.cut, "sharded": sharded.cut},
        "folders": Path(OUT, "sharded", "step=2.ckpt").is_dir(),
    }
    fit("from_file", *SHARDED, resume=f"{OUT}/cpu/step=2.ckpt")
    fit("from_folder", *XLA, "xla_spmd", resume=f"{OUT}/sharded/step=2.ckpt")
    runs = {name: tensors(read(name, 4)) for name in ("spmd", "sharded", "from_file", "from_folder")}
    result["weights"] = {name: distance(expected[4], found) for name, found in runs.items()}
    alone = {"cpu": CPU, "spmd": [*XLA, "xla_spmd"], "sharded": [*SHARDED, *FOLDERS]}
    saved = {name: tensors(fit_and_read(f"tips-{name}", *device, *TIPS)) for name, device in alone.items()}
    result["tips"] = {name: distance(saved["cpu"], saved[name]) for name in ("spmd", "sharded")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
