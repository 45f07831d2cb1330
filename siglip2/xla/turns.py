"""Lets replicas that are threads on a CPU hand their graphs to XLA one at a time, so that none waits for ever.

torch_xla 2.9 gives collectives between replicas no channel id, so XLA's CPU backend names each meeting by an id that is
the compiled module's own. Two replicas that both miss the compile cache compile the same graph twice, get two ids, and
wait until XLA ends the process. The cache is the process's, and its key does not hold the device. So it is enough that
replicas take turns: the first compiles, the others find what it compiled. A TPU needs none of this.
"""

import functools
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

READS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__repr__")
THREADS = 16  # of XLA's pool, for each replica: one that waits in a collective occupies some of them

_turn = threading.RLock()
_kept: dict[str, torch.Tensor] = {}


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
        for name in READS:
            setattr(torch.Tensor, name, _flushed(getattr(torch.Tensor, name)))


def _wait_until_idle() -> None:
    """Waits for this replica's own device."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    device = torch_xla.device()
    if str(device) not in _kept:
        # a sync without a live tensor would lock the first replica's device
        _kept[str(device)] = torch.zeros(2).to(device)
    torch_xla._XLAC._xla_wait_device_ops(xm.xla_real_devices([device]))


def _one_at_a_time(hand_over: Callable[..., Any]) -> Callable[..., Any]:
    """The function that hands a graph over, under the lock, and only while this replica's device is idle."""

    @functools.wraps(hand_over)
    def locked(subject: Any, devices: Any = (), wait: bool = True, **options: Any) -> None:
        _wait_until_idle()
        with _turn:
            hand_over(subject, [], wait=False, **options)
        _wait_until_idle()  # to drop a buffer that a running program reads would block every thread

    return locked


def _flushed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor method that brings values to the host, after their graph was handed over under the lock."""

    @functools.wraps(method)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "xla":
            import torch_xla

            torch_xla._XLAC._xla_sync_multi([self])
        return method(self, *args, **kwargs)

    return wrapper
