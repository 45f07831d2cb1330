"""Computes the pair loss on four devices; prints as JSON what is compiled for one of them, and its error.

Run by test_spmd_pairs.py in a process of its own, which asks XLA for what it compiles (--xla_dump_to).
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from siglip2.core.pairs import pair_loss
from siglip2.xla.sharding import all_devices

ROWS, WIDTH = 512, 32
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=-1) for _ in range(2)]


def loss_and_gradients(x, y, scale, bias, block):
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = pair_loss(x, y, scale=scale, bias=bias, block=block)
    return loss.detach(), *torch.autograd.grad(loss, [x, y])


def compiled_for_one_device(folder):
    """Sizes of float32 matrices, and names of the collectives, in the largest program."""
    texts = [path.read_text() for path in Path(folder).glob("*after_optimizations.txt")]
    largest = max(texts, key=len)
    matrices = {tuple(map(int, found)) for found in re.findall(r"f32\[(\d+),(\d+)\]", largest)}
    collectives = re.findall(rf"= [^=]*? ({'|'.join(COLLECTIVES)})\(", largest)
    return sorted(matrices), {name: collectives.count(name) for name in sorted(set(collectives))}


def main():
    block, folder = int(sys.argv[1]) or None, sys.argv[2]
    xr.use_spmd()
    mesh, device = all_devices(), torch_xla.device()
    spec = xs.ShardingSpec(mesh, ("data", None))
    scale, bias = torch.full((1,), 2.0), torch.full((1,), -5.0)
    x, y = xm.send_cpu_data_to_device(inputs(), device, input_sharding=spec)
    found = loss_and_gradients(x, y, scale.to(device), bias.to(device), block)
    torch_xla.sync()
    expected = loss_and_gradients(*(t.double() for t in inputs()), scale.double(), bias.double(), None)
    errors = [((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    matrices, collectives = compiled_for_one_device(folder)
    print(json.dumps({"errors": errors, "matrices": matrices, "collectives": collectives}))


if __name__ == "__main__":
    main()
