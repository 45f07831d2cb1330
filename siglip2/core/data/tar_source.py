"""Tar shards as a source: sample i is found in the index of its shard and read at its offset."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import numpy as np

from siglip2.core.data.fields import Fields, Sample, is_json
from siglip2.core.data.storage import MAX_BYTES, ByteFile, cached_copy, expand_shards, is_local
from siglip2.core.data.tar_index import IndexHead, TarIndex, load_index, read_head

log = logging.getLogger(__name__)

OPEN_SHARDS = 128  # per worker; an index of 10 000 samples takes 0.7 MB
REMOTE_THREADS = 16
SLACK_BYTES = 2**16  # headers, padding or an unused member between two members: up to this, one read takes both


class TarSource:
    """Tar shards, each sample read at its offset.

    Of a sample only the members that a field may be in are read: those that `fields` names, and JSON. Indexes
    are read from beside the shards and made where they are missing; `siglip2 index` makes them beforehand.

    Args:
        spec: shards as `expand_shards` takes them.
        fields: what the members mean.
        cache_dir: keep whole remote shards here once one of their samples was asked for; grows to the size of
            the dataset. Delete it if the shards change.
        max_bytes: a sample with a larger member, read or not, is a bad one.

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
        self._wanted = self.fields.words()
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
        """Sample i with the members a field may be in; BadSample if one is too large or the shard ends inside it."""
        shard, j = self._place(i)
        file, index = self._open(shard)
        members = index.members(j)
        wanted = {e: place for e, place in members.items() if e in self._wanted or is_json(e)}
        unread = tuple(e for e in members if e not in wanted)
        sample = Sample(index.key(j), self.shards[shard], {}, self.fields, unread)
        for extension, (_, size) in members.items():
            if size > self.max_bytes:
                raise sample.bad(f"{extension!r} has {size} bytes, over the limit of {self.max_bytes}")
        contents = _read_members(file, wanted)
        sample.record.update((e, contents[e]) for e in wanted)
        if short := [e for e, (_, size) in wanted.items() if len(sample.record[e]) < size]:
            raise sample.bad(f"{short[0]!r} is cut: the shard became shorter after it was indexed")
        return sample

    def key(self, i: int) -> str:
        """The key of sample i, from the index alone."""
        shard, j = self._place(i)
        return self._open(shard)[1].key(j)

    def _place(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.name}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - int(self._ends[shard]) + self._sizes[shard]

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
                advice = "write or download it again, then run `siglip2 index`"
                log.warning("damaged shard in %s: %s; %s", os.path.dirname(shard), head.damage, advice)
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
        return path if self.cache_dir is None or is_local(path) else cached_copy(path, self.cache_dir)

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
    """The members' contents; those that lie together, as they mostly do, in one read."""
    groups: list[dict[str, tuple[int, int]]] = []
    end = 0
    for extension, (offset, size) in sorted(members.items(), key=itemgetter(1)):
        if not groups or offset - end > SLACK_BYTES:
            groups.append({})
        groups[-1][extension] = (offset, size)
        end = offset + size
    contents: dict[str, bytes] = {}
    for group in groups:
        places = list(group.values())
        begin, end = places[0][0], sum(places[-1])
        span = file.read(begin, end - begin)
        contents |= {e: span[offset - begin : offset - begin + size] for e, (offset, size) in group.items()}
    return contents
