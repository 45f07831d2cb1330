"""Takes steps on XLA replicas with a share of the batch each; prints as JSON how far they are from one process.

Run by test_replicas.py in a process of its own. Gradients are averaged as Lightning's strategy `xla` does.
"""

import copy
import json
import os

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from parallel_ranks import Brighter
from torch_xla._internal.pjrt import run_multiprocess

from siglip2.core.distributed import from_left, gather, mean_over_ranks, rank, world_size
from siglip2.plugins.ema_teacher import EMATeacher
from siglip2.plugins.locca import LocCa
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.plugins.silc import SILC
from siglip2.plugins.tips import TIPS
from siglip2.testing import fake_batch, tiny_module
from siglip2.xla.turns import take_turns

ROWS = 8
# wide heads and cosines that are not magnified, as in exact.yaml
HEAD = {"hidden": 512, "bottleneck": 64, "prototypes": 32, "freeze_prototypes": 0.0, "start": 0.0}
HEAD |= {"student_temperature": 1.0, "teacher_temperature": 1.0}
REPLICAS = int(os.environ["CPU_NUM_DEVICES"])


def recipes():
    """A module for each loss, for all, and for a curator."""
    pairs, locca, teacher = (lambda: [Sigmoid()]), (lambda: [LocCa(length=40, depth=1)]), lambda: EMATeacher(start=0.0)
    silc, tips = (lambda: SILC(local_crops=2, local_size=16, **HEAD)), lambda: TIPS(**HEAD)
    plugins = {
        "all": [*pairs(), *locca(), teacher(), silc(), tips()],
        "sigmoid": pairs(),
        "locca": locca(),
        "silc": [teacher(), silc()],
        "tips": [teacher(), tips()],
        "curated": [*pairs(), Brighter()],
    }
    modules = {name: tiny_module(chosen) for name, chosen in plugins.items()}
    for module in modules.values():
        torch.nn.init.constant_(module.model.logit_scale, 1.0)
    return modules


def share(module, number, count):
    size = ROWS // count
    return fake_batch(module.views_at(0.0), size, patchifier=module.patchifier, first=number * size)


def steps(module, batch):
    """Losses of two steps on the same batch (centre and teacher have moved in the second), and gradients of both."""
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


def replica(modules, batches):
    """What one replica finds, on the CPU; modules and batches were made before, since threads share random state."""
    found = {name: trained(module, batches[name][rank()]) for name, module in modules.items()}
    device = torch_xla.device()
    # what differs between replicas is cut on the CPU: their graphs have to be the same
    own = torch.full((2, 3), float(rank())).to(device)
    there, back = from_left(own, own + 10, last=False)
    gradient = pairs(*(tensor.chunk(REPLICAS)[rank()].to(device) for tensor in everything()))
    torch_xla.sync()
    return {
        "world_size": world_size(),
        "recipes": found,
        "from_left": [there.cpu().tolist(), back.cpu().tolist()],
        "pairs": gradient.cpu().numpy(),
    }


def trained(module, batch):
    """Mean losses and gradients of two steps of a module, and its centre if it has one."""
    module = copy.deepcopy(module).to(torch_xla.device())
    losses = steps(module, batch.to(torch_xla.device()))
    parameters = [p for p in module.parameters() if p.grad is not None]
    xm.all_reduce(xm.REDUCE_SUM, [p.grad for p in parameters], scale=1 / world_size(), pin_layout=False)
    means = [mean_over_ranks(loss) for loss in losses]
    torch_xla.sync()
    return {
        "losses": [loss.item() for loss in means],
        "gradients": {n: p.grad.cpu().numpy() for n, p in module.named_parameters() if p.grad is not None},
        "centres": {n: b.cpu().numpy() for n, b in module.named_buffers() if "centre" in n},
    }


def everything():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, generator=generator), torch.rand(ROWS, ROWS, generator=generator)


def apart(some, others):
    """Largest difference of any entry."""
    assert some.keys() == others.keys(), some.keys() ^ others.keys()
    return max(
        ((torch.from_numpy(some[name]) - tensor).abs().max().item() for name, tensor in others.items()), default=0
    )


def compared(found, module, batch):
    """How far a recipe is on each replica from one process."""
    losses = [loss.item() for loss in steps(module, batch)]
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    centres = {n: b for n, b in module.named_buffers() if "centre" in n}
    return {
        "losses": [each["losses"] for each in found],
        "expected": losses,
        "gradients": [apart(each["gradients"], gradients) for each in found],
        "centres": [apart(each["centres"], centres) for each in found],
    }


def main():
    take_turns()
    modules = recipes()
    batches = {n: [share(m, number, REPLICAS) for number in range(REPLICAS)] for n, m in modules.items()}
    found = run_multiprocess(replica, modules, batches, start_method="fork")
    found = [found[number] for number in sorted(found)]
    alone = pairs(*everything())
    joined = torch.from_numpy(np.concatenate([each["pairs"] for each in found]) / len(found))
    result = {
        "world_sizes": [each["world_size"] for each in found],
        "recipes": {
            name: compared([each["recipes"][name] for each in found], module, share(module, 0, 1))
            for name, module in modules.items()
        },
        "from_left": [each["from_left"] for each in found],
        "pairs": ((joined - alone).abs().max() / alone.abs().max()).item(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
