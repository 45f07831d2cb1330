"""Where each sample of a tar shard lies, kept in a small file beside the shard, so that sample i is one read.

The index of `00000.tar` is `00000.tar.index`: one line of JSON (version, tar size, a fingerprint, counts,
damage), then raw little-endian arrays. It says the same as reading the shard through webdataset: a sample is
the files that share the path up to the first dot of the basename, extensions are lower-cased, directories and
`__names__` are left out.
"""

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from siglip2.core.data.storage import ByteFile, is_local, read_file, write_file
from siglip2.core.data.tar_headers import BLOCK, TarDamage, read_members

log = logging.getLogger(__name__)

VERSION = 1
HEAD_BYTES = 4096  # the JSON line is padded to this, so that counts can be read without the arrays
SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset.tariterators.base_plus_ext
HIDDEN = re.compile(r"__[^/]*__($|/)")  # and its skip_meta


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
