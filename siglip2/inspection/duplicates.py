"""Which captions and pictures come more than once: to the letter, but for capitals and commas, or nearly."""

# H hash functions, S shingles of a text

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from siglip2.inspection.looks import Look

SHINGLE = 3  # letters; a space counts, and one stands before and behind the text
BANDS, ROWS = 24, 5  # two texts of Jaccard similarity 0.7 meet in a band with probability 0.99, of 0.3 with 0.06
NEAR_TEXT = 0.7
SLACK = 0.15  # between similarity and its estimate from signatures, whose standard deviation is below 0.05
MAX_BITS = 7  # of 64; any two hashes this close agree but for one bit in one of four parts
MAX_COLOUR = 20.0  # root mean square over the colour grid, of 255
PART_BITS = 16
LARGEST, NAMED = 10, 5
Words = npt.NDArray[np.uint64]
Item = TypeVar("Item", bound=Hashable)
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Cluster:
    """Samples that share something.

    Args:
        samples: how many.
        keys: names of the first few.
        examples: what they share: up to a few different texts; nothing for pictures.
    """

    samples: int
    keys: tuple[str, ...]
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Duplicates:
    """All clusters of one kind.

    Args:
        clusters: how many.
        samples: samples in them.
        extra: samples that would go if one of each cluster stayed; a sample in several clusters counts in each.
        share: `extra` over what was compared.
        largest: the largest clusters, the earlier first among equals.
    """

    clusters: int
    samples: int
    extra: int
    share: float
    largest: tuple[Cluster, ...]


def groups_of(keys: Iterable[tuple[Item, int]]) -> dict[Item, list[int]]:
    """Returns key -> the samples that have it, each once, in order."""
    found: dict[Item, dict[int, None]] = {}
    for key, sample in keys:
        found.setdefault(key, {})[sample] = None
    return {key: list(samples) for key, samples in found.items()}


def merged(groups: Mapping[Item, Sequence[int]], leaders: Mapping[Item, Item]) -> dict[Item, list[int]]:
    """Returns groups put together under their leader."""
    return groups_of((leaders[key], sample) for key, samples in groups.items() for sample in samples)


def duplicates(
    groups: Mapping[Item, Sequence[int]], names: Sequence[str], examples: Mapping[Item, Sequence[str]] | None = None
) -> Duplicates:
    """Sums up the groups that have more than one sample.

    Args:
        groups: key -> its samples.
        names: of the samples, by number.
        examples: key -> texts to show.
    """
    several = {key: samples for key, samples in groups.items() if len(samples) > 1}
    total = sum(map(len, groups.values()))
    samples = sum(map(len, several.values()))
    largest = sorted(several.items(), key=lambda item: -len(item[1]))[:LARGEST]
    return Duplicates(
        clusters=len(several),
        samples=samples,
        extra=samples - len(several),
        share=(samples - len(several)) / total if total else 0.0,
        largest=tuple(
            Cluster(len(found), tuple(names[i] for i in found[:NAMED]), tuple((examples or {}).get(key, ())[:NAMED]))
            for key, found in largest
        ),
    )


def shingles(text: str) -> Words:
    """Returns the different runs of three letters of a text as numbers, sorted, [S]."""
    letters = np.frombuffer(f" {text} ".encode("utf-32-le", "replace"), dtype=np.uint32).astype(np.uint64)
    count = max(1, len(letters) - SHINGLE + 1)
    codes = np.zeros(count, dtype=np.uint64)
    for offset in range(min(SHINGLE, len(letters))):
        codes = (codes << np.uint64(21)) | letters[offset : offset + count]  # a code point has 21 bits
    return np.unique(codes)


def jaccard(these: Words, those: Words) -> float:
    """Returns the size of the intersection of two sets over that of their union."""
    common = len(np.intersect1d(these, those, assume_unique=True))
    return common / (len(these) + len(those) - common)


