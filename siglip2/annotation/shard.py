"""One shard: its samples read, asked about, and written again with what was found."""

import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import IO, Any

import fsspec

from siglip2.annotation.detector import Detector, Question
from siglip2.annotation.queries import Query, ngram_queries
from siglip2.annotation.select import select
from siglip2.annotation.settings import Settings
from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.data.storage import ByteFile, is_local, read_file, write_file
from siglip2.core.data.tar_index import IndexHead, TarIndex, load_index

NAMED = 100  # faults of a shard that are remembered by name; all are counted


@dataclass(frozen=True)
class Record:
    """What was made of one shard, kept beside the written one as `NAME.tar.annotated`.

    Args:
        source: the head of the index of the shard that was read: by it a changed shard is known.
        size: bytes of the written shard.
        counts: see docs/annotation.md.
        faults: samples that could not be read and were copied as they are, and damage of the shard.
    """

    source: IndexHead
    size: int
    counts: dict[str, int]
    faults: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The record as it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, stored: bytes) -> "Record":
        """Reads what `to_bytes` wrote; ValueError, TypeError or KeyError if it is something else."""
        found = json.loads(stored)
        source = IndexHead(**found["source"])
        return cls(source, found["size"], found["counts"], tuple(found["faults"]))


def record_path(target: str) -> str:
    """Where the record of a written shard is kept."""
    return f"{target}.annotated"


def finished(shard: str, target: str) -> Record | None:
    """Returns the record of a shard that was annotated and has not changed since; None if it has to be done.

    Args:
        shard: what is read.
        target: what is written.
    """
    try:
        record = Record.from_bytes(read_file(record_path(target)))
        with ByteFile(shard) as source, ByteFile(target) as written:
            return record if record.source.fits(source) and written.size == record.size else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True, eq=False)
class _Read:
    """What a sample's JSON holds, and what is asked about its picture; no question if nothing is."""

    meta: dict[str, Any]
    question: Question | None


def check_first(shard: str, settings: Settings) -> None:
    """Finds wrong data or a wrong field name before anything is written: of two samples one has to have every field.

    Args:
        shard: the first one.
        settings: name the fields.

    Raises:
        ValueError: if there is no sample; if neither has a picture, or neither has a caption that is needed; says what
            they have.
    """
    index = load_index(shard)
    if not len(index):
        raise ValueError(
            f"{shard} has no sample{f' ({index.damage})' if index.damage else ''}: expected a tar of files such as "
            f"00000.jpg and 00000.txt"
        )
    with ByteFile(shard) as source:
        first = list(islice(_samples(source, index, settings), 2))
    for name in ("image", "caption") if settings.languages else ("image",):
        missing = []
        for sample in first:
            try:
                sample.get(name)
            except BadSample as error:
                missing.append(str(error))
        if len(missing) == len(first):
            raise ValueError(f"{missing[0]}; name the field with --{name}")


def annotate_shard(
    shard: str, target: str, *, settings: Settings, detector: Detector, tick: Callable[[int], None] | None = None
) -> Record:
    """Writes a shard anew: every member as it is, and `regions` in the JSON of each sample, made where there is none.

    Members keep their order and their bytes; of the headers only the names stay, so that the same input gives the same
    shard. What is no part of a sample for the index (folders, a second file of one name) is left out.

    Args:
        shard: path or URL.
        target: path or URL; appears once it is whole, its record after it.
        settings: what to ask and what to keep.
        detector: answers.
        tick: called with the number of samples after each batch.

    Raises:
        OSError: if the shard cannot be read or the target cannot be written.
        ValueError: if the shard is compressed.
    """
    counts: Counter[str] = Counter()
    faults: list[str] = []
    index = load_index(shard)
    if index.damage:
        counts["damaged_shards"] += 1
        faults.append(f"{os.path.dirname(shard)}: {index.damage}")
    with _published(target) as file, ByteFile(shard) as source:
        # GNU: the only format of tar with names of any length and any bytes, and files of any size
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as archive:
            samples = _samples(source, index, settings)
            while batch := list(islice(samples, settings.batch_size)):
                reads = [_read(sample, settings, counts, faults) for sample in batch]
                for sample, members in zip(batch, _answered(reads, settings, detector, counts), strict=True):
                    for extension, content in (sample.record | members).items():
                        _add(archive, f"{sample.key}.{extension}", content)
                if tick is not None:
                    tick(len(batch))
        size = file.tell()
    record = Record(index.head, size, dict(counts), tuple(faults[:NAMED]))
    write_file(record_path(target), record.to_bytes())
    return record


