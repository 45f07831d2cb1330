"""The file of embeddings that lies beside a shard: its rows, what made them, and of which shard.

The embeddings of `00000.tar` under the name `b16` are `00000.tar.b16.safetensors`, an ordinary safetensors file: one
row for each picture, one for each caption, and as metadata an `EmbeddingHead` in JSON. A local file is mapped, so that
processes share its memory; of a remote one the rows are read that are asked for.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip2.core.data.stamp import Stamp, extensions
from siglip2.core.data.storage import ByteFile, is_local
from siglip2.core.data.text import Tokenizer

# n samples, m texts, D dimension, T text tokens

VERSION = 1
METADATA = "siglip2_embeddings"
FIRST_READ = 2**15  # bytes; a head is shorter, unless its contracts are very long
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NUMBERS: dict[str, Any] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Encoder:
    """What makes embeddings: towers, text contract and pixel contract.

    Args:
        checkpoint: the file it was read from.
        digest: 16 hex digits over weights and contracts; equal for every file that holds the same towers.
        text: the text contract as plain values.
        tokenizer: sha256 of the tokenizer file, hex.
        pixels: the pixel contract as plain values.
        logit_scale: log of the temperature factor.
        logit_bias: bias of the logits.
        dim: D.
        compute: precision that the towers ran in: fp32, bf16 or fp16.
    """

    checkpoint: str
    digest: str
    text: Mapping[str, Any]
    tokenizer: str
    pixels: Mapping[str, Any]
    logit_scale: float
    logit_bias: float
    dim: int
    compute: str


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of a tokenizer's file, hex; of the file alone, without the contract."""
    file = tokenizer.file
    return hashlib.sha256(file if isinstance(file, bytes) else file.encode()).hexdigest()


@dataclass(frozen=True)
class EmbeddingHead:
    """What a file of embeddings says of itself.

    Args:
        name: of the embeddings, the same beside every shard.
        shard: path of the shard when it was embedded.
        encoder: what made them.
        stamp: what the shard is recognised by.
        fields: the field of the picture and of every kind of caption, name -> spec.
        num_texts: m.
        num_images: pictures that could be embedded.
        dtype: float16, bfloat16 or float32.
        images: whether pictures were embedded.
        texts: whether captions were embedded.
        beside: whether the file lies beside its shard; else all files lie in one folder.
        checksum: crc32 of all embeddings, so that no two files have the same head.
        version: of this format.
    """

    name: str
    shard: str
    encoder: Encoder
    stamp: Stamp
    fields: Mapping[str, str]
    num_texts: int
    num_images: int
    dtype: str
    images: bool
    texts: bool
    beside: bool
    checksum: int = 0
    version: int = VERSION

    @property
    def words(self) -> frozenset[str]:
        """The extensions that were read."""
        return extensions(self.fields)

    @classmethod
    def from_json(cls, line: str) -> "EmbeddingHead":
        """Reads what is stored; ValueError if it is something else, or of another version."""
        try:
            values = json.loads(line)
            if values["version"] == VERSION:
                shard = {**values["stamp"], "probes": tuple(values["stamp"]["probes"])}
                return cls(**{**values, "encoder": Encoder(**values["encoder"]), "stamp": Stamp(**shard)})
        except (KeyError, TypeError, ValueError):
            pass
        raise ValueError(f"no embeddings of version {VERSION}")


def sidecar_path(where: str, name: str, folder: str | None = None) -> str:
    """Returns where the embeddings of a shard, table or folder are kept.

    Args:
        where: the shard, table or folder.
        name: of the embeddings.
        folder: that holds the files of all shards; None keeps each beside its shard, that of a folder hidden inside it.
    """
    if folder is not None:
        return f"{folder.rstrip('/')}/{os.path.basename(where.rstrip('/'))}.{name}.safetensors"
    if is_local(where) and os.path.isdir(where):
        return os.path.join(where, f".{name}.safetensors")
    return f"{where}.{name}.safetensors"


def key_hash(key: str) -> int:
    """Returns 64 bits of a sample's key, signed."""
    return _hash64(key.encode(errors="surrogateescape"))


def text_hash(ids_T: Tensor) -> int:
    """Returns 64 bits of the ids that the text tower reads, signed: a caption is found by them."""
    return _hash64(ids_T.to(torch.int32).numpy().astype("<i4").tobytes())


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True, eq=False)
class EmbeddedShard:
    """All rows of a shard.

    Args:
        keys: of the n samples.
        image_nD: embeddings of pictures, NaN where there is none; None without pictures.
        text_mD: embeddings of captions, those of sample 0 first; None without captions.
        hashes_m: `text_hash` of each caption, int64.
        counts_n: captions of each sample, int64.
        failures: (sample, reason) of what could not be embedded.
    """

    keys: Sequence[str]
    image_nD: Tensor | None
    text_mD: Tensor | None
    hashes_m: Tensor
    counts_n: Tensor
    failures: Sequence[tuple[int, str]]

    def to_bytes(self, head: EmbeddingHead) -> bytes:
        """Returns the file, with `head` and a checksum."""
        keys = [key.encode(errors="surrogateescape") for key in self.keys]
        hashes = np.array([key_hash(key) for key in self.keys], dtype="<i8")
        order = np.argsort(hashes, kind="stable")  # rows of one key stay in order
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), "u1").copy()),
            "key_end": torch.tensor([len(key) for key in keys], dtype=torch.int64).cumsum(0),
            "key_hash": torch.from_numpy(hashes[order]),
            "key_row": torch.from_numpy(order.astype("<i8")),
            "text_hash": self.hashes_m,
            "text_first": torch.cat([self.counts_n.new_zeros(1), self.counts_n.cumsum(0)]),
            "failures": torch.tensor(list(json.dumps(list(self.failures)).encode()), dtype=torch.uint8),
        }
        rows = {"image": self.image_nD, "text": self.text_mD}
        tensors |= {name: x.contiguous() for name, x in rows.items() if x is not None}
        crc = 0
        for name in ("image", "text"):
            if name in tensors and tensors[name].numel():
                crc = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, crc)
        line = json.dumps({**asdict(head), "checksum": crc}, sort_keys=True)
        return safetensors.torch.save(tensors, {METADATA: line})


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file: `dtype` as safetensors calls it, begin and end in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