class MinHash:
    """Signatures whose equal entries are about as frequent as two sets are similar.

    Source: Broder, On the resemblance and containment of documents, 1997; the hash functions are multiply-add-shift
    (Dietzfelbinger et al., 1997), drawn once from a fixed seed.
    """

    def __init__(self, num: int = BANDS * ROWS) -> None:
        rng = np.random.default_rng(20250220)
        self.factors_H = rng.integers(0, 2**64, num, dtype=np.uint64) | np.uint64(1)
        self.terms_H = rng.integers(0, 2**64, num, dtype=np.uint64)

    def __call__(self, codes_S: Words) -> npt.NDArray[np.uint32]:
        """Returns the signature of a set, [H]."""
        mixed_S = codes_S * np.uint64(0x9E3779B97F4A7C15)  # spreads letters over all bits; wraps around
        mixed_S ^= mixed_S >> np.uint64(29)
        hashed_SH = mixed_S[:, None] * self.factors_H + self.terms_H
        return (hashed_SH >> np.uint64(32)).min(0).astype(np.uint32)


def near_texts(
    texts: Sequence[str], *, threshold: float = NEAR_TEXT, progress: Progress | None = None
) -> dict[str, str]:
    """Returns text -> its leader: the earliest text that it is nearly equal to, or itself.

    A leader leads only texts that are similar to itself, so that a chain of small changes is not one cluster.
    Candidates come from a locality-sensitive index of MinHash signatures; what is taken is decided by the exact
    similarity.

    Args:
        texts: different texts, normalised.
        threshold: Jaccard similarity of their runs of three letters from which two count as nearly equal.
        progress: called with 1 for every text done.
    """
    minhash = MinHash()
    buckets: dict[tuple[int, bytes], list[int]] = {}
    signatures = np.empty((len(texts), BANDS * ROWS), dtype=np.uint32)  # only the rows of leaders are ever touched
    leaders: dict[str, str] = {}
    for number, text in enumerate(texts):
        codes = shingles(text)
        signature = minhash(codes)
        places = [(band, signature[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        met = np.array(sorted({other for place in places for other in buckets.get(place, ())}), dtype=np.int64)
        likely = met[(signatures[met] == signature).mean(1) >= threshold - SLACK].tolist()
        similar = (other for other in likely if jaccard(codes, shingles(texts[other])) >= threshold)
        leader = next(similar, number)
        leaders[text] = texts[leader]
        if leader == number:
            for place in places:
                buckets.setdefault(place, []).append(number)
            signatures[number] = signature
        if progress is not None:
            progress(1)
    return leaders


def near_looks(
    looks: Mapping[Item, Look], *, max_bits: int = MAX_BITS, progress: Progress | None = None
) -> dict[Item, Item]:
    """Returns picture -> its leader: the earliest that looks the same, or itself.

    Of two hashes of 64 bits that differ in at most 7, one of the four parts of 16 differs in at most one bit: all pairs
    are found by looking up each part and its 16 neighbours (multi-index hashing, Norouzi et al., 2012).

    Args:
        looks: picture -> look, in order.
        max_bits: differing bits up to which two shapes count as the same, at most 7.
        progress: called with 1 for every picture done.
    """
    assert max_bits <= MAX_BITS
    flips = (0, *(1 << bit for bit in range(PART_BITS)))
    buckets: dict[tuple[int, int], list[Item]] = {}
    leaders: dict[Item, Item] = {}
    order: dict[Item, int] = {}
    for item, seen in looks.items():
        parts = [(part, seen.shape_bits >> part * PART_BITS & 0xFFFF) for part in range(64 // PART_BITS)]
        met = {other for part, bits in parts for flip in flips for other in buckets.get((part, bits ^ flip), ())}
        candidates = sorted(met, key=order.__getitem__)
        leader = next((other for other in candidates if same_look(seen, looks[other], max_bits=max_bits)), item)
        leaders[item] = leader
        if leader == item:
            order[item] = len(order)
            for place in parts:
                buckets.setdefault(place, []).append(item)
        if progress is not None:
            progress(1)
    return leaders


def same_look(here: Look, there: Look, *, max_bits: int = MAX_BITS) -> bool:
    """Whether two pictures have nearly one shape and one colouring."""
    if (here.shape_bits ^ there.shape_bits).bit_count() > max_bits:
        return False
    difference = np.frombuffer(here.colours, np.uint8).astype(float) - np.frombuffer(there.colours, np.uint8)
    return bool(np.sqrt(np.mean(difference**2)) <= MAX_COLOUR)
