"""Batches as a pure function of their number: what makes resume exact and the number of workers irrelevant."""

import ctypes
import multiprocessing.context
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from siglip2.core.batch import Batch, Fault, Pack, collate
from siglip2.core.data.fields import BadSample
from siglip2.core.data.mixture import Mixture
from siglip2.core.data.order import Order
from siglip2.core.data.source import Source
from siglip2.core.data.text import Tokenizer
from siglip2.core.layout import Layout, Packer, Patchifier, Positions
from siglip2.core.timeline import Timeline
from siglip2.core.views import Context, View

ATTEMPTS = 32
NOTE_BYTES = 512  # of one worker


@runtime_checkable
class KnowsKeys(Protocol):
    """A source that can name a sample without reading it."""

    def key(self, i: int) -> str:
        """The key of sample i."""
        ...


class Noticeboard:
    """What each loader worker is reading, in memory that it shares with the training process.

    A worker writes a line before each sample, which takes microseconds; when a batch does not come, the watchdog reads
    them. A copy that is not made for a worker has memory of its own.

    Args:
        workers: loader processes; with none, the training process has the one place.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._notes: Any = RawArray(ctypes.c_char, max(1, workers) * NOTE_BYTES)

    def write(self, text: str) -> None:
        """Notes what this worker begins to do; an empty text says that it does nothing."""
        worker = get_worker_info()
        begin = NOTE_BYTES * (worker.id if worker else 0)
        line = f"{time.monotonic():.3f} {text}".encode()[: NOTE_BYTES - 1] + b"\0" if text else b"\0"
        self._notes[begin : begin + len(line)] = line

    def read(self) -> list[tuple[int, str, float]]:
        """Returns (worker, what it does, for how many seconds) of each worker that does something."""
        found = []
        for worker in range(max(1, self.workers)):
            begin = worker * NOTE_BYTES
            since, _, text = self._notes[begin : begin + NOTE_BYTES].split(b"\0")[0].partition(b" ")
            if text:
                found.append((worker, text.decode(errors="replace"), time.monotonic() - float(since)))
        return found

    def __reduce__(self) -> Any:
        shared = multiprocessing.context.get_spawning_popen() is not None
        return _noticeboard, (self.workers, self._notes if shared else None)


def _noticeboard(workers: int, notes: Any) -> Noticeboard:
    board = Noticeboard(workers)
    board._notes = notes or board._notes
    return board


class Row(NamedTuple):
    """The views of one sample by name, its key, and what parts of it were left out."""

    key: str
    views: dict[str, Any]
    notes: list[Fault]


class Shares(NamedTuple):
    """How a caption is drawn from those of a sample.

    Args:
        languages: share of each language; None draws evenly.
        captions: share of each caption field; None takes `caption`.
    """

    languages: Mapping[str, float] | None = None
    captions: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Maker:
    """Makes rows of views out of samples; the same for training and evaluation.

    Args:
        source: the samples.
        patchifier: the recipe's patchifier.
        tokenizer: text to ids.
        seed: with the position of a sample it decides every random choice.
        shares: how captions are drawn, by the source of the sample ("" where there is only one); evenly from
            `caption` where nothing is said.
        board: where to note what is being read.
    """

    source: Source
    patchifier: Patchifier
    tokenizer: Tokenizer
    seed: int
    shares: Mapping[str, Shares] = field(default_factory=dict)
    board: Noticeboard | None = field(default=None, compare=False, repr=False)

    def row(self, sample_index: int, *, position: int, views: Sequence[View], layout: Layout) -> Row:
        """Returns the views of one sample; raises BadSample."""
        self.note(lambda: f"reading {self._place(sample_index)}")
        sample = self.source.read(sample_index)
        self.note(lambda: f"making views of {sample.place}, key {sample.key},")
        made: dict[str, Any] = {}
        for view in views:
            try:
                made[view.name] = view(sample, self._context(view, position, layout, sample.source))
            except Exception as error:
                error.add_note(f"while making the view '{view.name}' of {sample.place}, key {sample.key}")
                raise
        return Row(sample.key, made, [Fault(sample.place, sample.key, reason) for reason in sample.notes])

    def note(self, text: Callable[[], str]) -> None:
        """Notes what this worker begins to do, if there is a board."""
        if self.board is not None:
            self.board.write(text())

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.source.shard_sizes())

    def _place(self, i: int) -> str:
        """Shard and key of a sample that has not been read; where keys are not known, its number in the shard."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        names = getattr(self.source, "shards", None)
        where = names[shard] if names else self.source.name
        if isinstance(self.source, KnowsKeys):
            return f"{where}, key {self.source.key(i)},"
        return f"{where}, sample {i - int(self._ends[shard - 1] if shard else 0)} of it,"

    def pack(self, layout: Layout) -> Pack | None:
        """Returns what joins images into shared rows; None where each has its own.

        Raises:
            ValueError: if the layout is packed and the patchifier cannot pack.
        """
        if not layout.packed:
            return None
        if not isinstance(self.patchifier, Packer):
            raise ValueError(f"{type(self.patchifier).__name__} has a packed layout, but no method `pack`")
        return partial(self.patchifier.pack, layout=layout)

    def _context(self, view: View, position: int, layout: Layout, source: str) -> Context:
        entropy = (self.seed, position, zlib.crc32(view.name.encode()))
        languages, captions = self.shares.get(source, Shares())
        return Context(entropy, self.patchifier, layout, self.tokenizer, languages, captions)


