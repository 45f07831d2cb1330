"""Which sample stands at which position of the endless training stream: a pure function of (seed, position).

Nothing here remembers how far training has come, so resuming is asking for a later position, and it does not
matter how many workers or machines ask, in which order, or whether they ask twice.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

KEPT_BLOCKS = 2  # a batch may straddle two
SHARDS, SAMPLES, SUBSTITUTE, OFFSET = range(4)  # what a random stream is for; part of its key


class Weights(Protocol):
    """How often each sample is wanted, in relation to the others, one shard at a time.

    Attributes:
        totals: sum of the weights of each shard, float64 [S], >= 0 and not all 0.
    """

    @property
    def totals(self) -> NDArray[np.float64]: ...

    def read(self, shard: int) -> NDArray[np.float64]:
        """The weights of a shard's samples, float64 [n], >= 0."""
        ...


class Order:
    """Position -> (epoch, sample index): every epoch visits every sample once, in an order of its own.

    Shuffling permutes the shards, then permutes the samples within each run of `window` shards. A small
    window keeps few shards in use at a time (for slow disks and remote storage) and takes little memory; the
    whole epoch shuffles best.

    With weights an epoch has as many places as there are samples, and sample i has floor(C_i + u) - floor(C_{i-1} + u)
    of them, where C are the cumulative weights scaled to end at the number of samples and u is drawn in [0, 1) for each
    epoch (systematic sampling). The expectation is exactly proportional to the weight, the count is off by less than
    one, and sums of whole shards say where each shard's places begin.

    Args:
        shard_sizes: number of samples in each shard; sample indices run through them in this order.
        seed: of the shuffling, >= 0.
        shuffle: False reads every epoch in stored order.
        window: shards mixed together at a time; None mixes the whole epoch. Each worker holds 8 bytes per
            sample of two windows, and three times that while it shuffles one.
        weights: how often each sample is wanted; None takes each once an epoch.

    Raises:
        ValueError: if there are no samples, seed or window is out of range, or there are weights but no shuffling.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        *,
        shuffle: bool = True,
        window: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0 or (self.shard_sizes < 0).any():
            raise ValueError(f"nothing to order: {len(self.shard_sizes)} shards with {self.num_samples} samples in all")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}, expected the number of shards to mix, 1 or more, or null for all")
        if weights is not None and not shuffle:
            raise ValueError("weights are for a shuffled order: without shuffling every sample comes once")
        self.seed, self.shuffle, self.window, self.weights = int(seed), shuffle, window, weights
        self._starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._reach = None if weights is None else _scaled(weights.totals, self.num_samples)
        self._plans: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64], int]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": OrderedDict(), "_blocks": OrderedDict()}  # workers make their own

    @overload
    def __getitem__(self, position: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, position: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, position: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        """(epoch, sample index) at one position, or a list of them for a slice with both ends given."""
        if isinstance(position, slice):
            if position.stop is None:
                raise ValueError("the order has no end: give the slice a stop")
            epochs, indices = self.many(first := position.start or 0, max(0, position.stop - first))
            pairs = list(zip(epochs.tolist(), indices.tolist(), strict=True))
            return pairs[:: position.step]
        if position < 0:
            raise ValueError(f"position is {position}, expected 0 or more")
        epoch, rank = divmod(int(position), self.num_samples)
        if not self.shuffle:
            return epoch, rank
        block, begin = self._locate(epoch, rank)
        return epoch, int(self._block(epoch, block)[rank - begin])

    def many(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample indices of `count` positions from `start` on, each int64 [count]."""
        if start < 0 or count < 0:
            raise ValueError(f"start is {start} and count is {count}, expected 0 or more")
        epochs, ranks = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_samples)
        if not self.shuffle:
            return epochs, ranks
        indices, done = np.empty(count, dtype=np.int64), 0
        while done < count:
            epoch, rank = int(epochs[done]), int(ranks[done])
            block, begin = self._locate(epoch, rank)
            part = self._block(epoch, block)[rank - begin : rank - begin + count - done]
            indices[done : done + len(part)] = part
            done += len(part)
        return epochs, indices

    def substitute(self, position: int, attempt: int) -> int:
        """Another sample for a position whose own is bad: a fixed draw from all the others, by weight if there are any.

        Args:
            position: whose sample could not be used.
            attempt: 1, 2, ... until one is good.
        """
        if attempt < 1:
            raise ValueError(f"attempt is {attempt}, expected 1 or more")
        bad = self[position][1]
        bits = self._random(1, SUBSTITUTE, position, attempt)[0]
        if self.weights is not None:
            return self._by_weight(bad, float(bits >> np.uint64(11)) / 2**53)
        drawn = int(bits % np.uint64(self.num_samples))
        return drawn if drawn != bad else (drawn + 1) % self.num_samples

    def _by_weight(self, bad: int, u: float) -> int:
        """The sample at the share `u` in [0, 1) of all weights but that of `bad`; `bad` if no other has any."""
        assert self.weights is not None
        assert self._reach is not None
        home = int(np.searchsorted(self._starts, bad, side="right")) - 1
        ends = self._reached(home)
        place = bad - int(self._starts[home])
        begin, end = ends[place], ends[place + 1]
        wanted = u * (self.num_samples - (end - begin))
        wanted += (end - begin) if wanted >= begin else 0.0
        wanted = min(wanted, float(np.nextafter(self.num_samples, 0)))  # the sum may have been rounded up
        shard = int(np.searchsorted(self._reach, wanted, side="right")) - 1
        found = int(np.searchsorted(self._reached(shard), wanted, side="right")) - 1
        return int(self._starts[shard]) + found

    def _reached(self, shard: int) -> NDArray[np.float64]:
        """Cumulative scaled weights from before the first to after the last sample of a shard, float64 [n + 1]."""
        assert self.weights is not None
        assert self._reach is not None
        begin, end = self._reach[shard], self._reach[shard + 1]
        sums = np.cumsum(self.weights.read(shard), dtype=np.float64)
        scale = (end - begin) / sums[-1] if sums[-1] > 0 else 0.0
        inner = np.where(sums == sums[-1], end, np.minimum(begin + sums * scale, end))  # the next shard begins at `end`
        return np.concatenate([[begin], inner])

    def _random(self, count: int, *purpose: int) -> NDArray[np.uint64]:
        # raw bits of Philox are the same in every numpy release; Generator.permutation promises no such thing
        seeds = np.random.SeedSequence(entropy=self.seed, spawn_key=purpose)
        return np.asarray(np.random.Philox(seeds).random_raw(count), dtype=np.uint64)

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The epoch's order of shards, where its blocks begin (and the last ends), and shards per block."""
        if epoch not in self._plans:
            num_shards = len(self.shard_sizes)
            shards = np.argsort(self._random(num_shards, SHARDS, epoch), kind="stable")
            ends = np.concatenate([[0], np.cumsum(self._places(epoch)[shards])])
            window = min(self.window or num_shards, num_shards)
            _keep(self._plans, epoch, (shards, np.append(ends[:-1:window], ends[-1]), window))
        return self._plans[epoch]

    def _places(self, epoch: int) -> NDArray[np.int64]:
        """How many places of the epoch each shard has, int64 [S]; its size, if there are no weights."""
        if self._reach is None:
            return self.shard_sizes
        return np.diff(self._whole(self._reach, epoch))

    def _whole(self, reached: NDArray[np.float64], epoch: int) -> NDArray[np.int64]:
        """Places of the epoch up to each of the cumulative scaled weights."""
        offset = float(self._random(1, OFFSET, epoch)[0] >> np.uint64(11)) / 2**53
        places = np.floor(reached + offset).astype(np.int64)
        return np.minimum(places, self.num_samples)  # a sum so near to the next number is rounded to it

    def _samples(self, epoch: int, shard: int) -> NDArray[np.int64]:
        """The samples of a shard in stored order, each as often as the epoch has it."""
        numbers = np.arange(self._starts[shard], self._starts[shard] + self.shard_sizes[shard])
        if self.weights is None or not len(numbers):
            return numbers
        return np.repeat(numbers, np.diff(self._whole(self._reached(shard), epoch)))

    def _locate(self, epoch: int, rank: int) -> tuple[int, int]:
        """The block that holds the `rank`-th sample of the epoch, and the rank at which that block begins."""
        bounds = self._plan(epoch)[1]
        block = int(np.searchsorted(bounds, rank, side="right")) - 1
        return block, int(bounds[block])

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """The sample indices of one block, permuted."""
        if (epoch, block) not in self._blocks:
            shards, _, window = self._plan(epoch)
            chosen = shards[block * window : (block + 1) * window]
            samples = np.concatenate([self._samples(epoch, int(s)) for s in chosen])
            shuffled = samples[np.argsort(self._random(len(samples), SAMPLES, epoch, block), kind="stable")]
            _keep(self._blocks, (epoch, block), shuffled)
        return self._blocks[epoch, block]


def _scaled(totals: NDArray[np.float64], num_samples: int) -> NDArray[np.float64]:
    """Cumulative sums from 0 to `num_samples`, float64 [S + 1]; shards of weight 0 add nothing."""
    sums = np.cumsum(totals, dtype=np.float64)
    inner = np.where(sums == sums[-1], num_samples, sums / sums[-1] * num_samples)
    return np.concatenate([[0.0], np.minimum(inner, num_samples)])


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    while len(cache) > KEPT_BLOCKS:
        cache.popitem(last=False)
