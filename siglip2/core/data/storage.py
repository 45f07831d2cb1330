"""Bytes at a path or URL: read at an offset, as a whole, or kept as a local copy; and the shards that a spec names."""

import fcntl
import glob
import hashlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import fsspec
from braceexpand import braceexpand

from siglip2.core.data.fields import Sample

MAX_BYTES = 64 * 2**20  # of one file or member of a sample


class ByteFile:
    """A local file or fsspec URL, read at offsets; reads share no position, so threads may share one.

    Args:
        path: local path or fsspec URL.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    _fd: int = -1
    _ahead: Any = None

    def __init__(self, path: str) -> None:
        self.path = path
        if is_local(path):
            self._fd = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._fd).st_size
        else:
            self._fs, self._name = fsspec.core.url_to_fs(path)
            self.size = int(self._fs.size(self._name))

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only where the file ends."""
        if is_local(self.path):
            return os.pread(self._fd, size, offset)
        end = min(offset + size, self.size)
        return bytes(self._fs.cat_file(self._name, start=offset, end=end)) if offset < end else b""

    def stream(self, offset: int, size: int) -> bytes:
        """As `read`, for small reads in rising order: of a remote file, large pieces are fetched ahead."""
        if is_local(self.path):
            return self.read(offset, size)
        self._ahead = self._ahead or self._fs.open(self._name, "rb")
        self._ahead.seek(offset)
        return bytes(self._ahead.read(size))

    def __enter__(self) -> "ByteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the system lent; done by itself once nobody holds the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def is_local(path: str) -> bool:
    """Whether a path is a local one, not an fsspec URL."""
    return "://" not in path


def read_file(path: str) -> bytes:
    """The whole of a local file or fsspec URL."""
    with ByteFile(path) as file:
        return file.read(0, file.size)


def read_for(sample: Sample, path: str, *, max_bytes: int) -> bytes:
    """The whole of a file that belongs to a sample; BadSample if it is missing or has more than `max_bytes`."""
    try:
        with ByteFile(path) as file:
            if file.size > max_bytes:
                raise sample.bad(f"{path} has {file.size} bytes, over the limit of {max_bytes}")
            return file.read(0, file.size)
    except (FileNotFoundError, IsADirectoryError):
        raise sample.bad(f"no file {path}") from None


def write_file(path: str, content: bytes) -> None:
    """Write a local file or fsspec URL; a local one appears whole or not at all."""
    if not is_local(path):
        file_system, name = fsspec.core.url_to_fs(path)
        file_system.pipe_file(name, content)
        return
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp lets only the owner read, but shards are shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def cached_copy(url: str, cache_dir: str) -> str:
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


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """The shards that a spec names, in order; a shard named twice is there twice.

    Args:
        spec: paths or URLs, joined by `::` or in a list, each with `{00000..00012}` braces, `*` globs, or a
            folder of `*.tar`.

    Raises:
        FileNotFoundError: if a part of it matches nothing; says what lies near.
        ValueError: if it is empty or cannot be read at random (`pipe:`).
    """
    parts = [part.strip() for joined in ([spec] if isinstance(spec, str) else spec) for part in joined.split("::")]
    if not any(parts):
        raise ValueError("no shards given; expected a path such as data/{00000..00012}.tar, data/*.tar or data/")
    shards: list[str] = []
    for part in filter(None, parts):
        if part.startswith("pipe:"):
            raise ValueError(
                f"{part!r}: samples are read at random, a pipe is not; name the URL, as s3://bucket/00000.tar"
            )
        try:
            names = list(braceexpand(part.removeprefix("file://")))
        except ValueError:
            raise ValueError(f"{part!r}: a brace is not closed; expected such as data/{{00000..00012}}.tar") from None
        shards += [shard for name in names for shard in _matches(name)]
    missing = [shard for shard in shards if is_local(shard) and not os.path.isfile(shard)]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(shards)} shards)" if missing[1:] else ""
        raise FileNotFoundError(f"no shard {missing[0]}{more}; {nearby(missing[0])}")
    return shards


def _matches(name: str) -> list[str]:
    """The shards under one path or URL without braces: itself, what its globs match, or the *.tar in it."""
    if not glob.has_magic(name) and name.endswith(".tar"):
        return [name]
    file_system = None if is_local(name) else fsspec.core.url_to_fs(name)[0]
    if not glob.has_magic(name):
        if not (os.path.isdir(name) if file_system is None else file_system.isdir(name)):
            return [name]
        name = f"{name.rstrip('/')}/*.tar"
    if file_system is None:
        found = glob.glob(name)
    else:
        found = [file_system.unstrip_protocol(path) for path in file_system.glob(name)]
    if not found:
        raise FileNotFoundError(f"nothing matches {name}; {nearby(name)}")
    return sorted(found)


def nearby(path: str) -> str:
    """What lies where a path was looked for, as the end of an error message."""
    if not is_local(path):
        return "check the bucket, the path and your credentials"
    folder = os.path.dirname(path) or "."
    while not os.path.isdir(folder) and folder not in ("/", ".", ""):
        folder = os.path.dirname(folder) or "."
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    listing = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "") if names else "nothing"
    return f"{os.path.abspath(folder)} holds {listing}. Check the path"
