"""Collectives with right gradients; all of them do nothing on one rank.

Losses over pairs need the embeddings of every rank. The backward of a gather sums what all ranks ask of a row, so that
a loss divided by the local batch, averaged over ranks as DDP and FSDP do, has the gradients of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns the rank of this process, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)  # gloo has no reduce_scatter
        return grad[rank() * ctx.num_rows :][: ctx.num_rows]


def gather(rows: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, [W * B, ...], with gradient to the rows of every rank.

    Args:
        rows: [B, ...], the same shape on every rank.
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


@torch.no_grad()
def from_left(texts: Tensor, gradients: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
    """Returns what the rank to the left holds, after this rank's went to the right; the same two on one rank.

    After as many calls as there are ranks everything is back where it came from.

    Args:
        texts: [b, D], the same shape on every rank.
        gradients: [b, D], what has been added up for them.
        last: texts are at the end of their way and need not come home, only their gradients do.
    """
    if world_size() == 1:
        return texts, gradients
    moving = [gradients.contiguous()] if last else [texts.contiguous(), gradients.contiguous()]
    arriving = [torch.empty_like(tensor) for tensor in moving]
    right, left = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    exchanges = [dist.P2POp(dist.isend, tensor, right) for tensor in moving]
    exchanges += [dist.P2POp(dist.irecv, tensor, left) for tensor in arriving]
    for request in dist.batch_isend_irecv(exchanges):
        request.wait()
    return (texts if last else arriving[0]), arriving[-1]


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over all ranks, without gradient; the tensor itself on one rank."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
