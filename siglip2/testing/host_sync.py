"""A watch over what would make an accelerator wait for Python, or give a shape that depends on values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Tensor methods that bring values to the host; on a CPU several of them never reach the dispatcher."""

SYNCS = {
    "_local_scalar_dense": "a value is read by Python (.item(), float(), bool() or `if tensor`)",
    "equal": "two tensors are compared into a Python bool (torch.equal)",
    "nonzero": "the number of results depends on values (torch.nonzero, torch.where(mask))",
    "masked_select": "the number of results depends on values (x[mask], torch.masked_select)",
    "_unique2": "the number of results depends on values (torch.unique)",
    "unique_dim": "the number of results depends on values (torch.unique)",
    "unique_consecutive": "the number of results depends on values (torch.unique_consecutive)",
    "bincount": "the number of results depends on values (torch.bincount)",
}
ADVICE = (
    "Keep it a tensor: torch.where or a multiplication by the mask instead of x[mask], topk with a fixed k instead of "
    "nonzero, and no Python branch on a value."
)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises AssertionError at the first operation that syncs with the host or has a shape that depends on values."""
    with _Reads(), _Operations():
        yield


class _Reads(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and getattr(Tensor, name, None) is func:
            raise AssertionError(f"Tensor.{name}: Python reads a value, so an accelerator would have to wait. {ADVICE}")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in SYNCS:
            raise AssertionError(f"aten::{name}: {SYNCS[name]}, and an accelerator would have to wait. {ADVICE}")
        if name in ("index", "index_put", "index_put_") and any(_is_mask(i) for i in args[1]):
            raise AssertionError(f"aten::{name} with a boolean mask: turning it into indices is a sync. {ADVICE}")
        if name == "repeat_interleave" and kwargs.get("output_size") is None and _counts_are_values(args):
            raise AssertionError(f"aten::{name} with a tensor of counts and no output_size: give output_size. {ADVICE}")
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _counts_are_values(args: Any) -> bool:
    return isinstance(args[-1], Tensor)