Read = Callable[[int, int], Any]


class EmbeddingFile:
    """A file of embeddings, whose rows are found by sample key and by the ids of a caption.

    Args:
        path: local path or fsspec URL.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, of another version, or cut short.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._read, size = _open(path)
        self.head, self._places = _read_header(self._read, path)
        if self._places and max(place.end for place in self._places.values()) != size:
            raise ValueError(f"{path} is cut short or damaged: it has {size} bytes")
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in the order of the shard."""
        joined, ends = self._array("keys").tobytes(), self._array("key_end").tolist()
        pairs = zip([0, *ends], ends, strict=False)
        return [joined[begin:end].decode(errors="surrogateescape") for begin, end in pairs]

    @property
    def failures(self) -> list[tuple[int, str]]:
        """(sample, reason) of what could not be embedded."""
        return [(int(row), str(reason)) for row, reason in json.loads(self._array("failures").tobytes())]

    def image(self, key: str) -> Tensor:
        """Returns the embedding [D] of a sample's picture; LookupError with a reason if there is none."""
        row = self._rows(key)[0]
        image_D = self._row("image", row)
        if bool(image_D[0].isnan()):
            reasons = [reason for failed, reason in self.failures if failed == row]
            raise LookupError("its picture could not be embedded: " + "; ".join(reasons))
        return image_D

    def text(self, key: str, ids_T: Tensor) -> Tensor:
        """Returns the embedding [D] of one of a sample's captions, given by its ids; LookupError if it is not there."""
        wanted, first = text_hash(ids_T), self._array("text_first")
        for row in self._rows(key):  # a table may name a picture several times
            begin, end = int(first[row]), int(first[row + 1])
            found = np.flatnonzero(self._array("text_hash")[begin:end] == wanted)
            if len(found):
                return self._row("text", begin + int(found[0]))
        raise LookupError(f"none of its embedded captions has these ids; fields embedded: {self.head.fields}")

    def all_rows(self, name: str) -> Tensor:
        """Returns all embeddings of `image` [n, D] or `text` [m, D], as stored."""
        place = self._place(name)
        return self._floats(name, place.begin, place.end).reshape(place.shape)

    def _rows(self, key: str) -> list[int]:
        hashes, wanted = self._array("key_hash"), key_hash(key)
        begin, end = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        if begin == end:
            raise LookupError("its key has no embeddings")
        rows: list[int] = self._array("key_row")[begin:end].tolist()
        return rows

    def _row(self, name: str, row: int) -> Tensor:
        place = self._place(name)
        size = (place.end - place.begin) // place.shape[0]
        return self._floats(name, place.begin + row * size, place.begin + (row + 1) * size)

    def _floats(self, name: str, begin: int, end: int) -> Tensor:
        if begin == end:
            return torch.empty(0, dtype=_FLOATS[self._place(name).dtype])
        content = bytearray(self._read(begin, end - begin))  # a copy: torch's tensors can be written to
        return torch.frombuffer(content, dtype=_FLOATS[self._place(name).dtype])

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            place = self._place(name)
            self._arrays[name] = np.frombuffer(self._read(place.begin, place.end - place.begin), _NUMBERS[place.dtype])
        return self._arrays[name]

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise LookupError(f"{self.path} has no {name} embeddings: they were made with --only")
        return self._places[name]


def _open(path: str) -> tuple[Read, int]:
    """What reads `size` bytes at an offset, and the size of the file."""
    if not is_local(path):
        file = ByteFile(path)
        return file.read, file.size
    with open(path, "rb") as local:
        size = os.fstat(local.fileno()).st_size
        if size == 0:
            return (lambda begin, size: b""), 0
        mapped = memoryview(mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ))
    return (lambda begin, size: mapped[begin : begin + size]), size


def _read_header(read: Read, path: str) -> tuple[EmbeddingHead, dict[str, _Place]]:
    """Source of the layout: https://github.com/huggingface/safetensors, section Format."""
    begin = bytes(read(0, FIRST_READ))
    length = int.from_bytes(begin[:8], "little")
    if len(begin) >= 8 and FIRST_READ < 8 + length < 2**27:
        begin = bytes(read(0, 8 + length))
    try:
        header = json.loads(begin[8 : 8 + length])
        head = EmbeddingHead.from_json(header.pop("__metadata__")[METADATA])
        places = {
            name: _Place(entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} holds no embeddings of version {VERSION}") from None
    return head, places


def read_embedding_head(path: str) -> EmbeddingHead | None:
    """Returns the head of a file of embeddings; None if there is no such file, or it is damaged or something else."""
    try:
        return EmbeddingFile(path).head
    except (FileNotFoundError, ValueError):
        return None
