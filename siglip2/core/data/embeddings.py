"""Embeddings that `siglip2 embed` wrote, read in training: a view of two rows for each sample, checked beforehand.

They stand for a frozen model that would otherwise run in every step. A row is found by shard, sample key and the ids of
the caption that the `caption` view draws for this very position.
"""

import glob
import os
import shlex
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import fsspec
import torch
from torch import Tensor

from siglip2.core.data.embedding_file import (
    EmbeddingFile,
    EmbeddingHead,
    sidecar_path,
    tokenizer_digest,
)
from siglip2.core.data.fields import Fields, Sample, alternatives
from siglip2.core.data.folders import FolderSource
from siglip2.core.data.loader import KnowsKeys
from siglip2.core.data.source import Source, kind_of
from siglip2.core.data.storage import MAX_BYTES, ByteFile, cached_copy, is_local, nearby
from siglip2.core.data.tables import TableSource
from siglip2.core.data.tar_source import TarSource
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.text_contract import TextContract
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.views import CAPTION, Context, TextView

# D dimension, T text tokens

OPEN_FILES = 128  # per worker; as many as a source of tar shards holds open
REMOTE_THREADS = 16
NAMED = 4  # shards of a source that an error names before it only counts them
HEADER_BYTES = 2**15  # more than a file's header has
FORMATS: dict[type, str] = {TarSource: "tar", TableSource: "table", FolderSource: "folder"}


