"""Where each sample of a tar shard lies, kept in a small file beside the shard, so that sample i is one read.

The index of `00000.tar` is `00000.tar.index`: one line of JSON (version, tar size, a fingerprint, counts,
damage), then raw little-endian arrays. It says the same as reading the shard through webdataset: a sample is
the files that share the path up to the first dot of the basename, extensions are lower-cased, directories and
`__names__` are left out.
"""

import glob
import json
import logging
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

log = logging.getLogger(__name__)

VERSION = 1
BLOCK = 512  # bytes; tar headers and contents are padded to it
HEAD_BYTES = 4096  # the JSON line is padded to this, so that counts can be read without the arrays
TRAILING_BYTES = 2**20  # tar pads its end with zeros; more than this behind the end mark is data that nobody reads
SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset.tariterators.base_plus_ext
HIDDEN = re.compile(r"__[^/]*__($|/)")  # and its skip_meta
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}
REGULAR, LONG_NAME, PAX, EMPTY = (b"0", b"\0", b"7"), b"L", b"x", (b"1", b"2", b"3", b"4", b"5", b"6")


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
    """Whether a path is one of this machine's, not an fsspec URL."""
    return "://" not in path


def read_file(path: str) -> bytes:
    """The whole of a local file or fsspec URL."""
    with ByteFile(path) as file:
        return file.read(0, file.size)


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


class TarDamage(Exception):
    """A tar file stops making sense at some byte; what came before is whole."""


@dataclass(frozen=True)
class IndexHead:
    """What the first line of an index says, enough to count a shard's samples and to see whether it changed.

    Args:
        num_samples: samples that can be read.
        num_members: files in them.
        tar_size: bytes of the shard when it was read.
        probes: where the first and the last member's tar headers start, in bytes.
        fingerprint: crc32 of those two headers (they hold names, sizes and times); does not depend on the
            file's own time.
        damage: what is wrong with the shard, where, and how much was kept; "" if nothing.
        num_duplicates: files left out because their sample already had one of that extension.
        text_bytes: length of the keys and of the extensions, behind the arrays.
        version: of this format.
    """

    num_samples: int
    num_members: int
    tar_size: int
    probes: tuple[int, ...]
    fingerprint: int
    damage: str = ""
    num_duplicates: int = 0
    text_bytes: tuple[int, int] = (0, 0)
    version: int = VERSION

    def fits(self, file: ByteFile) -> bool:
        """Whether the shard is still the one that was indexed; a remote one is compared by size alone."""
        if self.tar_size != file.size:
            return False
        return not is_local(file.path) or self.fingerprint == _fingerprint(file, self.probes)


