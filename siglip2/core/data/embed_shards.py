"""Embeddings of every picture and caption of a data set, shard by shard, each written whole or not at all."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from siglip2.core.batch import Patches, collate
from siglip2.core.data.embedding_file import (
    DTYPES,
    EmbeddedShard,
    EmbeddingHead,
    Encoder,
    read_embedding_head,
    sidecar_path,
    text_hash,
    tokenizer_digest,
)
from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.data.folders import FolderSource
from siglip2.core.data.source import Source
from siglip2.core.data.stamp import Stamp, extensions, stamp
from siglip2.core.data.storage import write_file
from siglip2.core.data.tar_source import TarSource
from siglip2.core.data.text import Tokenizer
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.views import IMAGE

log = logging.getLogger(__name__)

# b pictures of a part, m texts of a part, T text tokens, D dimension

NAMED = 3  # shards that an error names before it only counts them
Encode = Callable[[Patches | Tensor], Tensor]


def describe_encoder(
    model: TwoTowers, tokenizer: Tokenizer, patchifier: Patchifier, *, checkpoint: str, compute: str
) -> Encoder:
    """Returns the description of towers and contracts, with a digest of all of them.

    Args:
        model: the towers.
        tokenizer: with the text contract.
        patchifier: with the pixel contract.
        checkpoint: the file they came from; not part of the digest.
        compute: precision that the towers run in; not part of the digest.
    """
    text, file = tokenizer.contract.to_dict(), tokenizer_digest(tokenizer)
    pixels = json.loads(json.dumps(patchifier.contract()))  # as it comes back out of a file
    digest = hashlib.sha256(json.dumps([text, file, pixels], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return Encoder(
        checkpoint=checkpoint,
        digest=digest.hexdigest()[:16],
        text=text,
        tokenizer=file,
        pixels=pixels,
        logit_scale=float(model.logit_scale.detach()),
        logit_bias=float(model.logit_bias.detach()),
        dim=model.embed_dim,
        compute=compute,
    )


@dataclass(frozen=True)
class Shard:
    """One shard, table or folder to embed.

    Args:
        where: its path or URL.
        first: number of its first sample in the source.
        stamp: what it is recognised by; taken before it is read.
        path: of its embeddings.
    """

    where: str
    first: int
    stamp: Stamp
    path: str


@dataclass(frozen=True)
class Job:
    """What is embedded, with what, and where it is written.

    Args:
        source: the samples.
        patchifier: the checkpoint's patchifier.
        tokenizer: the checkpoint's tokenizer.
        encoder: what makes the embeddings.
        name: of the embeddings.
        folder: that takes the files of all shards; None puts each beside its shard.
        captions: fields whose captions are embedded, all of them in all languages.
        images: whether pictures are embedded.
        texts: whether captions are embedded.
        dtype: of the stored embeddings: float16, bfloat16 or float32.
        batch_size: pictures, and captions, that are encoded at a time.
    """

    source: Source
    patchifier: Patchifier
    tokenizer: Tokenizer
    encoder: Encoder
    name: str
    folder: str | None = None
    captions: tuple[str, ...] = ("caption",)
    images: bool = True
    texts: bool = True
    dtype: str = "float16"
    batch_size: int = 64

    @cached_property
    def fields(self) -> dict[str, str]:
        """The fields that are read, name -> spec."""
        known: Any = self.source
        return {name: known.fields.spec(name) for name in ("image", *self.captions)}

    def shards(self, part: tuple[int, int] = (0, 1)) -> list[Shard]:
        """Returns the shards of a source, each once, or the i-th of n parts of them (counted from 0).

        Raises:
            ValueError: if two files of embeddings would have one name.
        """
        kind = {TarSource: "tar", FolderSource: "folder"}.get(type(self.source), "table")
        places = getattr(self.source, "shards", None) or [self.source.name]
        sizes = self.source.shard_sizes()
        found: dict[str, tuple[int, int]] = {}
        for where, first, size in zip(places, accumulate(sizes, initial=0), sizes, strict=False):
            found.setdefault(where, (first, size))
        paths: dict[str, str] = {}
        for where in found:
            other = paths.setdefault(sidecar_path(where, self.name, self.folder), where)
            if other != where:
                raise ValueError(
                    f"{other} and {where} would share one file in {self.folder}: leave --out away, so that embeddings "
                    f"lie beside their shards, or embed the two in separate runs with an --out each"
                )
        chosen = list(zip(found.items(), paths, strict=True))[part[0] :: part[1]]
        words = extensions(self.fields)
        return [Shard(w, first, stamp(kind, w, size, words), path) for (w, (first, size)), path in chosen]

    def head(self, shard: Shard, *, num_texts: int, num_images: int) -> EmbeddingHead:
        """Returns the head of a shard's file."""
        return EmbeddingHead(
            name=self.name,
            shard=shard.where,
            encoder=self.encoder,
            stamp=shard.stamp,
            fields=self.fields,
            num_texts=num_texts,
            num_images=num_images,
            dtype=self.dtype,
            images=self.images,
            texts=self.texts,
            beside=self.folder is None,
        )

    def fits(self, head: EmbeddingHead, shard: Shard) -> bool:
        """Whether a shard's file is what this job would write; the checkpoint may have another path."""
        wanted = self.head(shard, num_texts=head.num_texts, num_images=head.num_images)
        same_file = replace(self.encoder, checkpoint=head.encoder.checkpoint)
        return head == replace(wanted, encoder=same_file, shard=head.shard, checksum=head.checksum)

    def due(self, shards: Sequence[Shard], *, overwrite: bool = False) -> list[Shard]:
        """Returns the shards whose embeddings are missing, damaged, or of other settings or of an older shard.

        Args:
            shards: of this job.
            overwrite: replace embeddings of another checkpoint.

        Raises:
            ValueError: if some are those of another checkpoint, or of another shard of the same file name.
        """
        heads = {shard.path: read_embedding_head(shard.path) for shard in shards}
        found = [(shard, head) for shard in shards if (head := heads[shard.path]) is not None]
        others = [(s, h) for s, h in found if h.encoder.digest != self.encoder.digest]
        if others and not overwrite:
            names = "\n  ".join(f"{s.path}: {h.encoder.checkpoint} ({h.encoder.digest})" for s, h in others[:NAMED])
            more = f"\n  and {len(others) - NAMED} more" if len(others) > NAMED else ""
            raise ValueError(
                f"there are embeddings called '{self.name}' of another checkpoint than {self.encoder.checkpoint} "
                f"({self.encoder.digest}):\n  {names}{more}\nThey are not mixed: give another --name, or --overwrite "
                f"to replace them"
            )
        for shard, head in found:
            if self.folder is not None and head.shard != shard.where and head.stamp != shard.stamp and not overwrite:
                raise ValueError(
                    f"{shard.path} holds the embeddings of {head.shard}, not of {shard.where}: give another --out, or "
                    f"--overwrite to replace them"
                )
        return [s for s in shards if (head := heads[s.path]) is None or not self.fits(head, s)]


