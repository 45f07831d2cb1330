"""Example weights in a small file beside each shard, by name: how often each sample is wanted, in relation to others.

The weights `fair` of `00000.tar` are in `00000.tar.fair.weights`: one line of JSON (version, number of samples, their
sum, the smallest, a digest of the weights of all shards, and what the shard is recognised by), then float32 in the
order of the samples. A table or a folder is one shard, and its file lies beside it.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip2.core.data.fields import Fields, alternatives
from siglip2.core.data.stamp import Stamp, stamp
from siglip2.core.data.storage import ByteFile, is_local, write_file

if TYPE_CHECKING:
    from siglip2.core.data.source import Source

VERSION = 2  # 1 had no digest
HEAD_BYTES = 512  # the JSON line is padded to this
REMOTE_THREADS = 16
NAMED = 3  # files that an error names
NAME = re.compile(r"[\w-]+")
ANEW = "Make the weights of all shards anew, with `siglip2 balance` or what wrote them"


@dataclass(frozen=True)
class WeightsHead:
    """What the first line of a file of weights says.

    Args:
        stamp: what the shard was recognised by.
        total: sum of the weights.
        smallest: the smallest one.
        digest: of the weights of all shards that were written together; hexadecimal.
    """

    stamp: Stamp
    total: float
    smallest: float
    digest: str

    def line(self) -> bytes:
        """The head as it is stored."""
        values = {"version": VERSION, **asdict(self)}
        line = json.dumps(values).encode()
        assert len(line) < HEAD_BYTES, line
        return line.ljust(HEAD_BYTES - 1) + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "WeightsHead":
        """Reads back what `line` wrote; ValueError if it is something else, or of another version."""
        try:
            values = json.loads(line)
            version = values["version"]
            if version == VERSION:
                stored = Stamp(**{**values["stamp"], "probes": tuple(values["stamp"]["probes"])})
                return cls(stored, float(values["total"]), float(values["smallest"]), str(values["digest"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError("this is no file of example weights") from None
        raise ValueError(f"weights of version {version}, expected {VERSION}. {ANEW}")


@dataclass(frozen=True)
class SampleWeights:
    """The weights of all samples of a source, read a shard at a time; small, since it holds only their sums.

    Args:
        paths: the file of each shard.
        sizes: samples of each shard.
        sums: sum of the weights of each shard.
    """

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    sums: tuple[float, ...]

    @property
    def totals(self) -> NDArray[np.float64]:
        """Sum of the weights of each shard, float64 [S]."""
        return np.array(self.sums)

    def read(self, shard: int) -> NDArray[np.float64]:
        """The weights of a shard's samples, float64 [n].

        Raises:
            ValueError: if the file is cut, or does not hold what its first line says.
        """
        with ByteFile(self.paths[shard]) as file:
            stored = file.read(HEAD_BYTES, file.size - HEAD_BYTES)
        if len(stored) != 4 * self.sizes[shard]:
            raise ValueError(f"{self.paths[shard]} is cut: {len(stored)} bytes for {self.sizes[shard]} weights")
        values = np.frombuffer(stored, "<f4").astype(np.float64)
        if len(values) and (not values.min() >= 0 or not np.isclose(values.sum(), self.sums[shard], rtol=1e-6)):
            raise ValueError(f"{self.paths[shard]} does not hold the weights that its first line speaks of")
        return values


def weights_path(shard: str, name: str) -> str:
    """Where the weights `name` of a shard, a table or a folder are kept."""
    return f"{shard.rstrip('/')}.{name}.weights"


def write_weights(source: "Source", name: str, values: ArrayLike) -> list[str]:
    """Writes the weights of all samples of a source, a file beside each shard, and returns the paths.

    Only the relation of weights counts, so those of two runs cannot be mixed: if this is stopped between two files,
    they cannot be opened until it is run again.

    Args:
        source: the samples.
        name: of these weights, for `data.train.weights`: letters, digits, `_` and `-`.
        values: one for each sample, >= 0, not all 0. Only their relation counts.

    Raises:
        ValueError: if the name or a value cannot be used, or there are not as many values as samples.
    """
    check_name(name)
    weights = np.asarray(values, dtype="<f4")
    if weights.shape != (len(source),):
        raise ValueError(f"found weights of shape {weights.shape} for the {len(source)} samples of {source.name}")
    if bad := int((~(weights >= 0) | np.isinf(weights)).sum()):
        raise ValueError(f"{bad} of {len(weights)} weights are negative or not finite, expected numbers from 0 on")
    if not weights.any():
        raise ValueError(f"all {len(weights)} weights are 0: nothing would be sampled")
    digest = hashlib.blake2b(weights.tobytes(), digest_size=16).hexdigest()
    shards, start, paths = _shards(source), 0, []
    for shard, size in zip(shards, source.shard_sizes(), strict=True):
        part = weights[start : start + size]
        start += size
        smallest = float(part.min()) if size else 0.0
        head = WeightsHead(_stamp(source, shard, size), float(part.sum(dtype="f8")), smallest, digest)
        write_file(weights_path(shard, name), head.line() + part.tobytes())
        paths.append(weights_path(shard, name))
    return paths


def open_weights(source: "Source", name: str) -> SampleWeights:
    """Returns the weights `name` of a source, after a look at the head of every file.

    Raises:
        FileNotFoundError: if a shard has none of that name; says which there are.
        ValueError: if a shard has changed since, shards have weights that were not written together, or weights are
            negative, or all are 0.
    """
    check_name(name)
    shards, sizes = _shards(source), source.shard_sizes()
    with ThreadPoolExecutor(1 if all(map(is_local, shards)) else REMOTE_THREADS) as pool:
        heads = list(pool.map(lambda shard: _read_head(shard, name), shards))
        stamps = list(pool.map(lambda pair: _stamp(source, *pair), zip(shards, sizes, strict=True)))
    for shard, head, now in zip(shards, heads, stamps, strict=True):
        if head.stamp != now:
            raise ValueError(
                f"{weights_path(shard, name)} is stale: {shard} has changed since "
                f"({_difference(head.stamp, now)}). {ANEW}"
            )
        if head.smallest < 0:
            raise ValueError(f"{weights_path(shard, name)} has negative weights, down to {head.smallest:g}")
    _check_together([weights_path(shard, name) for shard in shards], heads)
    if not sum(head.total for head in heads) > 0:
        raise ValueError(f"all weights {name!r} of {source.name} are 0: nothing would be sampled")
    return SampleWeights(
        tuple(weights_path(shard, name) for shard in shards), tuple(sizes), tuple(head.total for head in heads)
    )


def check_name(name: str) -> None:
    """ValueError if weights cannot be called so."""
    if not NAME.fullmatch(name):
        raise ValueError(f"weights cannot be called {name!r}: letters, digits, '_' and '-' make a name")


def _check_together(paths: Sequence[str], heads: Sequence[WeightsHead]) -> None:
    """ValueError if not all files are of one run; names those that are not as most are."""
    counts = Counter(head.digest for head in heads)
    if len(counts) < 2:
        return
    most = counts.most_common(1)[0][0]
    others = [path for path, head in zip(paths, heads, strict=True) if head.digest != most]
    like_most = next(path for path, head in zip(paths, heads, strict=True) if head.digest == most)
    named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    raise ValueError(
        f"{named} of {len(paths)} files were not written together with the others, such as {like_most}: a run that "
        f"wrote them was interrupted, or was given other shards. {ANEW}"
    )


def _shards(source: "Source") -> list[str]:
    shards: Sequence[str] = getattr(source, "shards", [source.name])
    return list(shards)


def _read_head(shard: str, name: str) -> WeightsHead:
    path = weights_path(shard, name)
    try:
        with ByteFile(path) as file:
            head = WeightsHead.parse(file.read(0, HEAD_BYTES))
            if file.size != HEAD_BYTES + 4 * head.stamp.num_samples:
                raise ValueError(f"{path} is cut: {file.size} bytes, not enough for {head.stamp.num_samples} weights")
            return head
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights {name!r} for {shard}; {_others(shard)}") from None
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None


def _others(shard: str) -> str:
    """Which weights there are beside a shard, and how to make some."""
    begin, folder = f"{os.path.basename(shard.rstrip('/'))}.", os.path.dirname(shard.rstrip("/")) or "."
    names = os.listdir(folder) if is_local(shard) else []
    found = sorted(n[len(begin) : -len(".weights")] for n in names if n.startswith(begin) and n.endswith(".weights"))
    return f"it has {', '.join(found) or 'none'}. `siglip2 balance` writes some"


def _stamp(source: "Source", shard: str, size: int) -> Stamp:
    if hasattr(source, "shards"):
        return stamp("tar", shard, size, frozenset())
    if not os.path.isdir(shard):
        return stamp("table", shard, size, frozenset())
    fields: Fields = getattr(source, "fields", Fields())
    return stamp("folder", shard, size, frozenset(alternatives(fields.image)))


def _difference(then: Stamp, now: Stamp) -> str:
    if then.num_samples != now.num_samples:
        return f"{then.num_samples} samples then, {now.num_samples} now"
    if then.num_bytes != now.num_bytes:
        return f"{then.num_bytes} bytes then, {now.num_bytes} now"
    return "other content"
