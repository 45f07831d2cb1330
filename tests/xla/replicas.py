"""Trains a step on two XLA replicas with half the batch each; prints as JSON how far that is from one process.

Run by test_replicas.py in a process of its own. Gradients are averaged as Lightning's strategy `xla` does.
"""

import copy
import json

import numpy as np
import replica_lock
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch_xla._internal.pjrt import run_multiprocess

from siglip2.core.distributed import from_left, gather, mean_over_ranks, rank, world_size
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import fake_batch, tiny_module

ROWS = 8
SMALL = {"hidden": 32, "bottleneck": 16, "prototypes": 32, "freeze_prototypes": 0.0, "start": 0.0}
REPLICAS = 2


def recipe():
    """Losses over pairs, and losses with a centre, which is a mean over all ranks."""
    plugins = [Sigmoid(), EMATeacher(start=0.0), SILC(local_crops=2, local_size=16, **SMALL), TIPS(**SMALL)]
    return tiny_module(plugins)


def share(module, number, count):
    size = ROWS // count
    return fake_batch(module.views_at(0.0), size, patchifier=module.patchifier, first=number * size)


def step(module, batch):
    """Losses of two steps on the same batch (the centre has moved in the second), and gradients of both."""
    losses = []
    for _ in range(2):
        total = torch.stack(list(module(batch, 0.0).values())).sum()
        total.backward()
        module.awake_hook("after_step", 0.0)(model=module.model, progress=0.0)
        losses.append(total.detach())
    return losses


def pairs(rows, weights):
    """The gradient of a loss over all pairs of this rank's rows with the rows that `gather` returns."""
    rows = rows.clone().requires_grad_()
    ((weights * (rows @ gather(rows).T).tanh()).sum() / len(rows)).backward()
    return rows.grad


def replica(module, batches):
    """What one replica finds, on the CPU; modules and batches were made before, since threads share random state."""
    device = torch_xla.device()
    module = copy.deepcopy(module).to(device)
    losses = step(module, batches[rank()].to(device))
    parameters = [p for p in module.parameters() if p.grad is not None]
    xm.all_reduce(xm.REDUCE_SUM, [p.grad for p in parameters], scale=1 / world_size(), pin_layout=False)
    means = [mean_over_ranks(loss) for loss in losses]
    # what differs between replicas is cut on the CPU: their graphs have to be the same
    own = torch.full((2, 3), float(rank())).to(device)
    there, back = from_left(own, own + 10, last=False)
    gradient = pairs(*(tensor.chunk(REPLICAS)[rank()].to(device) for tensor in everything()))
    torch_xla.sync()
    return {
        "world_size": world_size(),
        "losses": [loss.item() for loss in means],
        "gradients": {n: p.grad.cpu().numpy() for n, p in module.named_parameters() if p.grad is not None},
        "centre": module.plugins["silc"].centre.value.cpu().numpy(),
        "from_left": [there.cpu().tolist(), back.cpu().tolist()],
        "pairs": gradient.cpu().numpy(),
    }


def everything():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, generator=generator), torch.rand(ROWS, ROWS, generator=generator)


def apart(some, others):
    """Largest difference, as a share of the largest entry of any."""
    assert some.keys() == others.keys()
    size = max(tensor.abs().max().item() for tensor in others.values())
    return max((torch.from_numpy(some[name]) - others[name]).abs().max().item() for name in others) / size


def main():
    replica_lock.install()
    module = recipe()
    batches = [share(module, number, REPLICAS) for number in range(REPLICAS)]
    found = run_multiprocess(replica, module, batches, start_method="fork")
    losses = step(module, share(module, 0, 1))
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    joined = np.concatenate([found[number]["pairs"] for number in sorted(found)]) / len(found)
    alone = pairs(*everything())
    result = {
        "world_sizes": [found[number]["world_size"] for number in sorted(found)],
        "losses": [found[number]["losses"] for number in sorted(found)],
        "expected": [loss.item() for loss in losses],
        "gradients": [apart(found[number]["gradients"], gradients) for number in sorted(found)],
        "centre": apart({"centre": found[0]["centre"]}, {"centre": module.plugins["silc"].centre.value}),
        "from_left": [found[number]["from_left"] for number in sorted(found)],
        "pairs": apart({"rows": joined}, {"rows": alone}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