@contextmanager
def _published(target: str) -> Iterator[IO[bytes]]:
    """A file to write into that stands at `target`, a path or URL, once all went well."""
    if not is_local(target):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            file_system, name = fsspec.core.url_to_fs(target)
            file_system.put_file(file.name, name)
        return
    # not a random name, so that the next run finds what a killed one left; and removes it first, so that a worker
    # of that run which is still alive writes into nothing
    part = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.part")
    with suppress(FileNotFoundError):
        os.unlink(part)
    with open(part, "wb") as file:
        yield file
    os.replace(part, target)


def _samples(file: ByteFile, index: TarIndex, settings: Settings) -> Iterator[Sample]:
    """Every sample of a shard, with all of its members."""
    for i in range(len(index)):
        members = index.members(i)
        record = {extension: file.stream(offset, size) for extension, (offset, size) in members.items()}
        if short := [e for e, (_, size) in members.items() if len(record[e]) < size]:
            raise OSError(f"{file.path}: {index.key(i)}.{short[0]} is cut: the shard became shorter while it was read")
        yield Sample(index.key(i), file.path, record, settings.fields)


def _read(sample: Sample, settings: Settings, counts: Counter[str], faults: list[str]) -> _Read | None:
    """What is asked about a sample; None if it cannot be read."""
    counts["samples"] += 1
    try:
        meta = _meta(sample)
        queries = _queries(sample, settings, counts)
        question = Question(sample.image(), queries, sample) if queries else None
    except BadSample as error:
        counts["unreadable"] += 1
        faults.append(str(error))
        return None
    counts["without_queries"] += question is None
    counts["regions_replaced"] += bool(meta.get("regions"))
    for query in queries:
        counts[f"queries_{query.kind}"] += 1
    return _Read(meta, question)


def _meta(sample: Sample) -> dict[str, Any]:
    try:
        meta = json.loads(sample.record.get("json", b"{}"))
    except ValueError as error:
        raise sample.bad(f"'json' is not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise sample.bad(f"'json' holds a {type(meta).__name__}, expected a mapping that regions can be added to")
    return meta


def _queries(sample: Sample, settings: Settings, counts: Counter[str]) -> tuple[Query, ...]:
    """N-grams of the captions in the languages that are asked for, then the categories that are none of them."""
    try:
        captions = sample.captions()
    except BadSample:
        captions = {}
        counts["without_caption"] += 1
    for language in captions.keys() - set(settings.languages):
        counts[f"captions_skipped_{language or 'none'}"] += len(captions[language])
    asked = {language: texts for language, texts in captions.items() if language in settings.languages}
    found = ngram_queries(asked, max_words=settings.max_words, max_queries=settings.max_queries)
    texts = {query.text for query in found}
    language, factor = settings.category_language, settings.category_factor
    named = [Query(name, language, "category", factor) for name in settings.categories if name not in texts]
    return (*found, *named)


def _answered(
    reads: Sequence[_Read | None], settings: Settings, detector: Detector, counts: Counter[str]
) -> Iterator[dict[str, bytes]]:
    """Of each sample, the members that are written in place of its own or beside them."""
    questions = [read.question for read in reads if read is not None and read.question is not None]
    answers = iter(detector.detect(questions) if questions else [])
    for read in reads:
        if read is None:
            yield {}
            continue
        entries: list[dict[str, Any]] = []
        if read.question is not None:
            entries, selected = select(next(answers), read.question, settings)
            counts.update(selected)
            counts["images"] += 1
            counts["images_with_boxes"] += bool(entries)
        yield {"json": _json(read.meta | {"regions": entries})}


def _json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(value, separators=(",", ":")).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time 0 and no user, so that equal samples give equal files
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
