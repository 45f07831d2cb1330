"""Collectives with right gradients; all of them do nothing on one rank.

Losses over pairs need the embeddings of every rank. The backward of a gather sums what all ranks ask of a row, so that
a loss divided by the local batch, averaged over ranks as DDP and FSDP do, has the gradients of one process.

Ranks are the processes of torch.distributed, or the replicas of torch_xla (the strategy `xla`). Under GSPMD
(`xla_spmd`) there is one rank, however many hosts and devices there are: the program sees the whole batch.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

constant: Any = torch.compiler.assume_constant_result  # for a process; torch.compile cannot look into the runtime


def _xla() -> Any:
    """The runtime of torch_xla if it is up in this process, which is then no rank of anything else; None elsewhere.

    It is only looked for: to import it here, or to ask it before it is up, would start it.
    """
    runtime = sys.modules.get("torch_xla.runtime")
    return runtime if runtime and sys.modules["_XLAC"]._xla_runtime_is_initialized() else None  # torch_xla's core


@constant
def _on_replicas() -> bool:
    """Whether this is one of several replicas of torch_xla, each with a device and a program of its own."""
    xla = _xla()
    return xla is not None and not xla.is_spmd() and xla.world_size() > 1


def _on_processes() -> bool:
    """Whether this is one of the ranks of torch.distributed; under GSPMD those are hosts, which share one program."""
    xla = _xla()
    return dist.is_available() and dist.is_initialized() and (xla is None or not xla.is_spmd())


@constant
def rank() -> int:
    """Returns the rank of this process or replica, 0 if it is the only one."""
    if _on_replicas():
        return int(_xla().global_ordinal())
    return dist.get_rank() if _on_processes() else 0


@constant
def world_size() -> int:
    """Returns the number of ranks, 1 if there is nothing else."""
    if _on_replicas():
        return int(_xla().world_size())
    return dist.get_world_size() if _on_processes() else 1


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


class _GatherReplicas(torch.autograd.Function):
    """The same on XLA replicas; torch_xla's own gradient drops what the other replicas ask of a row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm

        gathered: Tensor = xm.all_gather(rows, pin_layout=False)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm

        summed: Tensor = xm.reduce_scatter(
            xm.REDUCE_SUM, grads[0].contiguous(), 1.0, scatter_dim=0, shard_count=world_size(), pin_layout=False
        )
        return summed


def gather(rows: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, [W * B, ...], with gradient to the rows of every rank.

    Args:
        rows: [B, ...], the same shape on every rank.
    """
    if world_size() == 1:
        return rows
    if not _on_replicas():
        return _Gather.apply(rows)  # type: ignore[no-any-return]
    # without gradient, replicas may come here by different ways: one has the last, shorter batch of prompts
    return _GatherReplicas.apply(rows) if torch.is_grad_enabled() else in_its_own_graph(_GatherReplicas.apply, rows)


def in_its_own_graph(collective: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Returns what a collective of XLA replicas makes of a tensor, in a program that is the same for all of them.

    A program with a collective has to be; so what each did before, and what it does afterwards, go into others.
    """
    import torch_xla

    torch_xla.sync()
    found = collective(tensor)
    torch_xla.sync()
    return found


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
    arriving = [_permuted(tensor) for tensor in moving] if _on_replicas() else _sent_right(moving)
    return (texts if last else arriving[0]), arriving[-1]


def _sent_right(moving: list[Tensor]) -> list[Tensor]:
    arriving = [torch.empty_like(tensor) for tensor in moving]
    right, left = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    exchanges = [dist.P2POp(dist.isend, tensor, right) for tensor in moving]
    exchanges += [dist.P2POp(dist.irecv, tensor, left) for tensor in arriving]
    for request in dist.batch_isend_irecv(exchanges):
        request.wait()
    return arriving


def _permuted(tensor: Tensor) -> Tensor:
    import torch_xla.core.xla_model as xm

    arriving: Tensor = xm.collective_permute(tensor, [[i, (i + 1) % world_size()] for i in range(world_size())])
    return arriving


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, without gradient; the tensor itself on one rank."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    if _on_replicas():
        import torch_xla.core.xla_model as xm

        return cast(Tensor, xm.all_reduce(xm.REDUCE_SUM, total, pin_layout=False))
    dist.all_reduce(total)
    return total


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over all ranks, without gradient; the tensor itself on one rank."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value.detach()
