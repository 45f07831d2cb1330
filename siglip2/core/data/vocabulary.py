"""Tokenizer files of two kinds behind one face: pieces of text to ids and back, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer as JsonTokenizer

from siglip2.core.data.hub import download, is_hub_id

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

FILE_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.model")


class Vocabulary(Protocol):
    """What a tokenizer file does when it is asked for nothing but pieces."""

    size: int
    lowercases: bool

    def find(self, names: Iterable[str]) -> int | None: ...

    def ids(self, text: str) -> list[int]: ...

    def text(self, ids: list[int]) -> str: ...


class JsonVocabulary:
    """A Hugging Face `tokenizer.json`, without its own padding, truncation and special tokens."""

    def __init__(self, file: str) -> None:
        self.backend = JsonTokenizer.from_str(file)
        self.backend.no_padding()
        self.backend.no_truncation()
        # Otherwise a caption that spells "<eos>" or "<pad>" would end early or hide text from the caption
        # losses. SentencePiece, with which the published weights were trained, never reads control symbols
        # from text.
        self.backend.encode_special_tokens = True
        normalizer = self.backend.normalizer
        self.lowercases = normalizer is not None and b'"Lowercase"' in normalizer.__getstate__()
        self.size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def find(self, names: Iterable[str]) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names)
        return next((id_ for id_ in ids if id_ is not None), None)

    def ids(self, text: str) -> list[int]:
        # One by one: encode_batch starts a thread pool, which does not survive the fork of loader workers.
        return self.backend.encode(text, add_special_tokens=False).ids

    def text(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)


class SentencePieceVocabulary:
    """A SentencePiece `.model`, e.g. Gemma's `tokenizer.model`."""

    def __init__(self, file: bytes) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "this tokenizer is a SentencePiece model and the package 'sentencepiece' is not installed; "
                "`pip install sentencepiece`, or use the tokenizer.json of the same model"
            ) from error
        self.backend: SentencePieceProcessor = SentencePieceProcessor(model_proto=file)
        self.size = self.backend.get_piece_size()
        self.lowercases = False

    def find(self, names: Iterable[str]) -> int | None:
        unknown = self.backend.unk_id()
        ids = (self.backend.piece_to_id(name) for name in names)
        return next((id_ for id_ in ids if id_ != unknown), None)

    def ids(self, text: str) -> list[int]:
        return self.backend.encode(text, out_type=int, add_bos=False, add_eos=False)

    def text(self, ids: list[int]) -> str:
        return self.backend.decode(ids)


def read_vocabulary(file: str | bytes) -> Vocabulary:
    """Returns the vocabulary in a file: text of a `tokenizer.json`, or bytes of a SentencePiece `.model`.

    Raises:
        ValueError: if it is neither.
        ImportError: if it is a SentencePiece model and `sentencepiece` is not installed.
    """
    try:
        if not file:  # sentencepiece takes no bytes for a model without pieces
            raise ValueError("the file is empty")
        return JsonVocabulary(file) if isinstance(file, str) else SentencePieceVocabulary(file)
    except ImportError:
        raise
    except Exception as error:
        # Both libraries raise bare Exception or RuntimeError on a file they cannot read.
        raise ValueError(f"neither a Hugging Face tokenizer.json nor a SentencePiece model ({error})") from error


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer file itself, given that file, a folder that holds one, or a hub id.

    Args:
        path: of the file or folder, which touches no network; or `owner/name` at the Hugging Face hub, of which the
            tokenizer alone is downloaded.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for and how to get one.
        ValueError: if it is a hub id, and cannot be downloaded.
    """
    path = download(str(path), FILE_NAMES) if is_hub_id(str(path)) else Path(path).expanduser()
    candidates = [path / name for name in FILE_NAMES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = f"none of {', '.join(FILE_NAMES)} in the folder {path}" if path.is_dir() else f"no such file: {path}"
    raise FileNotFoundError(
        f"no tokenizer found ({wanted}). Train one with `siglip2 tokenizer train --out tokenizer.json "
        "SHARDS`, or download Gemma's tokenizer.json, the vocabulary of the published SigLIP 2 weights"
    )
