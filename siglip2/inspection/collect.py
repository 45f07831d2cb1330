"""Reads the samples of a data set, each once, and keeps of each what the summary needs: facts, no pixels."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader, Dataset

from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.data.image_io import MAX_PIXELS
from siglip2.core.data.source import Source
from siglip2.core.data.text import Tokenizer
from siglip2.core.regions import regions
from siglip2.inspection.looks import Look, header, look

CHUNK = 32  # samples that a worker reads at once
BUILT_IN = ("image", "caption", "label", "regions")
GROUP = "inspect_group"  # the extra field under which a value to group by is read


@dataclass(frozen=True)
class Text:
    """A caption of a sample.

    Args:
        text: without surrounding spaces.
        field: the field it is from: `caption`, or an extra one.
        language: code it is stored under, "" if it has none.
        tokens: ids of the whole caption without BOS and EOS, None without a tokenizer.
    """

    text: str
    field: str
    language: str
    tokens: int | None


@dataclass(frozen=True)
class Picture:
    """An image file.

    Args:
        width: pixels, upright.
        height: pixels, upright.
        format: as PIL calls it, `JPEG`.
        num_bytes: size of the file.
        digest: 16 bytes that only an equal file has.
        look: None if the picture was not decoded.
    """

    width: int
    height: int
    format: str
    num_bytes: int
    digest: bytes
    look: Look | None


@dataclass(frozen=True)
class Fault:
    """Something of a sample that cannot be used: a field, or `sample` for the whole."""

    field: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """What is kept of a sample.

    Args:
        key: its name.
        where: the shard, table or folder it is from.
        source: the data set it is from, as named on the command line.
        present: fields that it has, readable or not.
        texts: its captions.
        picture: None if it has no image or the image cannot be read.
        boxes: (width, height) of each usable box, shares of the image.
        faults: what cannot be used.
        notes: parts that cannot be used: a bad box.
        group: value that captions are grouped by, "" if none was asked for or it is absent.
    """

    key: str
    where: str
    source: str
    present: tuple[str, ...] = ()
    texts: tuple[Text, ...] = ()
    picture: Picture | None = None
    boxes: tuple[tuple[float, float], ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Reader:
    """Sample -> facts.

    Args:
        tokenizer: counts tokens; None counts none.
        decode: whether pictures are decoded. If not, damage behind the header goes unseen and near copies are not
            looked for.
    """

    tokenizer: Tokenizer | None = None
    decode: bool = True

    def facts(self, source: Source, i: int) -> Facts:
        """Reads sample i; whatever is wrong with it is among its faults."""
        try:
            sample = source.read(i)
        except BadSample as error:
            return Facts(error.key, error.where, source.name, faults=(Fault("sample", error.reason),))
        faults: list[Fault] = []
        names = [name for name in sample.fields.names() if name != GROUP]
        present = tuple(name for name in names if _has(sample, name, faults))
        texts = [text for name in names if name in present for text in self._texts(sample, name, faults)]
        picture = self._picture(sample, faults) if "image" in present else None
        boxes = _boxes(sample) if "regions" in present else ()
        return Facts(
            sample.key, sample.where, source.name, present, tuple(texts), picture, boxes,
            tuple(dict.fromkeys(faults)), tuple(sample.notes), _group(sample),
        )  # fmt: skip

    def _texts(self, sample: Sample, name: str, faults: list[Fault]) -> list[Text]:
        """The captions in a field: the caption field, or an extra one that holds texts."""
        if name in BUILT_IN and name != "caption":
            return []
        fields = replace(sample.fields, caption=sample.fields.spec(name), extra={})
        try:
            by_language = replace(sample, fields=fields).captions()
        except BadSample as error:
            if name == "caption":
                faults.append(Fault(name, error.reason))
            return []
        return [
            Text(text, name, language, None if self.tokenizer is None else len(self.tokenizer.ids(text)))
            for language, texts in by_language.items()
            for text in texts
        ]

    def _picture(self, sample: Sample, faults: list[Fault]) -> Picture | None:
        try:
            data = sample.get("image")
            if not isinstance(data, bytes | bytearray):
                raise sample.bad(f"the image is {type(data).__name__}, expected the bytes of an image file")
            width, height, kind = header(bytes(data))
            if width * height > (limit := sample.fields.max_pixels or MAX_PIXELS):
                raise sample.bad(f"over the limit of pixels: the image is {width}x{height}, the limit is {limit}")
            seen = look(sample.image()) if self.decode else None
        except BadSample as error:
            faults.append(Fault("image", error.reason))
            return None
        except ValueError as error:
            faults.append(Fault("image", str(error)))
            return None
        return Picture(width, height, kind, len(data), hashlib.blake2b(data, digest_size=16).digest(), seen)


def _has(sample: Sample, name: str, faults: list[Fault]) -> bool:
    try:
        return sample.has(name)
    except BadSample as error:
        faults.append(Fault(name, error.reason))
        return False


def _boxes(sample: Sample) -> tuple[tuple[float, float], ...]:
    found = [region.box for region in regions(sample)]
    return tuple((xmax - xmin, ymax - ymin) for xmin, ymin, xmax, ymax in found)


def _group(sample: Sample) -> str:
    """The value to group by as a short text; absent, unreadable and nested values are the group "".

    A value read as bytes is text if it can be.
    """
    if GROUP not in sample.fields.extra:
        return ""
    try:
        value = sample.get(GROUP) if sample.has(GROUP) else ""
    except BadSample:
        return ""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return str(value).strip()[:80] if isinstance(value, str | int | float | bool) else ""


def with_group(fields: Fields, spec: str) -> Fields:
    """Returns the fields with one more, whose value captions are grouped by."""
    return replace(fields, extra=fields.extra | {GROUP: spec})


def chosen(size: int, *, limit: int | None = None, seed: int | None = None) -> list[int]:
    """Returns which samples are read, in rising order: all, the first `limit`, or as many drawn with a seed."""
    if limit is None or limit >= size:
        return list(range(size))
    if seed is None:
        return list(range(limit))
    drawn = np.random.default_rng(seed).choice(size, limit, replace=False)
    return sorted(int(i) for i in drawn)


class _Chunks(Dataset[list[Facts]]):
    def __init__(self, source: Source, numbers: Sequence[int], reader: Reader) -> None:
        self.source, self.reader = source, reader
        self.chunks = [numbers[begin : begin + CHUNK] for begin in range(0, len(numbers), CHUNK)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> list[Facts]:
        return [self.reader.facts(self.source, number) for number in self.chunks[i]]


def collect(
    source: Source,
    numbers: Sequence[int],
    reader: Reader,
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Facts]:
    """Returns the facts of samples in the order of `numbers`, whatever the number of workers.

    Args:
        source: what is read.
        numbers: samples to read.
        reader: what is kept of each.
        workers: processes that read; 1 reads in this one.
        progress: called with the samples read since the last call.
    """
    found: list[Facts] = []
    # torch's loader rather than a pool: it keeps the order, bounds what is read ahead, and passes errors on
    for chunk in DataLoader(
        _Chunks(source, numbers, reader), batch_size=None, num_workers=workers if workers > 1 else 0
    ):
        found += chunk
        if progress is not None:
            progress(len(chunk))
    return found
