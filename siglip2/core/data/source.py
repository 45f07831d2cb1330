"""Datasets as random access: a source knows how many samples it has and reads any of them.

Three kinds: tar shards (webdataset, img2dataset and DataComp layouts as they are), a CSV or TSV table of
picture files, and folders of pictures. What is read is a `Sample`; what its parts mean is said by `Fields`.
"""

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from siglip2.core.data.fields import Fields, Sample
from siglip2.core.data.folders import FolderSource
from siglip2.core.data.storage import MAX_BYTES, is_local
from siglip2.core.data.tables import TableSource
from siglip2.core.data.tar_source import TarSource

FORMATS = ("auto", "tar", "table", "folder")


@runtime_checkable
class Source(Protocol):
    """A dataset that reads sample i; picklable, and safe to use after a fork.

    Attributes:
        name: what it is called in logs.
    """

    name: str

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample:
        """Sample i; BadSample if that one cannot be read, IndexError if there is no such number."""
        ...

    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in order; a source without shards is one."""
        ...


def open_source(
    path: str | Sequence[str],
    *,
    format: str = "auto",
    fields: Fields | None = None,
    cache_dir: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """Open a dataset: tar shards, a table or a folder of pictures.

    Args:
        path: shards such as `data/{00000..00012}.tar`, `data/*.tar`, `s3://bucket/data/`, several joined by
            `::` or in a list; or a .csv or .tsv file; or a folder.
        format: `tar`, `table`, `folder`, or `auto`, which goes by the name (a folder of .tar files is shards).
        fields: where image, caption and so on are found.
        cache_dir: keep whole remote shards here.
        max_bytes: samples with a larger file are bad ones.

    Raises:
        FileNotFoundError: if nothing is there; says what was looked for and what lies near.
        ValueError: if it is of no known kind or holds no samples.
    """
    paths = [path] if isinstance(path, str) else list(path)
    kind = kind_of(paths, format)
    if kind == "tar":
        return TarSource(paths, fields=fields, cache_dir=cache_dir, max_bytes=max_bytes)
    if len(paths) != 1 or "::" in paths[0]:
        raise ValueError(
            f"one {kind} at a time, found {paths}; several sources can be joined only if they are tar shards"
        )
    only = paths[0].removeprefix("file://")
    if kind == "table":
        return TableSource(only, fields=fields, max_bytes=max_bytes)
    return FolderSource(only, fields=fields, max_bytes=max_bytes)


def kind_of(paths: Sequence[str], format: str = "auto") -> str:
    """What a source is: `tar`, `table` or `folder`.

    Args:
        paths: as `open_source` takes them, in a list.
        format: one of those, or `auto`, which goes by the name.

    Raises:
        ValueError: if there is no such format, or none can be told.
    """
    if format not in FORMATS:
        raise ValueError(f"no format called {format!r}; known: {', '.join(FORMATS)}")
    if format != "auto":
        return format
    first = paths[0].removeprefix("file://") if paths else ""
    if first.endswith((".csv", ".tsv")):
        return "table"
    if os.path.isdir(first) and not any(name.endswith(".tar") for name in os.listdir(first)):
        return "folder"
    if is_local(first) and os.path.isfile(first) and not first.endswith(".tar"):
        raise ValueError(f"cannot tell what {first} is; expected .tar shards, a .csv or .tsv table, or a folder")
    return "tar"