@dataclass(frozen=True)
class EmbeddingStore:
    """The embeddings of one name, beside all shards of a data set; picklable, for loader workers.

    Args:
        name: as given to `siglip2 embed --name`.
        folder: as given to its `--out`; None looks beside each shard.
        cache_dir: keep local copies of remote files here; None reads of them only the rows that are asked for.
    """

    name: str
    folder: str | None = None
    cache_dir: str | None = None
    _opened: "OrderedDict[tuple[int, str], EmbeddingFile]" = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def path(self, where: str) -> str:
        """Returns where the embeddings of a shard, table or folder are kept."""
        return sidecar_path(where, self.name, self.folder)

    def file(self, where: str) -> EmbeddingFile:
        """Returns the embeddings of a shard, table or folder, opened once.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the file is damaged or something else.
        """
        key = (os.getpid(), where)  # after a fork connections belong to the parent
        if key not in self._opened:
            self._opened[key] = EmbeddingFile(self._local(self.path(where)))
            if len(self._opened) > OPEN_FILES:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return self._opened[key]

    def rows(self, where: str, key: str, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the embeddings [D] of a sample's picture and of one of its captions, in the stored precision.

        Args:
            where: the sample's shard, table or folder.
            key: of the sample.
            ids_T: the caption as the text tower reads it, int32.

        Raises:
            LookupError: if one of the two was not embedded; says why.
        """
        file = self.file(where)
        return file.image(key), file.text(key, ids_T)

    def _local(self, path: str) -> str:
        """The local copy of a remote file, if there is a `cache_dir`; embeddings made anew get a copy of their own."""
        if self.cache_dir is None or is_local(path):
            return path
        with ByteFile(path) as file:
            version = zlib.crc32(file.read(0, HEADER_BYTES))
        return cached_copy(path, os.path.join(self.cache_dir, f"embeddings-{version:08x}"))

    def check(self, source: Source, tokenizer: Tokenizer) -> EmbeddingHead:
        """Compares the embeddings of all shards with the shards, with one another and with the run's text contract.

        Reads the heads only, and the keys of the first and the last shard of each source if those are tar files.

        Args:
            source: what is trained on.
            tokenizer: the run's.

        Returns:
            The head of the first shard's embeddings; all agree in what made them.

        Raises:
            ValueError: if they are missing, damaged, stale or incomplete for a shard, of another picture field than the
                source's, those of several checkpoints, or of other ids than the run's. Names the first shards of each
                source and the command that mends it.
        """
        parts: list[Source] = list(getattr(source, "parts", {"": source}).values())
        with ThreadPoolExecutor(1 if all(is_local(w) for p in parts for w in _filled(p)) else REMOTE_THREADS) as pool:
            looks = [pool.map(partial(self._look, part), _filled(part).items()) for part in parts]
            found = [list(look) for look in looks]
        problems = [[line for _, line in look if line] for look in found]
        if not any(problems):
            problems = [self._other_keys(part) for part in parts]
        heads = [[head for head, _ in look if head is not None] for look in found]
        all_heads = [head for part in heads for head in part]
        if any(problems):
            listed, commands = [], []
            for part, lines, own in zip(parts, problems, heads, strict=True):
                listed += [f"\n  {line}" for line in lines[:NAMED]]
                if len(lines) > NAMED:
                    listed.append(f"\n  and {len(lines) - NAMED} more of {len(_filled(part))}")
                if lines:
                    commands.append(self._command(part, own or all_heads, (own or all_heads)[:1]))
            raise ValueError(
                f"the embeddings '{self.name}' do not fit {source.name}:{''.join(listed)}\n{_quoted(commands)} "
                f"{'embed' if len(commands) > 1 else 'embeds'} what is missing, incomplete or changed, and nothing else"
            )
        self._check_alike(source.name, parts, heads)
        _check_text(self.name, all_heads[0], tokenizer)
        return all_heads[0]

    def _look(self, part: Source, shard: tuple[str, int]) -> tuple[EmbeddingHead | None, str]:
        """The head of the embeddings of a shard (path, samples), and a line on what is wrong with them."""
        where, num_samples = shard
        path = self.path(where)
        try:
            head = EmbeddingFile(path).head
            change = head.stamp.change(where, num_samples, head.words)
        except FileNotFoundError:
            return None, f"{where}: no embeddings at {path}"
        except ValueError as error:
            return None, f"{where}: {error}"
        if change:
            return head, f"{where}: stale, the shard changed since: {change}"
        if not (head.images and head.texts):
            return head, f"{where}: only {'pictures' if head.images else 'captions'} were embedded"
        embedded, here = head.fields["image"], _fields(part).image
        if alternatives(embedded) != alternatives(here):
            return head, f"{where}: the pictures of field image {embedded!r} were embedded, the run reads {here!r}"
        return head, ""

    def _other_keys(self, part: Source) -> list[str]:
        """A line for the first and the last shard, if their samples have other keys than those that were embedded."""
        if not isinstance(part, KnowsKeys):
            return []
        sizes, places = part.shard_sizes(), _places(part)
        filled = [shard for shard, size in enumerate(sizes) if size]
        starts = [0, *accumulate(sizes)]
        lines = []
        for shard in dict.fromkeys([filled[0], filled[-1]]):
            file = self.file(places[shard])
            if file.head.stamp.kind != "tar":  # all of a table or folder is in its stamp
                continue
            now, then = [part.key(i) for i in range(starts[shard], starts[shard + 1])], file.keys
            if differing := [(a, b) for a, b in zip(now, then, strict=False) if a != b]:
                a, b = differing[0]
                lines.append(f"{places[shard]}: stale, sample {a!r} was {b!r}: delete {self.path(places[shard])}")
        return lines

    def _check_alike(self, name: str, parts: list[Source], heads: list[list[EmbeddingHead]]) -> None:
        kinds = {_kind(head): head for own in reversed(heads) for head in reversed(own)}
        if len(kinds) > 1:
            lines = "\n  ".join(
                f"{h.shard}: {h.encoder.checkpoint} ({h.encoder.digest}), {h.dtype}" for h in kinds.values()
            )
            first = next(head for own in heads for head in own)
            commands = [
                f"{self._command(part, own, [first])} --overwrite"
                for part, own in zip(parts, heads, strict=True)
                if any(_kind(head) != _kind(first) for head in own)
            ]
            raise ValueError(
                f"the embeddings '{self.name}' of {name} were not all made by one checkpoint in one precision:\n"
                f"  {lines}\n{_quoted(commands)} {'make' if len(commands) > 1 else 'makes'} them so"
            )

    def _command(self, part: Source, heads: list[EmbeddingHead], made: list[EmbeddingHead]) -> str:
        """The command that embeds a source as it is read here: with the captions of `heads`, in the way of `made`."""
        fields, usual = _fields(part), Fields()
        captions = dict.fromkeys(name for head in heads for name in head.fields if name in fields.names())
        captions.pop("image", None)
        names = list(captions) or ["caption"]
        words = ["siglip2", "embed", made[0].encoder.checkpoint if made else "CHECKPOINT", part.name]
        words += ["--name", self.name, *(["--out", self.folder] if self.folder else [])]
        if type(part) in FORMATS and FORMATS[type(part)] != _guessed(part.name):
            words += ["--format", FORMATS[type(part)]]
        for name in ("image", *names):
            if name in fields.extra or fields.spec(name) != usual.spec(name):
                words += ["--field", f"{name}={fields.spec(name)}"]
        if names != ["caption"]:
            words += ["--captions", *names]
        if (max_bytes := getattr(part, "max_bytes", MAX_BYTES)) != MAX_BYTES:
            words += ["--max-bytes", str(max_bytes)]
        for head in made:
            if head.dtype != "float16":
                words += ["--precision", {"bfloat16": "bf16", "float32": "fp32"}[head.dtype]]
            if head.encoder.compute != "fp32":
                words += ["--compute", head.encoder.compute]
        return shlex.join(words)


def _places(part: Source) -> list[str]:
    """The shards of a source; a table or folder is one."""
    return getattr(part, "shards", None) or [part.name]


def _filled(part: Source) -> dict[str, int]:
    """The shards of a source that have samples, and how many."""
    return {where: size for where, size in zip(_places(part), part.shard_sizes(), strict=True) if size}


def _fields(part: Source) -> Fields:
    fields: Fields = getattr(part, "fields", Fields())
    return fields


def _guessed(path: str) -> str:
    """The format that `siglip2 embed` takes data for without --format; "" if it cannot tell."""
    try:
        return kind_of([path])
    except ValueError:
        return ""


def _kind(head: EmbeddingHead) -> tuple[str, str]:
    """What has to be one and the same in all shards."""
    return head.encoder.digest, head.dtype


def _quoted(commands: list[str]) -> str:
    return "\n".join(f"`{command}`" for command in commands)


def _check_text(name: str, head: EmbeddingHead, tokenizer: Tokenizer) -> None:
    """Raises ValueError if captions were embedded under another text contract than the run's."""
    differences = tokenizer.contract.differences(TextContract.from_dict(head.encoder.text))
    if head.encoder.tokenizer != (here := tokenizer_digest(tokenizer)):
        differences.insert(0, f"vocabulary: sha256 {here[:12]} here, {head.encoder.tokenizer[:12]} there")
    if differences:
        raise ValueError(
            f"the embeddings '{name}' are those of {head.encoder.checkpoint}, which reads captions by another text "
            f"contract than this run: {'; '.join(differences)}. --data.tokenizer {head.encoder.checkpoint} takes "
            f"tokenizer and contract out of that file; or embed with a checkpoint that has this run's"
        )


@dataclass(frozen=True)
class CachedView:
    """A frozen model's embeddings of the picture and of the drawn caption, one after the other: [1, 2 D].

    The dtype is that of the file: float16 unless `siglip2 embed --precision` said otherwise. A sample is a bad one if
    its picture or its caption could not be embedded.

    Args:
        store: where they are.
        name: the key under which the step finds it.
        caption: the view whose draw is repeated: the caption is the one that it draws for this very sample.
        digest: of the encoder that the embeddings have to be of (`Encoder.digest`); "" takes those of any.
        checkpoint: that encoder's file, for an error.
        dtype: that they have to be stored in; "" takes any.
    """

    store: EmbeddingStore
    name: str = "cached"
    caption: TextView = CAPTION
    copies: int = 1
    digest: str = ""
    checkpoint: str = ""
    dtype: str = ""

    def __call__(self, sample: Sample, context: Context) -> Tensor:
        # what `loader.Maker` gives the caption's view: the same seed and position, and that view's name
        entropy = (*context.entropy[:-1], zlib.crc32(self.caption.name.encode()))
        ids_1T = self.caption(sample, replace(context, entropy=entropy))
        try:
            image_D, text_D = self.store.rows(sample.where, sample.key, ids_1T[0])
        except LookupError as error:
            raise sample.bad(f"embeddings '{self.store.name}': {error.args[0]}") from None
        return torch.cat([image_D, text_D])[None]

    def check(self, source: Source, tokenizer: Tokenizer) -> None:
        """Compares the embeddings with the source, with the run's text contract and with the encoder asked for.

        Raises:
            ValueError: as `EmbeddingStore.check`; or if they are those of another encoder than `digest`.
        """
        head = self.store.check(source, tokenizer)
        if (self.digest or head.encoder.digest, self.dtype or head.dtype) != _kind(head):
            mine = self.store.path(next(iter(_filled(source))))
            raise ValueError(
                f"the embeddings '{self.store.name}' of {source.name} are those of {head.encoder.checkpoint} "
                f"({head.encoder.digest}), {head.dtype}; temperature, bias and width were taken from another file of "
                f"that name, of {self.checkpoint} ({self.digest}), {self.dtype}. Give {mine} in place of FOLDER/NAME "
                f"to take them from the run's own; or embed this data too with {self.checkpoint}, with --overwrite"
            )


class CachedReference:
    """What a frozen model says of a data set, without the model: temperature, bias, and a view of its embeddings.

    Args:
        place: FOLDER/NAME, where FOLDER holds embeddings called NAME (the folder of shards, of a table or of pictures,
            or the one given as --out), or one file of them.
        cache_dir: keep local copies of remote files here; None reads of them only the rows that are asked for.

    Raises:
        FileNotFoundError: if there are none; says what lies there.
        ValueError: if the file is damaged or something else.
    """

    def __init__(self, place: str, *, cache_dir: str | None = None) -> None:
        path = _find(place)
        self.head = EmbeddingFile(path).head
        folder = None if self.head.beside else os.path.dirname(path)
        self.store = EmbeddingStore(self.head.name, folder, cache_dir)

    @property
    def logit_scale(self) -> float:
        """Log of the model's temperature factor."""
        return self.head.encoder.logit_scale

    @property
    def logit_bias(self) -> float:
        """The model's logit bias."""
        return self.head.encoder.logit_bias

    @property
    def dim(self) -> int:
        """D, the dimension of its embeddings."""
        return self.head.encoder.dim

    def view(self, name: str = "cached", caption: TextView = CAPTION) -> CachedView:
        """Returns the view that gives, for each sample, its embeddings of the picture and of the drawn caption."""
        encoder = self.head.encoder
        return CachedView(
            self.store,
            name,
            caption,
            digest=encoder.digest,
            checkpoint=encoder.checkpoint,
            dtype=self.head.dtype,
        )

    def split(self, rows_B2D: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the view gave as embeddings of pictures and of captions, each [B, D] float32 of unit norm."""
        return unit_norm(rows_B2D[:, : self.dim]), unit_norm(rows_B2D[:, self.dim :])


def _find(place: str) -> str:
    """One file of the embeddings that a user named."""
    if place.endswith(".safetensors"):
        return place
    folder, _, name = place.rpartition("/")
    damaged = []
    for path in sorted(_named(folder or ".", name)):
        try:
            if EmbeddingFile(path).head.name == name:  # `*.b.safetensors` are also those of `a.b`
                return path
        except ValueError as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    raise FileNotFoundError(f"no embeddings called '{name}' in {folder or '.'}; {nearby(os.path.join(folder, ''))}")


def _named(folder: str, name: str) -> Iterator[str]:
    for pattern in (f"*.{name}.safetensors", f".{name}.safetensors"):
        if is_local(folder):
            yield from glob.glob(os.path.join(glob.escape(folder), pattern))
        else:
            system, place = fsspec.core.url_to_fs(folder)
            yield from (system.unstrip_protocol(path) for path in system.glob(f"{place}/{pattern}"))