class TrainBatches(Dataset[Batch]):
    """Map from the number of a global batch to this rank's share of it.

    Args:
        maker: makes rows.
        order: which sample stands at which position of the stream.
        views: (start, views) of each phase, by progress, in order.
        max_batches: micro-batches of the whole run.
        accumulate: micro-batches per optimizer step; views change between steps, never inside one.
        rank: this process among `world_size`.
        world_size: processes that share each batch evenly.
        timeline: where the run stands in the whole; None for a whole one.

    Raises:
        ValueError: if a batch size does not divide over the ranks.
    """

    def __init__(
        self,
        maker: Maker,
        order: Order | Mixture,
        views: Sequence[tuple[float, tuple[View, ...]]],
        *,
        max_batches: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        timeline: Timeline | None = None,
    ):
        self.accumulate = accumulate
        self.maker, self.order, self.views = maker, order, tuple(views)
        self.max_batches, self.rank, self.world_size = max_batches, rank, world_size
        self.timeline = timeline or Timeline(total=max_batches // accumulate, warmup=0)
        self._positions = Positions(maker.patchifier)
        for layout in maker.patchifier.layouts:
            share(layout, world_size)

    def __len__(self) -> int:
        return self.max_batches

    def __getitem__(self, index: int) -> Batch:
        layout = self.maker.patchifier.layout(index)
        size = share(layout, self.world_size)
        first = self.timeline.examples + self._positions.before(index) + self.rank * size
        step, steps = index // self.accumulate, self.max_batches // self.accumulate
        views = self.views_at(self.timeline.progress(step, steps))  # to the last bit what the module calls progress
        _, samples = self.order.many(first, size)
        faults: list[Fault] = []
        rows = []
        for position, sample in enumerate(samples.tolist(), start=first):
            rows.append(self._good_row(sample, position, views, layout, faults))
        self.maker.note(str)
        return join(rows, size=size, index=index, faults=faults, pack=self.maker.pack(layout))

    def views_at(self, progress: float) -> tuple[View, ...]:
        """Returns the views that are made at `progress`."""
        return [views for start, views in self.views if start <= progress][-1]

    def _good_row(self, sample: int, position: int, views: Sequence[View], layout: Layout, faults: list[Fault]) -> Row:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.maker.row(sample, position=position, views=views, layout=layout)
            except BadSample as bad:
                faults.append(Fault(bad.where, bad.key, bad.reason))
                sample = self.order.substitute(position, attempt)
        raise RuntimeError(
            f"{ATTEMPTS} samples in a row could not be used; the last: {faults[-1].where}, key {faults[-1].key}: "
            f"{faults[-1].reason}. Check data.train with `siglip2 index` and its fields"
        )


def join(
    rows: Sequence[Row], *, size: int, index: int, faults: Sequence[Fault] = (), pack: Pack | None = None
) -> Batch:
    """Returns the rows as batch number `index`; `pack` joins images that share rows."""
    notes = tuple(note for row in rows for note in row.notes)
    keys = tuple(row.key for row in rows)
    return Batch(collate([row.views for row in rows], pack), size, index, keys, faults=tuple(faults), notes=notes)


class EvalBatches(Dataset[Batch]):
    """A finite set in stored order, cut over the ranks; the last batch is filled up with rows that are not `real`.

    Args:
        maker: makes rows.
        views: the views of the evaluation.
        batch_size: rows per batch on each rank.
        rank: this process among `world_size`.
        world_size: processes that share the set; each makes the same number of batches.
        limit: use only so many samples.
        layout: of each batch on each rank, instead of the patchifier's for evaluation.
    """

    def __init__(
        self,
        maker: Maker,
        views: Sequence[View],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        layout: Layout | None = None,
    ):
        self.maker, self.views, self.batch_size = maker, tuple(views), batch_size
        self.layout = layout or maker.patchifier.eval_layout(batch_size)
        self.rank, self.world_size = rank, world_size
        self.num_samples = len(maker.source) if limit is None else min(limit, len(maker.source))

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        first = (index * self.world_size + self.rank) * self.batch_size
        faults: list[Fault] = []
        rows, real = [], []
        for position in range(first, first + self.batch_size):
            row, good = self._row(position, self.layout, faults)
            rows.append(row)
            real.append(good and position < self.num_samples)
        self.maker.note(str)
        pack = self.maker.pack(self.layout)
        batch = join(rows, size=self.batch_size, index=index, faults=faults, pack=pack)
        return replace(batch, real=torch.tensor(real))

    def _row(self, position: int, layout: Layout, faults: list[Fault]) -> tuple[Row, bool]:
        for other in range(self.num_samples):  # a bad sample, or one past the end, is filled in by a later one
            sample = (position + other) % self.num_samples
            try:
                return self.maker.row(sample, position=sample, views=self.views, layout=layout), other == 0
            except BadSample as bad:
                faults.append(Fault(bad.where, bad.key, bad.reason))
        raise RuntimeError(f"no sample of {self.maker.source.name} can be used; the last: {faults[-1]}")


class ResumableLoader(DataLoader[Batch]):
    """A loader whose place is the trainer's step count: there is nothing of its own to save."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: `FromIndex` starts where the restored trainer stands."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing; it is here so that Lightning knows that resuming inside an epoch is exact."""


class FromIndex(Sampler[int]):
    """Batch numbers first, first + 1, ... total - 1; its length is the whole run's, as the trainer counts."""

    def __init__(self, first: int, total: int):
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total


def share(layout: Layout, world_size: int) -> int:
    """Returns the rows of one rank.

    Raises:
        ValueError: if the global batch does not divide over the ranks.
    """
    if layout.batch_size % world_size:
        lower = layout.batch_size // world_size * world_size
        options = " or ".join(f"{size}" for size in (lower, lower + world_size) if size)
        raise ValueError(
            f"the global batch of {layout.batch_size} (those of {layout.seq_len} patches) does not divide over "
            f"{world_size} processes: set the patchifier's batch_size, or its batch_sizes or divisor, to {options}"
        )
    return layout.batch_size // world_size
