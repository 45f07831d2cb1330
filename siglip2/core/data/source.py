"""Datasets as random access: a source knows how many samples it has and reads any of them.

Three kinds: tar shards (webdataset, img2dataset and DataComp layouts as they are), a CSV or TSV table of
picture files, and folders of pictures. What is read is a `Sample`; what its parts mean is said by `Fields`.
"""

import csv
import fcntl
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import fsspec
import numpy as np

from siglip2.core.data.fields import BadSample, Fields, Sample, alternatives
from siglip2.core.data.tar_index import (
    ByteFile,
    IndexHead,
    TarIndex,
    expand_shards,
    is_local,
    load_index,
    nearby,
    read_head,
)

__all__ = [
    "BadSample",
    "FolderSource",
    "Sample",
    "Source",
    "TableSource",
    "TarSource",
    "check_source",
    "open_source",
]

log = logging.getLogger(__name__)

FORMATS = ("auto", "tar", "table", "folder")
MAX_BYTES = 64 * 2**20
OPEN_SHARDS = 128  # per worker; an index of 10 000 samples takes 0.7 MB
REMOTE_THREADS = 16
SLACK_BYTES = 2**16  # headers and padding between the members of a sample: below this, read them at once
IMAGE_COLUMNS = ("filepath", "image", "image_path", "path", "file_name", "filename")
CAPTION_COLUMNS = ("title", "caption", "text")
LABEL_COLUMNS = ("label", "cls")


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


