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
from itertools import accumulate
from typing import Any

import fsspec
import torch
from torch import Tensor

from siglip2.core.data.embedding_file import (
    EmbeddingFile,
    EmbeddingHead,
    read_embedding_head,
    sidecar_path,
    tokenizer_digest,
)
from siglip2.core.data.fields import Sample
from siglip2.core.data.loader import KnowsKeys
from siglip2.core.data.source import Source
from siglip2.core.data.storage import ByteFile, cached_copy, is_local, nearby
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.text_contract import TextContract
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.views import CAPTION, Context, TextView

# D dimension, T text tokens

OPEN_FILES = 128  # per worker; as many as a source of tar shards holds open
REMOTE_THREADS = 16
NAMED = 4  # shards that an error names before it only counts them
HEADER_BYTES = 2**15  # more than a file's header has


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

        Reads the heads only, and the keys of the first and the last shard if those are tar files.

        Args:
            source: what is trained on.
            tokenizer: the run's.

        Returns:
            The head of the first shard's embeddings; all agree in what made them.

        Raises:
            ValueError: if they are missing, damaged, stale or incomplete for a shard, are those of several checkpoints,
                or of other ids than the run's. Names the first shards and the command that mends it.
        """
        places = getattr(source, "shards", None) or [source.name]
        shards = {where: size for where, size in zip(places, source.shard_sizes(), strict=True) if size}
        with ThreadPoolExecutor(1 if all(map(is_local, shards)) else REMOTE_THREADS) as pool:
            found = list(pool.map(self._look, shards, shards.values()))
        heads = [head for head, _ in found if head is not None]
        problems = [f"{where}: {what}" for where, (_, what) in zip(shards, found, strict=True) if what]
        problems = problems or self._other_keys(source)
        if problems:
            more = f"\n  and {len(problems) - NAMED} more of {len(shards)}" if len(problems) > NAMED else ""
            listed = "\n  ".join(problems[:NAMED])
            raise ValueError(
                f"the embeddings '{self.name}' do not fit {source.name}:\n  {listed}{more}\n"
                f"`{self._command(source, heads)}` embeds what is missing, incomplete or changed, and nothing else"
            )
        self._check_alike(source, heads)
        _check_text(self.name, heads[0], tokenizer)
        return heads[0]

    def _look(self, where: str, num_samples: int) -> tuple[EmbeddingHead | None, str]:
        """The head of a shard's embeddings, and what is wrong with them."""
        path = self.path(where)
        try:
            head = EmbeddingFile(path).head
            change = head.stamp.change(where, num_samples, head.words)
        except FileNotFoundError:
            return None, f"no embeddings at {path}"
        except ValueError as error:
            return None, str(error)
        if change:
            return head, f"stale, the shard changed since: {change}"
        if not (head.images and head.texts):
            return head, f"only {'pictures' if head.images else 'captions'} were embedded"
        return head, ""

    def _other_keys(self, source: Source) -> list[str]:
        """A line for the first and the last shard, if their samples have other keys than those that were embedded."""
        if not isinstance(source, KnowsKeys):
            return []
        sizes = source.shard_sizes()
        places = getattr(source, "shards", None) or [source.name]
        filled = [shard for shard, size in enumerate(sizes) if size]
        starts = [0, *accumulate(sizes)]
        lines = []
        for shard in dict.fromkeys([filled[0], filled[-1]]):
            file = self.file(places[shard])
            if file.head.stamp.kind != "tar":  # all of a table or folder is in its stamp
                continue
            now, then = [source.key(i) for i in range(starts[shard], starts[shard + 1])], file.keys
            if differing := [(a, b) for a, b in zip(now, then, strict=False) if a != b]:
                a, b = differing[0]
                lines.append(f"{places[shard]}: stale, sample {a!r} was {b!r}: delete {self.path(places[shard])}")
        return lines

    def _check_alike(self, source: Source, heads: list[EmbeddingHead]) -> None:
        kinds = {(h.encoder.digest, h.dtype): h for h in reversed(heads)}
        if len(kinds) > 1:
            lines = "\n  ".join(
                f"{h.shard}: {h.encoder.checkpoint} ({h.encoder.digest}), {h.dtype}" for h in kinds.values()
            )
            raise ValueError(
                f"the embeddings '{self.name}' of {source.name} were not all made by one checkpoint in one precision:\n"
                f"  {lines}\n`{self._command(source, heads)} --overwrite` makes them so"
            )

    def _command(self, source: Source, heads: list[EmbeddingHead]) -> str:
        checkpoint = heads[0].encoder.checkpoint if heads else "CHECKPOINT"
        data = getattr(source, "parts", {"": source})
        words = ["siglip2", "embed", checkpoint, next(iter(data.values())).name, "--name", self.name]
        return shlex.join([*words, "--out", self.folder] if self.folder else words)


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
    """

    store: EmbeddingStore
    name: str = "cached"
    caption: TextView = CAPTION
    copies: int = 1

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
        """Raises ValueError if the embeddings are not those of the source's samples, or of another text contract."""
        self.store.check(source, tokenizer)


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
        return CachedView(self.store, name, caption)

    def split(self, rows_B2D: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the view gave as embeddings of pictures and of captions, each [B, D] float32 of unit norm."""
        return unit_norm(rows_B2D[:, : self.dim]), unit_norm(rows_B2D[:, self.dim :])


def _find(place: str) -> str:
    """One file of the embeddings that a user named."""
    if place.endswith(".safetensors"):
        return place
    folder, _, name = place.rpartition("/")
    for path in sorted(_named(folder or ".", name)):
        head = read_embedding_head(path)  # `*.b.safetensors` are also those of `a.b`
        if head is not None and head.name == name:
            return path
    raise FileNotFoundError(f"no embeddings called '{name}' in {folder or '.'}; {nearby(os.path.join(folder, ''))}")


def _named(folder: str, name: str) -> Iterator[str]:
    for pattern in (f"*.{name}.safetensors", f".{name}.safetensors"):
        if is_local(folder):
            yield from glob.glob(os.path.join(glob.escape(folder), pattern))
        else:
            system, place = fsspec.core.url_to_fs(folder)
            yield from (system.unstrip_protocol(path) for path in system.glob(f"{place}/{pattern}"))
