"""Indexes for all shards of a dataset at once, and the `sizes.json` of each folder."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from siglip2.core.data.storage import expand_shards, read_file, write_file
from siglip2.core.data.tar_index import IndexHead, index_tar, sidecar_path


@dataclass(frozen=True)
class IndexSummary:
    """What `index_shards` found.

    Args:
        num_shards: shards read.
        num_samples: samples in them.
        num_bytes: their size.
        num_duplicates: files left out because their sample already had one of that extension.
        damaged: a line for each damaged shard.
    """

    num_shards: int
    num_samples: int
    num_bytes: int
    num_duplicates: int
    damaged: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes / 1e9:.2f} GB"
        duplicates = f", {self.num_duplicates} duplicate files left out" if self.num_duplicates else ""
        return "\n".join([counts + duplicates, *(f"damaged: {line}" for line in self.damaged)])


def index_shards(
    spec: str | Sequence[str], *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> IndexSummary:
    """Read every shard anew, store its index beside it, and its count in `sizes.json` of its folder.

    Args:
        spec: shards, see `expand_shards`; remote ones need the right to write.
        workers: shards read at the same time (threads: the disk or the network is the limit).
        progress: called with (shards done, shards in all) after each.

    Raises:
        OSError: if a shard cannot be read or an index cannot be written.
        ValueError: if a shard is compressed.
    """
    shards = list(dict.fromkeys(expand_shards(spec)))
    heads: list[IndexHead] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for head in pool.map(_store_index, shards):
            heads.append(head)
            if progress is not None:
                progress(len(heads), len(shards))
    sizes: dict[str, dict[str, int]] = {}
    for shard, head in zip(shards, heads, strict=True):
        folder, _, name = shard.rpartition("/")
        sizes.setdefault(folder, {})[name] = head.num_samples
    for folder, counts in sizes.items():
        _store_sizes(f"{folder}/sizes.json" if folder else "sizes.json", counts)
    return IndexSummary(
        num_shards=len(shards),
        num_samples=sum(head.num_samples for head in heads),
        num_bytes=sum(head.tar_size for head in heads),
        num_duplicates=sum(head.num_duplicates for head in heads),
        damaged=tuple(
            f"{os.path.dirname(shard)}: {head.damage}" for shard, head in zip(shards, heads, strict=True) if head.damage
        ),
    )


def _store_index(path: str) -> IndexHead:
    index = index_tar(path)
    write_file(sidecar_path(path), index.to_bytes())
    return index.head


def _store_sizes(path: str, counts: dict[str, int]) -> None:
    """Add counts to a sizes.json, which open_clip reads too."""
    try:
        known = json.loads(read_file(path))
    except (FileNotFoundError, ValueError):
        known = {}
    merged = (known if isinstance(known, dict) else {}) | counts
    write_file(path, json.dumps(dict(sorted(merged.items())), indent=0).encode() + b"\n")
