"""Checkpoints of XLA runs: the ordinary file, or a folder to which every host writes what it holds.

`python -m siglip2.xla.checkpoint FOLDER FILE` makes the ordinary file out of such a folder; it needs no XLA.
"""

import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from siglip2.core.checkpoint import AtomicCheckpointIO
from siglip2.xla.hosts import Hosts
from siglip2.xla.sharding import whole_on_cpu

REST = "rest.ckpt"
"""The file of a folder that holds everything but tensors."""

TENSOR = "siglip2.tensor"
"""Where a tensor belongs, the rest has {TENSOR: its name in the folder}."""


def on_cpu(tree: Any, *, num_hosts: int = 1) -> Any:
    """Returns the same collection with whole copies of its tensors on the CPU; of sharded ones, on every host.

    Args:
        tree: dictionaries, lists and tuples of anything, such as a checkpoint.
        num_hosts: all of them have to call it, if one of the tensors is sharded.
    """
    return apply_to_collection(tree, Tensor, whole_on_cpu, num_hosts=num_hosts)


def write_sharded(checkpoint: Mapping[str, Any], folder: str | Path, hosts: Hosts) -> None:
    """Writes a checkpoint as a folder: every host its shards, the first one also everything that is no tensor.

    It is written beside its place and renamed, so that a folder under its final name is whole.

    Args:
        checkpoint: as Lightning dumps it, with tensors on XLA devices.
        folder: on a disk that all hosts share.
        hosts: all of them call it.
    """
    from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner

    final = Path(folder)
    partial = final.with_name(f".{final.name}.partial")
    if hosts.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    hosts.exchange("folder is there")
    tensors: dict[str, Tensor] = {}
    rest = _take_out(dict(checkpoint), "", tensors)
    with hosts.process_group(), _known_warnings():
        writer = dcp.FileSystemWriter(partial)
        dcp.save(tensors, storage_writer=writer, planner=SPMDSavePlanner(), no_dist=hosts.size == 1)
    if hosts.rank == 0:
        torch.save(rest, partial / REST)
        _replace(partial, final)
    hosts.exchange("folder is whole")


def read_sharded(folder: str | Path) -> dict[str, Any]:
    """Returns the checkpoint that `write_sharded` wrote, with whole tensors on the CPU.

    Raises:
        ValueError: if the folder is no such checkpoint.
    """
    if not (Path(folder) / REST).is_file():
        raise ValueError(f"{folder} is not a sharded checkpoint: it has no {REST}")
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(what.size, dtype=what.properties.dtype)
        for name, what in stored.items()
        if isinstance(what, TensorStorageMetadata)
    }
    with _known_warnings():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    rest = torch.load(Path(folder) / REST, map_location="cpu", weights_only=True)
    whole: dict[str, Any] = _put_back(rest, tensors)
    return whole


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Torch warns that one process works on its own, although it is told so, and of torch_xla's planner."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="The function definition for SavePlanner.set_up_planner")
        yield


def _take_out(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with a mark in place of each tensor, which is noted under the name of its place."""
    if isinstance(tree, Tensor):
        tensors[place] = tree.detach()
        return {TENSOR: place}
    if isinstance(tree, Mapping):
        return {key: _take_out(value, f"{place}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_take_out(value, f"{place}/{number}", tensors) for number, value in enumerate(tree))
    return tree


def _put_back(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, Mapping):
        if TENSOR in tree:
            return tensors[tree[TENSOR]]
        return {key: _put_back(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_put_back(value, tensors) for value in tree)
    return tree


def _replace(partial: Path, final: Path) -> None:
    """Puts a new folder in the place of an old one; a stop in between leaves at least one of the two whole."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.is_dir():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m siglip2.xla.checkpoint FOLDER FILE")
    AtomicCheckpointIO().save_checkpoint(read_sharded(sys.argv[1]), sys.argv[2])