class Span(NamedTuple):
    """Samples first to stop - 1 of a shard, counted from its own first."""

    shard: int
    first: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Part:
    """What a loader worker makes of a span.

    Args:
        span: the samples.
        keys: of all of them.
        image: pictures that could be read, in order; None if there are none.
        seen: which samples those are, counted from the first of the span.
        ids_mT: all captions as ids, int32, those of the first sample first.
        counts: captions of each sample.
        failures: (sample, reason), counted from the first of the span.
        error: why the rest of the shard cannot be read; "" if it can.
    """

    span: Span
    keys: tuple[str, ...] = ()
    image: Patches | None = None
    seen: tuple[int, ...] = ()
    ids_mT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))
    counts: tuple[int, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
    error: str = ""

    def pin_memory(self) -> "Part":
        """Returns the part in page-locked memory (called by torch's DataLoader)."""
        image = None if self.image is None else self.image.apply(lambda t: t.pin_memory())
        return replace(self, image=image, ids_mT=self.ids_mT.pin_memory())


class Parts(Dataset[Part]):
    """The samples of shards in stored order, in spans that end where a shard ends.

    Args:
        job: what is embedded.
        shards: which of its shards.
    """

    def __init__(self, job: Job, shards: Sequence[Shard]) -> None:
        self.job, self.shards, self.spans = job, tuple(shards), list(_spans(shards, job.batch_size))
        self._layout: Layout = job.patchifier.eval_layout(job.batch_size)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Part:
        if index >= len(self):
            raise IndexError(index)
        span, job = self.spans[index], self.job
        keys, counts, failures, images, ids = [], [], [], {}, []
        for row in range(span.stop - span.first):
            try:
                sample = job.source.read(self.shards[span.shard].first + span.first + row)
            except BadSample as bad:
                keys.append(bad.key)
                counts.append(0)
                failures.append((row, bad.reason))
                continue
            except (OSError, ValueError) as error:
                return Part(span, error=str(error))
            if job.images:
                try:
                    images[row] = job.patchifier(sample.image(), IMAGE, self._layout)
                except BadSample as bad:
                    failures.append((row, bad.reason))
            texts = caption_ids(sample, job) if job.texts else []
            if job.texts and not texts:
                failures.append((row, _why_no_caption(sample, job.captions)))
            keys.append(sample.key)
            counts.append(len(texts))
            ids += texts
        length = job.tokenizer.contract.length
        return Part(
            span,
            keys=tuple(keys),
            image=collate([{"image": image} for image in images.values()])["image"] if images else None,
            seen=tuple(images),
            ids_mT=torch.stack(ids) if ids else torch.empty(0, length, dtype=torch.int32),
            counts=tuple(counts),
            failures=tuple(failures),
        )


def _spans(shards: Sequence[Shard], size: int) -> Iterator[Span]:
    for number, shard in enumerate(shards):
        total = shard.stamp.num_samples
        for first in range(0, max(1, total), size):  # an empty shard has one empty span
            yield Span(number, first, min(first + size, total), last=first + size >= total)


def caption_ids(sample: Sample, job: Job) -> list[Tensor]:
    """Returns every caption of a sample as ids [T], int32, each once: by field, then by code of the language."""
    texts = [
        text
        for name in job.captions
        for _, of_language in sorted(sample.captions_if_any(name).items())
        for text in of_language
    ]
    rows = [job.tokenizer(text) for text in texts]
    return list({text_hash(ids_T): ids_T for ids_T in rows}.values())


def _why_no_caption(sample: Sample, names: Sequence[str]) -> str:
    reasons = []
    for name in names:
        try:
            sample.captions(name)
        except BadSample as bad:
            reasons.append(bad.reason)
    return "; ".join(reasons)


@dataclass
class _Rows:
    """The rows of a shard as far as they have come."""

    keys: list[str] = field(default_factory=list)
    image: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    num_images: int = 0


def embed_shards(
    job: Job,
    shards: Sequence[Shard],
    encode: Encode,
    *,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Embeds shards and writes the file of each when its last sample is done.

    Args:
        job: what is embedded, and with what.
        shards: of the job, those of this process.
        encode: pictures or ids [m, T] to embeddings [b or m, D].
        num_workers: loader processes.
        progress: called with the samples done since the last call.

    Returns:
        Shard -> why it could not be read; the others are done.

    Raises:
        OSError: if a file cannot be written.
    """
    parts = Parts(job, shards)
    loader = DataLoader(
        parts,
        batch_size=None,  # the dataset's items are whole batches
        num_workers=num_workers if len(parts) > 1 else 0,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers and len(parts) > 1 else None,
    )
    rows, failed = _Rows(), dict[str, str]()
    for part in loader:
        shard = parts.shards[part.span.shard]
        if part.error:
            failed.setdefault(shard.where, part.error)
        if shard.where not in failed:
            _take(rows, part, job, encode)
        if part.span.last:
            if shard.where not in failed:
                _write(rows, job, shard)
            rows = _Rows()
        if progress is not None:
            progress(part.span.stop - part.span.first)
    return failed


def _take(rows: _Rows, part: Part, job: Job, encode: Encode) -> None:
    """Encodes a part and puts its rows behind those that are there."""
    dtype = DTYPES[job.dtype]
    rows.failures += [(len(rows.keys) + row, reason) for row, reason in part.failures]
    rows.keys += part.keys
    rows.counts += part.counts
    rows.hashes += [text_hash(ids_T) for ids_T in part.ids_mT]
    if job.images:
        image_bD = torch.full((len(part.keys), job.encoder.dim), math.nan, dtype=dtype)
        if part.image is not None:
            image_bD[list(part.seen)] = encode(part.image).to(dtype).cpu()
        rows.image.append(image_bD)
        rows.num_images += len(part.seen)
    if job.texts:
        rows.text += [encode(ids).to(dtype).cpu() for ids in part.ids_mT.split(job.batch_size) if len(ids)]


def _write(rows: _Rows, job: Job, shard: Shard) -> None:
    none = torch.empty(0, job.encoder.dim, dtype=DTYPES[job.dtype])
    embedded = EmbeddedShard(
        keys=rows.keys,
        image_nD=torch.cat([none, *rows.image]) if job.images else None,
        text_mD=torch.cat([none, *rows.text]) if job.texts else None,
        hashes_m=torch.tensor(rows.hashes, dtype=torch.int64),
        counts_n=torch.tensor(rows.counts, dtype=torch.int64),
        failures=rows.failures,
    )
    head = job.head(shard, num_texts=len(rows.hashes), num_images=rows.num_images)
    write_file(shard.path, embedded.to_bytes(head))
