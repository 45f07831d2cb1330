"""Lets replicas that are threads on a CPU hand their graphs to XLA one at a time, so that none waits for ever.

torch_xla 2.9 gives collectives between replicas no channel id, so XLA's CPU backend names each meeting by an id that is
the compiled module's own. Two replicas that both miss the compile cache compile the same graph twice, get two ids, and
wait until XLA ends the process. The cache is the process's, and its key does not hold the device. So it is enough that
replicas take turns: the first compiles, the others find what it compiled.

XLA also ends the process when a replica waits 10 seconds in a collective for one that is late: its loader is slow, or
it alone writes a checkpoint. So replicas wait for one another before, where no clock runs. A TPU needs none of this.
"""

import functools
import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# by name: a TorchDispatchMode sees every read, but replicas under one computed other losses
FUNCTIONS = ("equal", "allclose", "is_nonzero", "nonzero", "masked_select")  # that look at values, and are methods, too
READS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__repr__", *FUNCTIONS)
PATIENCE_S = 3600.0  # one may write a checkpoint for long
THREADS = 16  # of XLA's pool, for each replica: one that waits in a collective occupies some of them
COLLECTIVES = ("_xla_all_", "_xla_reduce_scatter", "_xla_collective_permute")  # how torch_xla's functions begin
NODES = ("xla::all_", "xla::cross_replica_sum", "xla::reduce_scatter", "xla::collective_permute")  # of its graphs

_turn = threading.RLock()
_kept: dict[str, Tensor] = {}
_collecting: set[str] = set()  # devices with a collective since the last `torch_xla.sync`


@functools.cache
def _meeting() -> threading.Barrier:
    """Where all replicas of this process wait for each other."""
    import torch_xla.runtime as xr

    return threading.Barrier(xr.addressable_device_count())


def prepare(environment: MutableMapping[str, str], num_replicas: int) -> None:
    """Sets what the runtime reads when it starts, unless it is set: threads enough, and no program before its turn."""
    environment.setdefault("XLA_THREAD_POOL_SIZE", str(THREADS * num_replicas))
    environment.setdefault("PJRT_CPU_ASYNC_CLIENT", "0")


def take_turns() -> None:
    """Puts a lock around everything that hands graphs over, in this process and for good; more calls do nothing."""
    import torch_xla

    extension = torch_xla._XLAC
    with _turn:
        if hasattr(extension._xla_step_marker, "__wrapped__"):
            return
        extension._xla_step_marker = _one_at_a_time(extension._xla_step_marker)
        extension._xla_sync_multi = _one_at_a_time(extension._xla_sync_multi)
        for name in (name for name in dir(extension) if name.startswith(COLLECTIVES)):
            setattr(extension, name, _noted(getattr(extension, name)))
        for name in READS:
            setattr(Tensor, name, _flushed(getattr(Tensor, name)))
        for name in FUNCTIONS:
            setattr(torch, name, _flushed(getattr(torch, name)))
        Tensor.to = _flushed(Tensor.to, _leaves_xla)  # type: ignore[method-assign]
        Tensor.copy_ = _flushed(Tensor.copy_, _lies_elsewhere)  # type: ignore[method-assign]


def _leaves_xla(tensor: Tensor, *target: Any, **options: Any) -> bool:
    """Whether arguments of `Tensor.to` name a device that is none of XLA."""
    named = [x for x in (*target, *options.values()) if isinstance(x, (Tensor, torch.device, str))]
    return any(torch.device(x.device if isinstance(x, Tensor) else x).type != "xla" for x in named)


def _lies_elsewhere(tensor: Tensor, *_: Any, **__: Any) -> bool:
    return tensor.device.type != "xla"


def _flushed(function: Callable[..., Any], reads: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
    """A function that brings values to the host, if `reads` says so, after their graph was handed over in turn."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        given = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.device.type == "xla"]
        if given and reads(*arguments, **options):
            import torch_xla

            torch_xla._XLAC._xla_sync_multi(given)
        return function(*arguments, **options)

    return wrapper


def _noted(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The function that puts a collective into the graph of a device, which is written down."""

    @functools.wraps(collective)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        _collecting.update(str(x.device) for x in tree_leaves((arguments, options)) if isinstance(x, Tensor))
        return collective(*arguments, **options)

    return wrapper


def _has_collective(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether the graph of some tensors, or of all of a device if none are named, has replicas wait for each other."""
    import torch_xla

    if str(device) not in _collecting:
        return False
    if tensors:
        text = torch_xla._XLAC._get_xla_tensors_text(tensors)
        return any(node in text for node in NODES)
    _collecting.discard(str(device))
    return True


def _wait_until_idle(device: torch.device) -> None:
    import torch_xla
    import torch_xla.core.xla_model as xm

    if str(device) not in _kept:
        # a sync without a live tensor would lock the first replica's device
        _kept[str(device)] = torch.zeros(2).to(device)
    torch_xla._XLAC._xla_wait_device_ops(xm.xla_real_devices([device]))


def _one_at_a_time(hand_over: Callable[..., Any]) -> Callable[..., Any]:
    """The function that hands a graph over, under the lock, and only while this replica's device is idle.

    Before a graph with a collective, all replicas have to come.
    """

    @functools.wraps(hand_over)
    def locked(subject: Any, devices: Any = (), wait: bool = True, **options: Any) -> None:
        import torch_xla

        tensors = subject if isinstance(subject, list) else []
        device = tensors[0].device if tensors else torch_xla.device()
        _wait_until_idle(device)
        if _has_collective(tensors, device):
            with _turn:
                meeting = _meeting()
            meeting.wait(PATIENCE_S)
        with _turn:
            hand_over(subject, [], wait=False, **options)
        _wait_until_idle(device)  # to drop a buffer that a running program reads would block every thread

    return locked
