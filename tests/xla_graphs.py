"""Trains a tiny model on XLA's CPU device and on the CPU; prints as JSON what was compiled and what came out.

Run by test_graphs.py in a process of its own: XLA has to be up before the first backward, and reads its settings once.
"""

import json
from functools import partial

import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from test_graphs import NAFLEX, loss_of, small_model, train_batches
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from siglip2.core.functional import grid_coords, resample_grid
from siglip2.core.optim import PUBLISHED
from siglip2.core.schedules import warmup_cosine

STEPS = 12
ADAMW = {**PUBLISHED, "fused": False}  # torch's fused AdamW does not know XLA


def fallbacks():
    """Operations that XLA handed back to the CPU."""
    return [name for name in metrics.counter_names() if name.startswith("aten::")]


def compiles():
    """Graphs compiled since the process began."""
    return (metrics.metric_data("CompileTime") or [0])[0]


def train(device, sync):
    """Twelve steps of the recipe; returns per step the sequence length, the graphs compiled so far, and the loss."""
    model = small_model(NAFLEX).to(device)
    optimizer = AdamW(model.parameters(), **ADAMW)
    schedule = LambdaLR(optimizer, partial(warmup_cosine, total=STEPS, warmup=3))
    batches = train_batches(NAFLEX, STEPS)
    lengths, compiled, losses = [], [], []
    for number in range(STEPS):
        batch = batches[number].to(device)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        sync()
        lengths.append(batch.views["image"].patches.shape[1])
        compiled.append(compiles())
    return lengths, compiled, losses


def positions(device):
    """Positions of a 5 x 3, a 2 x 9 and a 1 x 20 grid from a table 4 x 4, and the gradient of the table."""
    table = torch.rand(4, 4, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    grids = [(5, 3), (2, 9), (1, 20)]
    coords = torch.zeros(3, 20, 2, dtype=torch.int16)
    for row, grid in zip(coords, grids, strict=True):
        row[: grid[0] * grid[1]] = grid_coords(*grid)
    sizes = torch.tensor(grids, dtype=torch.int16, device=device)[:, None]
    found = resample_grid(table, coords.to(device), grid=(sizes[..., 0], sizes[..., 1]))
    (gradient,) = torch.autograd.grad(found.square().sum(), table)
    return found.detach(), gradient


def main():
    device = torch_xla.device()  # before the first backward
    lengths, compiled, losses = train(device, torch_xla.sync)
    on_xla = positions(device)
    torch_xla.sync()
    handed_back = fallbacks()  # before values are read, which counts as one
    _, _, expected = train("cpu", lambda: None)
    differences = [(a.cpu() - b).abs().max().item() for a, b in zip(on_xla, positions("cpu"), strict=True)]
    result = {
        "lengths": lengths,
        "compiled": compiled,
        "fallbacks": handed_back,
        "losses": [loss.item() for loss in losses],
        "expected": [loss.item() for loss in expected],
        "positions": max(differences),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
