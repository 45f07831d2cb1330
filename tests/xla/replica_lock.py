"""Lets torch_xla 2.9's replicas, which on a CPU are threads of one process, run without waiting for each other forever.

torch_xla gives collectives between replicas no channel id, so XLA's CPU backend names each meeting by an id that is the
compiled module's own. Two replicas that both miss the compile cache compile the same graph twice, get two ids, and wait
until XLA aborts the process. The cache is the process's, and its key does not hold the device. So it is enough that
replicas hand their graphs over one at a time: the first compiles, the others find what it compiled.

The environment needs XLA_THREAD_POOL_SIZE of at least twice the replicas, and PJRT_CPU_ASYNC_CLIENT=0.
"""

import functools
import threading

import torch
import torch_xla
import torch_xla.core.xla_model as xm

LOCK = threading.RLock()
READS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__repr__")
extension = torch_xla._XLAC
kept = {}


def wait_until_idle():
    """Waits for this replica's own device."""
    device = str(torch_xla.device())
    if device not in kept:
        kept[device] = torch.zeros(2).to(device)  # a sync without a live tensor would lock the first replica's device
    extension._xla_wait_device_ops(xm.xla_real_devices([device]))


def one_at_a_time(hand_over):
    """The function that hands a graph over, under the lock, and only while this replica's device is idle."""

    @functools.wraps(hand_over)
    def locked(subject, devices=(), wait=True, **options):
        wait_until_idle()
        with LOCK:
            hand_over(subject, [], wait=False, **options)
        wait_until_idle()  # to drop a buffer that a running program reads would block every thread

    return locked


def flushed(method):
    """A tensor method that brings values to the host, after their graph was handed over under the lock."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if self.device.type == "xla":
            extension._xla_sync_multi([self])
        return method(self, *args, **kwargs)

    return wrapper


def install():
    """Puts the lock around everything that hands graphs over."""
    extension._xla_step_marker = one_at_a_time(extension._xla_step_marker)
    extension._xla_sync_multi = one_at_a_time(extension._xla_sync_multi)
    for name in READS:
        setattr(torch.Tensor, name, flushed(getattr(torch.Tensor, name)))
