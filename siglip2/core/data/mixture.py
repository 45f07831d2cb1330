"""Several sources as one: which of them each position of the training stream takes its sample from.

A pure function of (seed, position), as the order inside each source is. Positions are cut into blocks of `BLOCK`. In
block b source k has floor(E_k L + u_b) - floor(E_{k-1} L + u_b) places, where L is the block's length, E are the
cumulative shares, and u_b is drawn in [0, 1): places sum to L, their expectation is the share, and a share that is
whole in L is exact in every block. Where they lie in the block is a permutation. The n-th place of a source is
position n of that source's own order.
"""

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.data.order import Order

if TYPE_CHECKING:
    from siglip2.core.data.source import Source

BLOCK = 1000  # L: shares in whole per mille are exact in every block
KEPT_BLOCKS = 4
CHUNK = 2**16  # blocks before which counts are remembered; asking for a block draws for up to so many
PER_COUNTER = 4  # numbers that one step of Philox's counter gives
COUNTS, PLACES = range(2)  # what a random stream is for; part of its key


class Mixture:
    """Position -> sample number among all sources, each of which has its share of every stretch of positions.

    Source k's samples are numbered after those of the sources before it, as `JoinedSource` reads them. To begin at a
    far position costs a count over the blocks before it, once: about a second for 40 billion positions.

    Args:
        orders: the order of each source, by name.
        shares: share of each source, > 0; they are divided by their sum.
        seed: of the places, >= 0.

    Raises:
        ValueError: if the names differ, or a share is not above 0.
    """

    def __init__(self, orders: Mapping[str, Order], shares: Mapping[str, float], seed: int) -> None:
        if not orders or orders.keys() != shares.keys():
            raise ValueError(f"a mixture of {list(orders)} has shares for {list(shares)}")
        if bad := [name for name, share in shares.items() if not 0 < share < np.inf]:
            raise ValueError(f"the share of {bad[0]!r} is {shares[bad[0]]}, expected a number above 0")
        self.names, self.orders, self.seed = tuple(orders), tuple(orders.values()), int(seed)
        sums = np.cumsum([shares[name] for name in self.names], dtype=np.float64)
        edges = np.round(sums / sums[-1] * BLOCK, 9)  # 0.7 of a block is 700 places, whatever float64 makes of it
        self._whole = np.floor(edges).astype(np.int64)
        # u_b is a whole number of 2**-32, so that comparing it is exact: one place more where u_b >= 1 - the fraction
        self._threshold = np.ceil((1.0 - (edges - self._whole)) * 2**32).astype(np.uint64)
        self._offsets = np.cumsum([0, *(order.num_samples for order in self.orders)])[:-1]
        self._known = [np.zeros(len(self.names), dtype=np.int64)]  # carries before each chunk of blocks
        self._blocks: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": OrderedDict()}  # workers make their own

    def many(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs (of their source) and sample numbers of `count` positions from `start` on, each int64 [count]."""
        if start < 0 or count < 0:
            raise ValueError(f"start is {start} and count is {count}, expected 0 or more")
        epochs, numbers = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            block, begin = divmod(start + done, BLOCK)
            before, owners = self._block(block)
            owners, earlier = owners[begin : begin + count - done], owners[:begin]
            for k, order in enumerate(self.orders):
                here = done + np.flatnonzero(owners == k)
                first = int(before[k] + np.count_nonzero(earlier == k))
                epochs[here], found = order.many(first, len(here))
                numbers[here] = self._offsets[k] + found
            done += len(owners)
        return epochs, numbers

    def substitute(self, position: int, attempt: int) -> int:
        """Another sample of the same source for a position whose own is bad: a fixed draw, as `Order.substitute`.

        Args:
            position: whose sample could not be used.
            attempt: 1, 2, ... until one is good.
        """
        block, place = divmod(int(position), BLOCK)
        before, owners = self._block(block)
        k = int(owners[place])
        own = int(before[k] + np.count_nonzero(owners[:place] == k))
        return int(self._offsets[k]) + self.orders[k].substitute(own, attempt)

    def counts(self, position: int) -> dict[str, int]:
        """How many of the positions before `position` belong to each source."""
        block, place = divmod(int(position), BLOCK)
        before, owners = self._block(block)
        found = before + np.bincount(owners[:place], minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of each source before a block, int64 [K], and the source of each place in it, int64 [BLOCK]."""
        if block not in self._blocks:
            carries = self._carried_before(block)
            here = _steps(self._whole + self._carried_in(block, 1))
            seeds = np.random.SeedSequence(entropy=self.seed, spawn_key=(PLACES, block))
            drawn = np.argsort(np.random.Philox(seeds).random_raw(BLOCK), kind="stable")
            self._blocks[block] = _steps(block * self._whole + carries), np.repeat(np.arange(len(here)), here)[drawn]
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def _carried_before(self, block: int) -> NDArray[np.int64]:
        """In how many blocks before this one each cumulative share was carried to the next whole number, int64 [K]."""
        chunk, rest = divmod(block, CHUNK)
        for known in range(len(self._known), chunk + 1):
            self._known.append(self._known[-1] + self._carried_in((known - 1) * CHUNK, CHUNK))
        return self._known[chunk] + self._carried_in(chunk * CHUNK, rest)

    def _carried_in(self, first: int, count: int) -> NDArray[np.int64]:
        """In how many of `count` blocks from `first` on each cumulative share is carried, int64 [K]."""
        seeds = np.random.SeedSequence(entropy=self.seed, spawn_key=(COUNTS,))
        bits = np.random.Philox(seeds)
        bits.advance(first // PER_COUNTER)
        drawn = np.asarray(bits.random_raw(first % PER_COUNTER + count))[first % PER_COUNTER :] >> np.uint64(32)
        return np.array([np.count_nonzero(drawn >= threshold) for threshold in self._threshold])


def _steps(cumulative: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.diff(cumulative, prepend=0)


def seed_of(seed: int, name: str) -> int:
    """The seed of a source's own order: it depends on its name, so that another source does not reshuffle this one."""
    words = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(2)
    return int(words[0]) << 32 | int(words[1])


class JoinedSource:
    """Several sources one after another; each sample knows which one it came from.

    Args:
        parts: the sources by name.
    """

    def __init__(self, parts: "Mapping[str, Source]") -> None:
        self.parts = dict(parts)
        self.name = " + ".join(self.parts)
        self.shards = [shard for part in self.parts.values() for shard in getattr(part, "shards", [part.name])]
        self._ends = np.cumsum([len(part) for part in self.parts.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard_sizes(self) -> list[int]:
        """Samples in each shard, in order."""
        return [size for part in self.parts.values() for size in part.shard_sizes()]

    def first_of(self, name: str) -> int:
        """The number of the first sample of a part."""
        number = list(self.parts).index(name)
        return int(self._ends[number]) - len(self.parts[name])

    def read(self, i: int) -> Sample:
        """Sample i, which knows its source; BadSample if it cannot be read, IndexError if there is no such number."""
        name, j = self._place(i)
        try:
            sample = self.parts[name].read(j)
        except BadSample as bad:
            raise BadSample(f"{name}: {bad.where}", bad.key, bad.reason) from None
        sample.source = name
        return sample

    def key(self, i: int) -> str:
        """The key of sample i; its number in its source where keys are not known before reading."""
        name, j = self._place(i)
        part = self.parts[name]
        return part.key(j) if hasattr(part, "key") else f"number {j}"

    def _place(self, i: int) -> tuple[str, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.name}")
        names: Sequence[str] = list(self.parts)
        number = int(np.searchsorted(self._ends, i, side="right"))
        return names[number], i - int(self._ends[number]) + len(self.parts[names[number]])