class TarSource:
    """Tar shards, each sample read at its offset.

    Indexes are read from beside the shards and made where they are missing; `siglip2 index` makes them
    beforehand.

    Args:
        spec: shards as `expand_shards` takes them.
        fields: what the members mean.
        cache_dir: keep whole remote shards here once one of their samples was asked for; grows to the size of
            the dataset. Delete it if the shards change.
        max_bytes: a sample with a larger member is a bad one.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if no shard holds a sample, or a shard is compressed.
    """

    def __init__(
        self,
        spec: str | Sequence[str],
        *,
        fields: Fields | None = None,
        cache_dir: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name = spec if isinstance(spec, str) else "::".join(spec)
        self.shards = expand_shards(spec)
        self.fields, self.cache_dir, self.max_bytes = fields or Fields(), cache_dir, max_bytes
        self._made: dict[int, TarIndex] = {}  # indexes that could not be stored: workers need not make them again
        self._sizes = self._count()
        self._ends = np.cumsum(self._sizes)
        self._forget()
        if len(self) == 0:
            raise ValueError(
                f"no samples in {self.name} ({len(self.shards)} shards); a sample is such as a.jpg and a.txt"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in order."""
        return list(self._sizes)

    def read(self, i: int) -> Sample:
        """Sample i with all its members; BadSample if one is too large or the shard ends inside it."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.name}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        file, index = self._open(shard)
        j = i - int(self._ends[shard]) + self._sizes[shard]
        sample = Sample(index.key(j), self.shards[shard], {}, self.fields)
        members = index.members(j)
        for extension, (_, size) in members.items():
            if size > self.max_bytes:
                raise sample.bad(f"{extension!r} has {size} bytes, over the limit of {self.max_bytes}")
        sample.record.update(_read_members(file, members))
        if short := [e for e, (_, size) in members.items() if len(sample.record[e]) < size]:
            raise sample.bad(f"{short[0]!r} is cut: the shard became shorter after it was indexed")
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_opened", "_lock", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._opened: OrderedDict[int, tuple[ByteFile, TarIndex]] = OrderedDict()

    def _count(self) -> list[int]:
        """Samples in each shard, from the stored indexes where there are any; damage is logged."""
        with ThreadPoolExecutor(1 if all(map(is_local, self.shards)) else REMOTE_THREADS) as pool:
            heads = list(pool.map(self._head, range(len(self.shards))))
        for shard, head in dict(zip(self.shards, heads, strict=True)).items():
            if head.damage:
                log.warning("damaged shard in %s: %s", os.path.dirname(shard), head.damage)
        return [head.num_samples for head in heads]

    def _head(self, shard: int) -> IndexHead:
        head = read_head(self.shards[shard])
        if head is None:
            path = self._path(shard)
            index = load_index(path)
            head = index.head
            if read_head(path) is None:
                self._made[shard] = index
        return head

    def _path(self, shard: int) -> str:
        path = self.shards[shard]
        return path if self.cache_dir is None or is_local(path) else _cached_copy(path, self.cache_dir)

    def _open(self, shard: int) -> tuple[ByteFile, TarIndex]:
        if self._pid != os.getpid():  # after a fork: connections and locks belong to the parent
            self._forget()
        with self._lock:
            if shard not in self._opened:
                path = self._path(shard)
                index = self._made[shard] if shard in self._made else load_index(path)
                if len(index) != self._sizes[shard]:
                    raise ValueError(
                        f"{path} changed while in use: it had {self._sizes[shard]} samples, now {len(index)}"
                    )
                self._opened[shard] = ByteFile(path), index
                if len(self._opened) > OPEN_SHARDS:
                    self._opened.popitem(last=False)  # closed once nobody reads from it
            self._opened.move_to_end(shard)
            return self._opened[shard]


def _read_members(file: ByteFile, members: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members' contents: in one read where they lie together, as they mostly do."""
    begin = min(offset for offset, _ in members.values())
    end = max(offset + size for offset, size in members.values())
    if end - begin > sum(size for _, size in members.values()) + SLACK_BYTES:
        return {extension: file.read(offset, size) for extension, (offset, size) in members.items()}
    span = file.read(begin, end - begin)
    return {e: span[offset - begin : offset - begin + size] for e, (offset, size) in members.items()}


def _cached_copy(url: str, cache_dir: str) -> str:
    """The local copy of a remote shard, fetched by the first process that asks while others wait."""
    os.makedirs(cache_dir, exist_ok=True)
    place = os.path.join(cache_dir, f"{hashlib.sha1(url.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}")
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system, even if this process is killed
        if not os.path.exists(place):
            file_system, name = fsspec.core.url_to_fs(url)
            file_system.get_file(name, f"{place}.part")
            os.replace(f"{place}.part", place)
    return place


class TableSource:
    """A CSV or TSV file with a header, one picture file and its caption a row.

    Columns: `filepath`, `image`, `path` ... for the picture and `title`, `caption` or `text` for the caption,
        unless `fields`
    names columns of the table. Paths are relative to the table's folder.

    Args:
        path: local path or URL of the table.
        fields: what the columns mean.
        separator: None takes a tab for .tsv, a comma for .csv, and a tab for a .csv whose header has tabs (as
            open_clip's).
        max_bytes: a larger picture file is a bad sample.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it has no rows, or no column for the picture.
    """

    def __init__(
        self,
        path: str,
        *,
        fields: Fields | None = None,
        separator: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name, self.max_bytes = path, max_bytes
        if is_local(path) and not os.path.isfile(path):
            raise FileNotFoundError(f"no table {path}; {nearby(path)}")
        with fsspec.open(path, "rb") as file:
            header = file.readline().decode("utf-8-sig")
            tabs = path.endswith(".tsv") or ("\t" in header and "," not in header)
            self.separator = separator or ("\t" if tabs else ",")
            self.columns = next(csv.reader([header], delimiter=self.separator), [])
            self._offsets = _row_offsets(file, self.separator, path)
        if len(self) == 0:
            raise ValueError(
                f"no rows in {path}; expected a header such as filepath{self.separator}title and a row each"
            )
        self.fields = self._adopt(fields or Fields())
        self._image = next(word for word in alternatives(self.fields.image) if word in self.columns)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def shard_sizes(self) -> list[int]:
        """One shard: the table."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """Row i, the picture's bytes in place of its path; BadSample if row or file cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self.name}")
        begin, end = int(self._offsets[i]), int(self._offsets[i + 1])
        with ByteFile(self.name) as file:
            text = file.read(begin, end - begin).decode(errors="replace")
        values = next((row for row in csv.reader(text.splitlines(keepends=True), delimiter=self.separator) if row), [])
        sample = Sample(f"row {i}", self.name, dict(zip(self.columns, values, strict=False)), self.fields)
        if len(values) != len(self.columns):
            raise sample.bad(f"{len(values)} values for {len(self.columns)} columns; is a quote or the separator odd?")
        sample.key = sample.record[self._image]
        path = sample.key if not is_local(sample.key) else os.path.join(os.path.dirname(self.name), sample.key)
        sample.record[self._image] = _read_whole(path, sample, self.max_bytes)
        return sample

    def _adopt(self, fields: Fields) -> Fields:
        """`fields` with the usual column names where its own are not in the table."""
        usual = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "label": LABEL_COLUMNS}
        for field, names in usual.items():
            if not any(word.split(".")[0] in self.columns for word in alternatives(fields.spec(field))):
                found = [name for name in names if name in self.columns]
                renamed: dict[str, Any] = {field: found[0]} if found else {}
                fields = replace(fields, **renamed)
        if not any(word in self.columns for word in alternatives(fields.image)):
            raise ValueError(
                f"{self.name} has the columns {', '.join(self.columns)}, none of them for the picture "
                f"({', '.join(IMAGE_COLUMNS)}); set data.fields.image to the column with its path"
            )
        return fields


def _row_offsets(file: Any, separator: str, path: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row begins, in bytes, and where the last one ends; a quoted value may span lines."""
    position = file.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode(errors="replace")

    offsets, begin = [], position
    try:
        for row in csv.reader(lines(), delimiter=separator):
            if row:
                offsets.append(begin)
                begin = position
    except csv.Error as error:
        raise ValueError(f"{path}: row {len(offsets) + 1} at byte {begin} cannot be read: {error}") from None
    return np.array([*offsets, begin], dtype=np.int64)


class FolderSource:
    """A folder of pictures, in one folder per class or flat, with files of the same stem beside them.

    `cat/001.jpg` has the label of its folder's place in the alphabet, and the folder's name for a caption
    unless a `cat/001.txt` or `cat/001.json` lies beside it. One folder alone is no class.

    Args:
        path: the local folder.
        fields: what the extensions mean; `image` says which files are pictures.
        max_bytes: a larger file makes a bad sample.

    Raises:
        FileNotFoundError: if there is no such folder, or no picture in it.
    """

    def __init__(self, path: str, *, fields: Fields | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.name, self.fields, self.max_bytes = path, fields or Fields(), max_bytes
        if not os.path.isdir(path):
            raise FileNotFoundError(f"no folder {path}; {nearby(path)}")
        kinds = set(alternatives(self.fields.image))
        self._items = [(stem, found) for stem, found in _stems(path) if kinds & {e.lower() for e in found}]
        if not self._items:
            raise FileNotFoundError(
                f"no pictures ({', '.join(sorted(kinds))}) under {path}; {nearby(os.path.join(path, ''))}; "
                "tar shards in folders of folders are named as data/*/*.tar"
            )
        folders = sorted({stem.split("/")[0] for stem, _ in self._items if "/" in stem})
        self.classes = folders if len(folders) > 1 else []

    def __len__(self) -> int:
        return len(self._items)

    def shard_sizes(self) -> list[int]:
        """One shard: the folder."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """Picture i and the files of its stem; BadSample if one of them cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)} in {self.name}")
        stem, extensions = self._items[i]
        sample = Sample(stem, self.name, {}, self.fields)
        for extension in extensions:
            path = os.path.join(self.name, f"{stem}.{extension}")
            sample.record[extension.lower()] = _read_whole(path, sample, self.max_bytes)
        folder = stem.split("/")[0]
        if "/" in stem and folder in self.classes:
            sample.record.setdefault("cls", self.classes.index(folder))
            if not {"txt", "json"} & set(sample.record):
                sample.record["txt"] = folder
        return sample


def _stems(root: str) -> list[tuple[str, list[str]]]:
    """(path below root without extension, its extensions) of all but hidden files, in alphabetical order."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension and not name.startswith("."):
                path = os.path.relpath(os.path.join(folder, stem), root).replace(os.sep, "/")
                found.setdefault(path, []).append(extension[1:])
    return sorted(found.items())


def _read_whole(path: str, sample: Sample, max_bytes: int) -> bytes:
    try:
        with ByteFile(path) as file:
            if file.size > max_bytes:
                raise sample.bad(f"{path} has {file.size} bytes, over the limit of {max_bytes}")
            return file.read(0, file.size)
    except (FileNotFoundError, IsADirectoryError):
        raise sample.bad(f"no file {path}") from None


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
    if format not in FORMATS:
        raise ValueError(f"no format called {format!r}; known: {', '.join(FORMATS)}")
    paths = [path] if isinstance(path, str) else list(path)
    kind = _kind(paths) if format == "auto" else format
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


def _kind(paths: list[str]) -> str:
    first = paths[0].removeprefix("file://") if paths else ""
    if first.endswith((".csv", ".tsv")):
        return "table"
    if os.path.isdir(first) and not any(name.endswith(".tar") for name in os.listdir(first)):
        return "folder"
    if is_local(first) and os.path.isfile(first) and not first.endswith(".tar"):
        raise ValueError(f"cannot tell what {first} is; expected .tar shards, a .csv or .tsv table, or a folder")
    return "tar"


def check_source(source: Source, fields_needed: Sequence[str] = ("image", "caption"), num: int = 2) -> None:
    """Read the first samples of the first and last shard, so that a wrong field name fails now, not never.

    Args:
        source: what to check.
        fields_needed: fields that training will ask for.
        num: samples to read of each of the two shards.

    Raises:
        ValueError: if a field can be read from none of a shard's samples; lists what they have and a fix.
    """
    sizes = source.shard_sizes()
    filled = [shard for shard, size in enumerate(sizes) if size]
    for shard in dict.fromkeys([filled[0], filled[-1]]):
        start = sum(sizes[:shard])
        samples, errors = _readable(source, range(start, start + min(num, sizes[shard])))
        for name in fields_needed:
            reasons = errors + [str(error) for sample in samples if (error := _unusable(sample, name))]
            if len(reasons) == len(errors) + len(samples):
                raise ValueError(_explain(source, name, samples, reasons))


def _readable(source: Source, indices: range) -> tuple[list[Sample], list[str]]:
    samples, errors = [], []
    for i in indices:
        try:
            samples.append(source.read(i))
        except BadSample as error:
            errors.append(str(error))
    return samples, errors


def _unusable(sample: Sample, name: str) -> BadSample | None:
    readers = {"image": sample.image, "caption": sample.captions}
    try:
        readers[name]() if name in readers else sample.get(name)
    except BadSample as error:
        return error
    return None


def _explain(source: Source, name: str, samples: list[Sample], reasons: list[str]) -> str:
    message = f"{source.name}: no {name} in the first {len(reasons)} samples of a shard. {reasons[0]}"
    if not samples or samples[0].has(name):
        return message
    available = samples[0].available()
    wanted = {
        "image": ("jpg", "png", "webp", "jpeg", "img", "image"),
        "caption": ("caption", "text", "title", "alt"),
    }
    likely = [key for word in wanted.get(name, (name,)) for key in available if word in key.lower()] or available
    option = f"data.fields.{name}" if name in ("image", "caption", "label", "regions") else f"data.fields.extra.{name}"
    return f"{message}. Say where it is, for example {option}: {likely[0]}"
