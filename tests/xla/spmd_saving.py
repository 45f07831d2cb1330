"""Saves tensors and a run whose parts lie on four XLA devices; prints as JSON what was copied and compiled.

Run by test_spmd_saving.py in a process of its own, since XLA's counters are those of the whole process.
"""

import json

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from recipes import XLA, compiled, cut, fit, start_xla

from siglip2.xla.checkpoint import on_cpu
from siglip2.xla.sharding import all_devices

ONLY_PAIRS = [word for name in ("locca", "ema_teacher", "silc", "tips") for word in (f"--plugins.{name}", "off")]
SPIKES = {"class_path": "siglip2.core.callbacks.spikes.RewindSpikes", "init_args": {"every": 2}}
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
PARTS = {  # shape, devices along each axis of a mesh, axis at each dimension
    "rows": ((8, 6), (4,), ("a", None)),
    "columns": ((8, 12), (4,), (None, "a")),
    "uneven rows": ((5, 3), (4,), ("a", None)),
    "two copies of each part": ((4, 6), (2, 2), (None, "b")),
    "whole": ((3, 3), (4,), (None, None)),
}


def laid_out(shape, devices, places, dtype):
    """A tensor of different numbers on the CPU, and the same one on the devices."""
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    mesh = xs.Mesh(np.arange(4), devices, tuple("ab"[: len(devices)]))
    return tensor, xs.mark_sharding(tensor.to(torch_xla.device()), mesh, places).global_tensor


def copied(num_hosts):
    """Which layouts come back as they were, how many lie in parts, and the graphs that each of two copies compiles."""
    named = {f"{name}, {dtype}": laid_out(*layout, dtype) for name, layout in PARTS.items() for dtype in DTYPES}
    torch_xla.sync()
    there = {"nested": [{name: tensor for name, (_, tensor) in named.items()}]}
    seen = [compiled()]
    for _ in range(2):
        back = on_cpu(there, num_hosts=num_hosts)["nested"][0]
        seen.append(compiled())
    return {
        "wrong": [name for name, (tensor, _) in named.items() if not torch.equal(back[name], tensor)],
        "parts": sum(cut(tensor) for _, tensor in named.values()),
        "compiled": np.diff(seen).tolist(),
    }


def main():
    start_xla()
    all_devices()
    result = {num_hosts: copied(num_hosts) for num_hosts in (1, 2)}
    more = [f"--trainer.callbacks+={json.dumps(SPIKES)}", "--trainer.max_steps", "6"]
    watch = fit("saving", *XLA, "xla_spmd_sharded", *ONLY_PAIRS, *more)
    print(json.dumps({"copied": result, "run": {"cut": watch.cut, "compiled": watch.compiled}}))


if __name__ == "__main__":
    main()
