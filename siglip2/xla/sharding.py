"""Which part of a tensor lies on which device."""

# B rows of a batch, C copies of a view, D devices

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from siglip2.core.batch import Batch, Patches

DATA = "data"
"""The one axis of the mesh: rows of the batch lie along it, and parameters if they are sharded."""

Partition = tuple[str | None, ...]


def all_devices() -> Any:
    """Returns the mesh of all devices of all hosts, in one line."""
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    count = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(count), (count,), (DATA,))
    xs.set_global_mesh(mesh)
    return mesh


def parameter_partition(shape: Iterable[int], *, num_devices: int, min_size: int) -> Partition | None:
    """Returns along which dimension a parameter is cut: the longest that divides over the devices.

    The rule is that of torch_xla's FSDPv2 (torch_xla/experimental/spmd_fully_sharded_data_parallel.py), which does not
    look for one that divides. It depends on nothing but the shape, so moments lie where their parameters do.

    Args:
        shape: of the parameter.
        num_devices: D.
        min_size: parameters with fewer elements are whole on every device.

    Returns:
        The name of the mesh axis at the dimension that is cut, None at the others; None if it stays whole.
    """
    sizes = list(shape)
    divides = [d for d, size in enumerate(sizes) if size and size % num_devices == 0]
    if num_devices == 1 or not divides or int(np.prod(sizes)) < min_size:
        return None
    longest = max(divides, key=lambda d: sizes[d])
    return tuple(DATA if d == longest else None for d in range(len(sizes)))


def shard(tensors: Iterable[Tensor], mesh: Any, *, min_size: int) -> None:
    """Cuts parameters, or their moments, over the devices, in place; those that are cut already are left alone."""
    import torch_xla
    import torch_xla.distributed.spmd as xs

    for tensor in tensors:
        partition = parameter_partition(tensor.shape, num_devices=mesh.size(), min_size=min_size)
        if partition is not None and not torch_xla._XLAC._get_xla_sharding_spec(tensor):
            xs.mark_sharding(tensor, mesh, partition)


def replicate(tensors: Iterable[Tensor], mesh: Any) -> None:
    """Sends tensors whole to every device, in place; those that lie there already, whole or cut, are left alone.

    A step would send only what it reads: the others torch_xla 2.9 loses before they can be saved.
    """
    import torch_xla
    import torch_xla.distributed.spmd as xs

    for tensor in tensors:
        if not torch_xla._XLAC._get_xla_sharding_spec(tensor):
            xs.mark_sharding(tensor, mesh, (None,) * tensor.ndim)


def finish_all() -> None:
    """Computes what is left to compute, and waits for it: the parts of a tensor cannot be read while a program runs."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    torch_xla.sync()
    xm.wait_device_ops()


def whole_on_cpu(tensor: Tensor, *, num_hosts: int = 1) -> Tensor:
    """Returns a whole copy of a tensor on the CPU.

    One host joins the parts of its devices in its own memory. Several put the tensor whole on every device first, by a
    program that is compiled once for each shape. `Tensor.cpu` compiles one for each tensor in parts every time
    (`ReplicateShardedData` of torch_xla 2.9).

    Args:
        tensor: in parts on the devices, whole on each, or on the CPU.
        num_hosts: all of them have to call it for a tensor in parts.
    """
    import torch_xla.distributed.spmd as xs

    tensor = tensor.detach()
    if not _in_parts(tensor):
        return tensor.to("cpu", copy=True)
    if num_hosts > 1:
        mesh: Any = xs.get_global_mesh()
        everywhere = tensor[None]  # a tensor of its own: the layout of one that is there cannot be changed
        xs.mark_sharding(everywhere, mesh, (None,) * everywhere.ndim)
        return everywhere.cpu()[0]
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for part in xs.XLAShardedTensor(tensor).local_shards:
        place = tuple(part.indices)
        whole[place] = part.data[tuple(slice(0, at.stop - at.start) for at in place)]  # without its padding
    return whole


def _in_parts(tensor: Tensor) -> bool:
    import torch_xla

    return tensor.device.type == "xla" and "devices=" in torch_xla._XLAC._get_xla_sharding_spec(tensor)


def upload(batch: Batch, mesh: Any, device: torch.device, *, num_hosts: int = 1) -> Batch:
    """Returns the batch on the devices, each with its share of the rows of every view.

    With several hosts, the batch of each is its share of the global one. The result is the global batch, copies-major
    as on one host, and its `size` counts all rows.

    A batch that does not divide over the devices of one host is whole on each: right, but no faster than on one.

    Args:
        batch: on the CPU.
        mesh: the devices.
        device: the virtual device that stands for all of them.
        num_hosts: processes that each bring a share.

    Raises:
        ValueError: if several hosts bring packed rows: an image would be looked for in the rows of the first host.
    """
    packed = any(isinstance(view, Patches) and view.packing is not None for view in batch.views.values())
    if packed and num_hosts > 1:
        raise ValueError("packed rows (navit) are not supported on several hosts: use fixed or naflex")

    def put(tensor: Tensor) -> Tensor:
        return _put(tensor, batch.size, mesh, device, num_hosts)

    return replace(batch.apply(put), size=batch.size * num_hosts)


def _put(tensor: Tensor, size: int, mesh: Any, device: torch.device, num_hosts: int) -> Tensor:
    import torch_xla.distributed.spmd as xs

    rows = tensor.shape[0] if tensor.ndim else 1
    if rows == 1 or (num_hosts > 1 and rows % size):
        return tensor.to(device)  # what all rows share, such as the coordinates of a fixed grid
    if num_hosts == 1 and rows % mesh.size():
        # every device takes all rows: torch_xla 2.9's partitioner aborts the process on some operations over uneven
        # shares, for one the top-k of an evaluation batch of 5 on 4 devices
        return tensor.to(device)
    if num_hosts == 1 or rows == size:
        return _send(tensor, mesh, device, num_hosts=num_hosts)
    # [C * b, ...] of each host would be joined host by host. Hosts can only be joined along the first dimension, so
    # rows travel as [b, C, ...] and become copies-major on the devices
    by_row = _send(tensor.unflatten(0, (-1, size)).transpose(0, 1), mesh, device, num_hosts=num_hosts)
    joined = by_row.transpose(0, 1).flatten(0, 1)
    xs.mark_sharding(joined, mesh, (DATA,) + (None,) * (joined.ndim - 1))
    return joined


def _send(tensor: Tensor, mesh: Any, device: torch.device, *, num_hosts: int) -> Tensor:
    """Sends each device its rows; the others never travel there."""
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs

    spec = xs.ShardingSpec(mesh, (DATA,) + (None,) * (tensor.ndim - 1), minibatch=num_hosts > 1)
    sent: Any = xm.send_cpu_data_to_device([tensor.contiguous()], device, input_sharding=spec)
    return cast(Tensor, sent[0])
