"""By what a shard, table or folder is recognised, so that what was made of one is not taken for that of another."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from siglip2.core.data.fields import is_json
from siglip2.core.data.storage import ByteFile, is_local
from siglip2.core.data.tar_index import IndexHead, load_index, read_head

CHUNK = 2**24  # bytes of a table that are summed at a time


@dataclass(frozen=True)
class Stamp:
    """By what a shard, table or folder is recognised: cheap to compare, and independent of file times.

    Args:
        kind: tar, table or folder.
        num_samples: samples in it.
        num_bytes: its size; of a folder that of all files which were read.
        crc: of the tar headers at `probes`, of the table, or of the folder's file names and sizes.
        probes: where the first and the last member of a tar begin; of a remote tar only the size is compared.
    """

    kind: str
    num_samples: int
    num_bytes: int
    crc: int = 0
    probes: tuple[int, ...] = ()

    def change(self, where: str, num_samples: int, words: frozenset[str]) -> str:
        """Returns how a shard differs from the one that was embedded; "" if it does not.

        Args:
            where: the shard, table or folder.
            num_samples: that its source counts now.
            words: extensions that were read, of a folder.

        Raises:
            OSError: if it cannot be opened.
        """
        if num_samples != self.num_samples:
            return f"it has {num_samples} samples, {self.num_samples} were embedded"
        if self.kind == "tar":
            with ByteFile(where) as file:
                head = IndexHead(num_samples, 0, self.num_bytes, self.probes, self.crc)
                return "" if head.fits(file) else self._size_change(file.size) or "its first or last file is another"
        now = stamp(self.kind, where, num_samples, words)
        return self._size_change(now.num_bytes) or ("" if now == self else "its content is another")

    def _size_change(self, num_bytes: int) -> str:
        return "" if num_bytes == self.num_bytes else f"it has {num_bytes} bytes, those embedded had {self.num_bytes}"


def stamp(kind: str, where: str, num_samples: int, words: frozenset[str]) -> Stamp:
    """Returns what a shard, table or folder is recognised by.

    Args:
        kind: tar, table or folder.
        where: its path or URL.
        num_samples: that its source counts.
        words: extensions that are read, of a folder; other files may come and go.
    """
    if kind == "folder":
        lines = sorted(_listing(where, words))
        return Stamp(kind, num_samples, sum(size for _, size in lines), zlib.crc32(repr(lines).encode()))
    if kind == "tar":
        head = read_head(where)
        if head is None and is_local(where):
            head = load_index(where, write=False).head
        if head is not None:
            return Stamp(kind, num_samples, head.tar_size, head.fingerprint, head.probes)
    crc = 0
    with ByteFile(where) as file:
        for begin in range(0, file.size, CHUNK) if kind == "table" else ():
            crc = zlib.crc32(file.read(begin, CHUNK), crc)
        return Stamp(kind, num_samples, file.size, crc)


def _listing(folder: str, words: frozenset[str]) -> list[tuple[str, int]]:
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            extension = os.path.splitext(name)[1][1:].lower()
            if not name.startswith(".") and (extension in words or is_json(name)):
                path = os.path.join(root, name)
                found.append((os.path.relpath(path, folder), os.path.getsize(path)))
    return found


def extensions(fields: Mapping[str, str]) -> frozenset[str]:
    """Returns the words of field specs: `jpg;png` gives jpg and png."""
    return frozenset(word.strip() for spec in fields.values() for word in spec.replace("|", ";").split(";"))