# n samples, m members; `first` cuts the members into samples, `key_end` the text into keys
@dataclass(frozen=True, eq=False)
class TarIndex:
    """Key and members of every sample of a shard.

    Args:
        head: counts and fingerprint.
        first: number of the sample's first member, uint32 [n+1].
        key_end: where the sample's key ends in `keys`, uint32 [n].
        extension: into `extensions`, uint16 [m].
        offset: of the content, bytes, uint64 [m].
        size: of the content, bytes, uint64 [m].
        keys: all keys, joined.
        extensions: every extension that occurs.
    """

    head: IndexHead
    first: NDArray[np.uint32]
    key_end: NDArray[np.uint32]
    extension: NDArray[np.uint16]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint64]
    keys: bytes = field(repr=False)
    extensions: tuple[str, ...]

    def __len__(self) -> int:
        return self.head.num_samples

    @property
    def damage(self) -> str:
        """What is wrong with the shard; "" if nothing."""
        return self.head.damage

    def key(self, i: int) -> str:
        """The key of sample i."""
        begin = int(self.key_end[i - 1]) if i else 0
        return self.keys[begin : int(self.key_end[i])].decode(errors="surrogateescape")

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) in bytes, of sample i."""
        span = range(int(self.first[i]), int(self.first[i + 1]))
        return {self.extensions[self.extension[m]]: (int(self.offset[m]), int(self.size[m])) for m in span}

    def to_bytes(self) -> bytes:
        """The index as it is stored."""
        line = json.dumps(asdict(self.head), ensure_ascii=False).encode(errors="replace")
        assert len(line) < HEAD_BYTES, line
        arrays = (getattr(self, name).astype(dtype).tobytes() for name, dtype, _ in _layout(self.head))
        names = "\n".join(self.extensions).encode(errors="surrogateescape")
        return b"".join([line.ljust(HEAD_BYTES - 1) + b"\n", *arrays, self.keys, names])

    @classmethod
    def from_bytes(cls, stored: bytes) -> "TarIndex":
        """Read back what `to_bytes` wrote; ValueError if it is something else, of another version, or cut."""
        head, at, arrays = parse_head(stored[:HEAD_BYTES]), HEAD_BYTES, {}
        for name, dtype, count in _layout(head):
            arrays[name] = np.frombuffer(stored, dtype, count, at)
            at += arrays[name].nbytes
        keys, names = stored[at : at + head.text_bytes[0]], stored[at + head.text_bytes[0] :]
        if len(names) != head.text_bytes[1]:
            raise ValueError(f"the index has {len(stored)} bytes, which is not what its first line says")
        return cls(head, **arrays, keys=keys, extensions=tuple(names.decode(errors="surrogateescape").split("\n")))


def _layout(head: IndexHead) -> list[tuple[str, str, int]]:
    n, m = head.num_samples, head.num_members
    return [
        ("first", "<u4", n + 1),
        ("key_end", "<u4", n),
        ("extension", "<u2", m),
        ("offset", "<u8", m),
        ("size", "<u8", m),
    ]


def parse_head(line: bytes) -> IndexHead:
    """The head of a stored index; ValueError if it is none, or of another version."""
    try:
        values = json.loads(line)
        head = IndexHead(**values)
        if head.version == VERSION:
            return IndexHead(**{**values, "probes": tuple(head.probes), "text_bytes": tuple(head.text_bytes)})
    except (TypeError, ValueError):
        pass
    raise ValueError(f"not a tar index of version {VERSION}")


def sidecar_path(path: str) -> str:
    """Where the index of a shard is kept."""
    return f"{path}.index"


def index_tar(path: str) -> TarIndex:
    """Index one shard by reading its headers; a damaged one keeps the samples before the damage and says so.

    The files of a key that returns later in the shard join its sample; a second file of the same key and
    extension is left out and counted. Of a damaged shard the last sample is kept only if it has the same
    extensions as the one before it.

    Args:
        path: local path or fsspec URL.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is compressed, so that no sample can be read on its own.
    """
    with ByteFile(path) as file:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        damage, num_duplicates, last = "", 0, ""
        try:
            for name, offset, size in read_members(file):
                match = SPLIT.match(name)
                if match is None or HIDDEN.match(name):
                    continue
                last, extension = match.group(1), match.group(2).lower()
                found = samples.setdefault(last, {})
                num_duplicates += extension in found
                found.setdefault(extension, (offset, size))
        except TarDamage as error:
            kinds = [set(found) for found in list(samples.values())[-2:]]
            if len(kinds) == 2 and kinds[0] != kinds[1]:
                del samples[last]
            name = path.rpartition("/")[2]  # without the folder, which may be another tomorrow
            damage = f"{name}: {error}; {len(samples)} samples before it are kept"
        return _build(file, samples, damage, num_duplicates)


def _build(
    file: ByteFile, samples: dict[str, dict[str, tuple[int, int]]], damage: str, num_duplicates: int
) -> TarIndex:
    places = [place for found in samples.values() for place in found.values()]
    names = Counter(extension for found in samples.values() for extension in found)
    number = {extension: k for k, extension in enumerate(names)}
    keys = [key.encode(errors="surrogateescape") for key in samples]
    probes = (places[0][0] - BLOCK, places[-1][0] - BLOCK) if places else ()
    head = IndexHead(
        num_samples=len(samples),
        num_members=len(places),
        tar_size=file.size,
        probes=probes,
        fingerprint=_fingerprint(file, probes),
        damage=damage[-HEAD_BYTES // 8 :],
        num_duplicates=num_duplicates,
        text_bytes=(sum(map(len, keys)), len("\n".join(names).encode(errors="surrogateescape"))),
    )
    return TarIndex(
        head,
        first=np.cumsum([0] + [len(found) for found in samples.values()], dtype="<u4"),
        key_end=np.cumsum([len(key) for key in keys], dtype="<u4"),
        extension=np.array([number[e] for found in samples.values() for e in found], dtype="<u2"),
        offset=np.array([offset for offset, _ in places], dtype="<u8"),
        size=np.array([size for _, size in places], dtype="<u8"),
        keys=b"".join(keys),
        extensions=tuple(names),
    )


def _fingerprint(file: ByteFile, probes: Sequence[int]) -> int:
    return zlib.crc32(b"".join(file.read(at, BLOCK) for at in probes))


def read_members(file: ByteFile) -> Iterator[tuple[str, int, int]]:
    """Name, content offset and content size of each regular file in a tar (ustar, pax and GNU long names).

    A few lines instead of `tarfile`, which is five times slower and ends in silence at a header it cannot
    read.

    Raises:
        TarDamage: where the file is cut or a header is broken.
        ValueError: if it is compressed.
    """
    at = 0
    override: dict[str, str] = {}  # from an extended header, for the file behind it
    while True:
        header = file.stream(at, BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"cut at byte {file.size}, without the end mark of a tar")
        if not any(header):
            if (rest := file.size - at) > TRAILING_BYTES:
                raise TarDamage(f"{rest} bytes behind the end mark at byte {at} are not read (joined tars?)")
            return
        if at == 0 and header[:2] in COMPRESSED:
            how = COMPRESSED[header[:2]]
            raise ValueError(f"{file.path} is compressed ({how}); unpack it, so that single samples can be read")
        kind, name, size = _parse_header(header, at)
        size = 0 if kind in EMPTY else int(override.get("size", size)) if kind in REGULAR else size
        begin, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if begin + size > file.size:
            raise TarDamage(f"cut at byte {file.size}, inside {name!r}")
        if kind == LONG_NAME:
            override["path"] = _text(file.stream(begin, size))
        elif kind == PAX:
            override |= _parse_pax(file.stream(begin, size), begin)
        else:
            name = override.get("path", name)
            if kind in REGULAR and not name.endswith("/"):
                yield name, begin, size
            override = {} if kind in REGULAR + EMPTY else override


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _parse_header(header: bytes, at: int) -> tuple[bytes, str, int]:
    """Kind, name and size of one tar header."""
    try:
        checksum = int(_text(header[148:156]).strip() or "0", 8)
        size = int(_text(header[124:136]).strip() or "0", 8) if header[124] < 0x80 else -1
        if size < 0:  # GNU's base-256 for files of 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarDamage(f"no tar header at byte {at}")
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return header[156:157], f"{prefix}/{name}" if prefix else name, size


def _parse_pax(records: bytes, at: int) -> dict[str, str]:
    """The `length key=value` records of an extended header."""
    found = {}
    try:
        while records and records[0]:
            length = int(records[: records.index(b" ")])
            key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
            found[key.decode()] = value.decode(errors="surrogateescape")
            records = records[length:] if length > 0 else b""
    except ValueError:
        raise TarDamage(f"broken extended header at byte {at}") from None
    return found


def read_head(path: str) -> IndexHead | None:
    """The head of a shard's stored index; None if there is none that still fits the shard."""
    try:
        with ByteFile(sidecar_path(path)) as stored, ByteFile(path) as shard:
            head = parse_head(stored.read(0, HEAD_BYTES))
            return head if head.fits(shard) else None
    except (FileNotFoundError, ValueError):
        return None


def load_index(path: str, *, write: bool = True) -> TarIndex:
    """The index of a shard: the stored one if it fits, else made now and, where that is allowed, stored.

    Args:
        path: the shard, a local path or fsspec URL.
        write: store a new index beside a local shard.

    Raises:
        OSError: if the shard cannot be opened.
        ValueError: if it is compressed.
    """
    if read_head(path) is not None:
        try:
            return TarIndex.from_bytes(read_file(sidecar_path(path)))
        except ValueError:
            log.warning("%s is damaged and is made anew", sidecar_path(path))
    if not is_local(path):
        log.warning("%s has no index and is read whole to make one; `siglip2 index` stores it beside the shard", path)
    index = index_tar(path)
    if write and is_local(path):
        try:
            write_file(sidecar_path(path), index.to_bytes())
        except OSError as error:  # a read-only dataset is fine: the index is made again next time
            log.info("%s could not be written (%s)", sidecar_path(path), error)
    return index


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
