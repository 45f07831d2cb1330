"""All files of embeddings of one name as one index: the nearest pictures by exact search, a block of rows at a time.

Rows stay in the stored precision until a block is multiplied, so that memory is that of one shard's file.
"""

# Q queries, n rows of a block, k hits, E embedding dimension

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip2.core.data.embedding_file import METADATA, EmbeddingFile, EmbeddingHead
from siglip2.core.data.fields import Fields
from siglip2.core.data.source import open_source
from siglip2.core.data.storage import ByteFile

SUFFIX = ".safetensors"
BLOCK = 2**16  # rows that are multiplied at once: 200 MB of float32 at E = 768
NAMED = 4


@dataclass(frozen=True)
class Hit:
    """A picture that a query found.

    Args:
        rank: from 1 on.
        cosine: of query and picture.
        match: the model's probability that a text and the picture belong together, sigmoid(temperature cosine + bias);
            None where the query is a picture.
        where: the picture's shard, table or folder.
        key: of its sample.
        file: number of its file of embeddings in the index.
        row: number of the sample in the shard.
    """

    rank: int
    cosine: float
    match: float | None
    where: str
    key: str
    file: int
    row: int


@dataclass
class Index:
    """Files of embeddings of one name.

    Args:
        files: in order, all made by the same towers.
    """

    files: list[EmbeddingFile]
    _sources: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def head(self) -> EmbeddingHead:
        """Of the first file; all agree in what made them."""
        return self.files[0].head

    @property
    def num_images(self) -> int:
        """Pictures that can be found."""
        return sum(file.head.num_images for file in self.files)

    def search(self, z_QE: Tensor, k: int, *, block: int = BLOCK) -> list[list[Hit]]:
        """Returns the k nearest pictures of each query, best first; fewer if there are fewer.

        Args:
            z_QE: unit-norm queries, float32 on the host.
            k: hits per query.
            block: rows that are multiplied at once.

        Raises:
            ValueError: if queries have another dimension.
        """
        if z_QE.shape[1] != self.head.encoder.dim:
            raise ValueError(f"queries have {z_QE.shape[1]} dimensions, the index has {self.head.encoder.dim}")
        best_Qk, ids_Qk = torch.empty(len(z_QE), 0), torch.empty(len(z_QE), 0, dtype=torch.int64)
        for first, rows_nE in self._blocks(block):
            scores, found = nearest(z_QE, rows_nE, k)
            scores, found = torch.cat([best_Qk, scores], 1), torch.cat([ids_Qk, found + first], 1)
            best_Qk, order = scores.topk(min(k, scores.shape[1]), dim=1)
            ids_Qk = found.gather(1, order)
        return [self._hits(*row) for row in zip(best_Qk.tolist(), ids_Qk.tolist(), strict=True)]

    def image(self, hit: Hit) -> bytes:
        """Returns the image file of a hit, read out of its shard, table or folder.

        Raises:
            FileNotFoundError: if the shard is not there any more.
            ValueError: if it changed since, or the picture cannot be read.
        """
        if hit.file not in self._sources:
            self._sources[hit.file] = open_source(hit.where, fields=Fields(image=self.head.fields["image"]))
        source = self._sources[hit.file]
        sample = source.read(hit.row) if hit.row < len(source) else None
        if sample is None or sample.key != hit.key:
            raise ValueError(f"{hit.where} is not what it was: sample {hit.row} is no longer {hit.key}")
        found = sample.get("image")
        return bytes(found)

    def _blocks(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row in the whole index, and rows [n, E] as stored."""
        first = 0
        for file in self.files:
            for rows_nE in file.all_rows("image").split(block):
                yield first, rows_nE
                first += len(rows_nE)

    def _hits(self, scores: list[float], ids: list[int]) -> list[Hit]:
        encoder, sizes = self.head.encoder, [file.head.stamp.num_samples for file in self.files]
        found = [(score, id_) for score, id_ in zip(scores, ids, strict=True) if score > -2]  # else no picture
        matches = torch.tensor([score for score, _ in found]) * torch.tensor(encoder.logit_scale).exp()
        hits: list[Hit] = []
        for (score, id_), match in zip(found, (matches + encoder.logit_bias).sigmoid().tolist(), strict=True):
            number, row = 0, id_
            while row >= sizes[number]:
                number, row = number + 1, row - sizes[number]
            file = self.files[number]
            hits.append(Hit(len(hits) + 1, score, match, file.head.shard, file.keys[row], number, row))
        return hits


def nearest(z_QE: Tensor, rows_nE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns cosines and numbers of the k nearest rows of each query, best first; -inf for rows without a picture.

    By FAISS where it is installed, which keeps no matrix of all cosines; the same by multiplication elsewhere.

    Args:
        z_QE: float32.
        rows_nE: of any precision; NaN where there is no picture.
        k: how many; all of them if there are fewer.
    """
    rows_nE, k = rows_nE.float(), min(k, len(rows_nE))
    absent_n = rows_nE[:, :1].isnan()
    rows_nE = rows_nE.masked_fill(absent_n, 0.0)
    faiss = _faiss()
    if faiss is None or bool(absent_n.any()):  # a row of zeros is at a distance of its own
        scores_Qn = (z_QE @ rows_nE.T).masked_fill(absent_n.T, float("-inf"))
        scores, found = scores_Qn.topk(k, dim=1)
        return scores, found
    scores, found = faiss.knn(z_QE.numpy(), rows_nE.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(found)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def open_index(path: str, name: str | None = None) -> Index:
    """Opens the embeddings at a path as one index.

    Args:
        path: one file that `siglip2 embed` wrote, a glob of them, the folder that holds them, or one of shards that
            they lie beside.
        name: of the embeddings, where several lie beside one another.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they have several names, were made by several checkpoints, hold no pictures, or a file is
            damaged: leaving it out would leave its pictures out.
    """
    paths = _paths(path)
    files = [file for place in paths if (file := _opened(place)) and name in (None, file.head.name)]
    if not files:
        named = f" called '{name}'" if name else ""
        raise FileNotFoundError(
            f"no embeddings{named} at {path}: `siglip2 embed CKPT DATA --name NAME` writes them beside the data"
        )
    if len(names := sorted({file.head.name for file in files})) > 1:
        raise ValueError(f"there are embeddings of several names at {path} ({', '.join(names)}): say which with --name")
    if len(made := sorted({file.head.encoder.digest for file in files})) > 1:
        raise ValueError(
            f"the embeddings at {path} are of several checkpoints ({', '.join(made[:NAMED])}): embed again"
        )
    if without := [file.path for file in files if not file.head.images]:
        raise ValueError(f"{without[0]} holds no pictures: it was made with --only text")
    return Index(files)


def _paths(path: str) -> list[str]:
    if path.endswith(SUFFIX) or glob.has_magic(path):
        return sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if os.path.isdir(path):  # that of a folder of pictures is hidden in it
        return sorted(str(p) for p in Path(path).iterdir() if p.name.endswith(SUFFIX))
    return sorted(glob.glob(f"{glob.escape(path)}.*{SUFFIX}"))


def _opened(path: str) -> EmbeddingFile | None:
    """A file of embeddings; None for a safetensors file of something else."""
    try:
        return EmbeddingFile(path)
    except ValueError as error:
        if _is_something_else(path):
            return None
        raise ValueError(
            f"{error}. Its pictures would not be found: write it again (`siglip2 embed` does, with the command that "
            f"wrote it), or move it elsewhere"
        ) from None


def _is_something_else(path: str) -> bool:
    """Whether a file has the header of safetensors, and says in it that it holds other things than embeddings."""
    with ByteFile(path) as file:
        length = int.from_bytes(file.read(0, min(8, file.size)), "little")
        try:
            header = json.loads(file.read(8, length)) if 8 + length <= file.size else None
        except ValueError:
            return False
    return isinstance(header, dict) and METADATA not in (header.get("__metadata__") or {})
