"""From a caption to the ids the text tower reads, and the contract that decides which ids those are.

The published SigLIP 2 weights were trained on: lowercase, Gemma's 256 000 pieces, no BOS, an EOS that
survives truncation, pad id 0 on the right up to 64 ids, and no attention mask
(https://arxiv.org/abs/2502.14786, section 2.1; google-research/big_vision, `pp/proj/paligemma/ops.py`,
`tok(length=64, bos="no", eos="sticky")`). The text tower pools the *last* position whatever stands there, so
padding, side and EOS are part of the weights' meaning. Libraries disagree on all of these, so the contract
and the tokenizer file travel together in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

PAD_NAMES = ("<pad>", "[PAD]")
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "[SEP]")
BOS_NAMES = ("<bos>", "<s>", "<|startoftext|>", "[CLS]")
FILE_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.model")

# How three libraries clean the text given to the same weights. big_vision's `lower` is tf.strings.lower
# without an encoding, which touches A-Z only (tensorflow, core/kernels/string_lower_op.cc); transformers'
# Siglip2Tokenizer lowercases all scripts; open_clip's siglip2 configs say `clean: canonicalize`.
KNOWN_CONTRACTS: dict[str, dict[str, bool]] = {
    "big_vision": {"lowercase": True, "lowercase_ascii_only": True, "canonicalize": False},
    "hf": {"lowercase": True, "lowercase_ascii_only": False, "canonicalize": False},
    "open_clip": {"lowercase": True, "lowercase_ascii_only": False, "canonicalize": True},
}

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOWER_ASCII = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def canonicalize_text(text: str) -> str:
    """The text in lowercase, without ASCII punctuation, underscores and runs of whitespace as one space.

    Source: big_vision `evaluators/proj/image_text/prompt_engineering.py`; open_clip
    `tokenizer.canonicalize_text`. open_clip repairs mojibake (ftfy) and HTML entities before this; here that
    is the business of data preparation.
    """
    return " ".join(text.replace("_", " ").translate(_DROP_PUNCTUATION).lower().split())


@dataclass(frozen=True)
class TextContract:
    """Everything besides the vocabulary that decides which ids a caption becomes.

    EOS is sticky: a caption that is too long keeps its first ids and still ends in EOS.

    Args:
        length: ids per caption; every caption is padded or cut to exactly this many.
        lowercase: lowercase the caption first, all scripts, by `str.lower`.
        lowercase_ascii_only: lowercase only A to Z, as the preprocessing of big_vision does.
        canonicalize: also strip ASCII punctuation and turn underscores into spaces, as open_clip does.
        padding_side: only "right"; the text tower pools the last position and was trained that way.
        pad_id: id that fills up short captions.
        eos_id: id that ends every caption.
        bos: begin every caption with `bos_id`; the published weights do not.
        bos_id: id of the beginning of a caption, None if the vocabulary has none.
        vocab_size: rows the token embedding needs.

    Raises:
        ValueError: if the length leaves no room, an id is outside of the vocabulary, padding is not on the
            right, or `bos` is asked for without a `bos_id`.
    """

    length: int = 64
    lowercase: bool = True
    lowercase_ascii_only: bool = False
    canonicalize: bool = False
    padding_side: str = "right"
    pad_id: int = 0
    eos_id: int = 1
    bos: bool = False
    bos_id: int | None = None
    vocab_size: int = 256_000

    def __post_init__(self) -> None:
        if self.length < 2 + self.bos:
            raise ValueError(
                f"text length {self.length} has no room for a caption and its EOS; SigLIP 2 uses 64"
            )
        if self.padding_side != "right":
            raise ValueError(
                f"padding_side {self.padding_side!r}: the text tower is trained with padding on the 'right'"
            )
        if self.bos and self.bos_id is None:
            raise ValueError(
                "bos=True, but the vocabulary has no BOS; give its id as bos_id or leave bos=False"
            )
        for name in ("pad_id", "eos_id", "bos_id"):
            id_ = getattr(self, name)
            if id_ is not None and not 0 <= id_ < self.vocab_size:
                raise ValueError(f"{name} {id_} is outside of the vocabulary of {self.vocab_size} ids")

    def clean(self, text: str) -> str:
        """Returns the caption as the vocabulary will see it."""
        # A lone surrogate (half an emoji cut off in a JSON string) has no UTF-8 form and would stop the run.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self.canonicalize:
            return canonicalize_text(text)
        if self.lowercase:
            return text.translate(_LOWER_ASCII) if self.lowercase_ascii_only else text.lower()
        return text

    def fit(self, ids: Sequence[int]) -> list[int]:
        """Returns `length` ids: BOS if asked for, as many of `ids` as fit, EOS, padding."""
        head = [self.bos_id] if self.bos and self.bos_id is not None else []
        kept = [*head, *ids[: self.length - 1 - len(head)], self.eos_id]
        return kept + [self.pad_id] * (self.length - len(kept))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, for a checkpoint or a model card."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextContract:
        """Rebuilds a contract from `to_dict`; fields younger than the file take their defaults.

        Raises:
            ValueError: if a field is unknown, for it may change the ids.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"text contract has unknown fields {unknown}, expected {sorted(known)}; update siglip2"
            )
        return cls(**values)

    def differences(self, other: TextContract) -> list[str]:
        """Returns one line for each field in which two contracts differ: `length: 64 here, 32 there`."""
        here, there = self.to_dict(), other.to_dict()
        return [
            f"{name}: {here[name]!r} here, {there[name]!r} there"
            for name in here
            if here[name] != there[name]
        ]


class _Vocabulary(Protocol):
    """What a tokenizer file does when it is asked for nothing but pieces."""

    size: int
    lowercases: bool

    def find(self, names: Iterable[str]) -> int | None: ...

    def ids(self, text: str) -> list[int]: ...

    def text(self, ids: list[int]) -> str: ...


class _JsonVocabulary:
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


class _SentencePieceVocabulary:
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


class Tokenizer:
    """A vocabulary file and a text contract: captions in, ids out. Picklable, for loader workers.

    Args:
        file: the vocabulary itself: text of a `tokenizer.json`, or bytes of a SentencePiece `.model`.
        contract: what happens to a caption before and after the vocabulary. To change one field, make a new
            one: `Tokenizer(old.file, dataclasses.replace(old.contract, length=32))`.

    Raises:
        ValueError: if the file cannot be read, has ids outside of the contract's vocabulary, or lowercases by
            itself where the contract says that case is kept.
        ImportError: if the file is a SentencePiece model and `sentencepiece` is not installed.
    """

    def __init__(self, file: str | bytes, contract: TextContract) -> None:
        self.file = file
        self.contract = contract
        self._vocabulary = _read_vocabulary(file)
        if self._vocabulary.size > contract.vocab_size:
            raise ValueError(
                f"the tokenizer file has {self._vocabulary.size} ids, the text contract "
                f"{contract.vocab_size}; use the tokenizer this contract was made with"
            )
        keeps_case = not contract.lowercase or contract.lowercase_ascii_only
        if self._vocabulary.lowercases and keeps_case and not contract.canonicalize:
            raise ValueError(
                "the tokenizer file lowercases by itself, but the contract says "
                f"lowercase={contract.lowercase}, lowercase_ascii_only={contract.lowercase_ascii_only}; "
                "set lowercase=True, or train a tokenizer with lowercase=False"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        length: int = 64,
        lowercase: bool = True,
        lowercase_ascii_only: bool = False,
        canonicalize: bool = False,
        bos: bool = False,
        pad_id: int | None = None,
        eos_id: int | None = None,
        bos_id: int | None = None,
    ) -> Tokenizer:
        """Reads a tokenizer file and completes the contract with the ids found in it.

        Args:
            path: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, or a folder with one of them.
            length: ids per caption.
            lowercase: lowercase captions first.
            lowercase_ascii_only: lowercase only A to Z, as big_vision does.
            canonicalize: also strip ASCII punctuation, as open_clip does.
            bos: begin captions with BOS; the published weights do not.
            pad_id: padding id; by default that of `<pad>`.
            eos_id: end id; by default that of `<eos>` or `</s>`.
            bos_id: beginning id; by default that of `<bos>` or `<s>`, if there is one.

        Raises:
            FileNotFoundError: if there is no such file, or no tokenizer in the folder.
            ValueError: if the file is not a tokenizer, or has no padding or end id and none is given.
            ImportError: if the file is a SentencePiece model and `sentencepiece` is not installed.
        """
        path = find_tokenizer_file(path)
        raw = path.read_bytes()
        try:
            file = raw.decode("utf-8") if raw.lstrip()[:1] == b"{" else raw
            vocabulary = _read_vocabulary(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        contract = TextContract(
            length=length,
            lowercase=lowercase,
            lowercase_ascii_only=lowercase_ascii_only,
            canonicalize=canonicalize,
            pad_id=_required_id(vocabulary, PAD_NAMES, given=pad_id, option="pad_id", path=path),
            eos_id=_required_id(vocabulary, EOS_NAMES, given=eos_id, option="eos_id", path=path),
            bos=bos,
            bos_id=vocabulary.find(BOS_NAMES) if bos_id is None else bos_id,
            vocab_size=vocabulary.size,
        )
        return cls(file, contract)

    @property
    def vocab_size(self) -> int:
        """Rows the token embedding needs."""
        return self.contract.vocab_size

    def ids(self, text: str) -> list[int]:
        """Returns the ids of the cleaned text alone, of any length: no BOS, EOS, truncation or padding."""
        return self._vocabulary.ids(self.contract.clean(text))

    def __call__(self, text: str) -> Tensor:
        """Returns the ids of one caption, int32, shape [length]."""
        return torch.tensor(self.contract.fit(self.ids(text)), dtype=torch.int32)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the ids of several captions, int32, shape [B, length].

        Raises:
            TypeError: if `texts` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError(
                "encode() got one string, expected a list of captions; call tokenizer(text) for one"
            )
        rows = [self.contract.fit(self.ids(text)) for text in texts]
        return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), self.contract.length)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Returns the text of one row of ids, up to the first EOS, without BOS and padding."""
        plain = [int(id_) for id_ in ids]
        if self.contract.eos_id in plain:
            plain = plain[: plain.index(self.contract.eos_id)]
        silent = {self.contract.pad_id, self.contract.bos_id}
        return self._vocabulary.text([id_ for id_ in plain if id_ not in silent])

    def to_state(self) -> dict[str, Any]:
        """Returns file and contract as plain values; survives `torch.load(..., weights_only=True)`."""
        return {"file": self.file, "contract": self.contract.to_dict()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tokenizer:
        """Rebuilds a tokenizer from `to_state`; nothing else is needed, in particular no file."""
        return cls(state["file"], TextContract.from_dict(state["contract"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer, (self.file, self.contract))

    def fingerprint(self) -> str:
        """Returns 16 hex digits that differ whenever the file or the contract differ."""
        contract = json.dumps(self.contract.to_dict(), sort_keys=True)
        return hashlib.sha256(_file_digest(self.file) + contract.encode()).hexdigest()[:16]

    def differences(self, other: Tokenizer) -> list[str]:
        """Returns one line for each thing in which two tokenizers differ; none means equal ids."""
        lines = self.contract.differences(other.contract)
        here, there = _file_digest(self.file).hex()[:12], _file_digest(other.file).hex()[:12]
        if here != there:
            lines.insert(0, f"tokenizer file: sha256 {here} here, {there} there")
        return lines

    def to_tokenizer_json(self) -> str:
        """Returns a `tokenizer.json` with the contract built in: cleaning, BOS, EOS, truncation, padding.

        For other programs: whoever loads it gets the trained ids without knowing the contract. Two things
        cannot be written into such a file: the Greek final sigma of `str.lower` (it lowercases letter by
        letter), and that captions which spell a special token are plain text.

        Raises:
            ValueError: if the vocabulary is a SentencePiece model.
        """
        if isinstance(self.file, bytes):
            raise ValueError(  # noqa: TRY004 - the user's file is of the other kind
                "a SentencePiece model has no tokenizer.json; load the tokenizer.json of the same model"
            )
        backend, contract = JsonTokenizer.from_str(self.file), self.contract
        steps = _cleaning_steps(contract) + ([backend.normalizer] if backend.normalizer else [])
        backend.normalizer = normalizers.Sequence(steps)
        eos, pad = backend.id_to_token(contract.eos_id), backend.id_to_token(contract.pad_id)
        single, special_tokens = ["$A", eos], [(eos, contract.eos_id)]
        if contract.bos and contract.bos_id is not None:
            bos = backend.id_to_token(contract.bos_id)
            single, special_tokens = [bos, *single], [(bos, contract.bos_id), *special_tokens]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
        backend.enable_truncation(contract.length)
        backend.enable_padding(
            direction="right", length=contract.length, pad_id=contract.pad_id, pad_token=pad
        )
        return backend.to_str(pretty=False)


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer file itself, given that file or a folder that holds one.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for and how to get one.
    """
    path = Path(path).expanduser()
    candidates = [path / name for name in FILE_NAMES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = (
        f"none of {', '.join(FILE_NAMES)} in the folder {path}" if path.is_dir() else f"no such file: {path}"
    )
    raise FileNotFoundError(
        f"no tokenizer found ({wanted}). Train one with `siglip2 tokenizer train --out tokenizer.json "
        "SHARDS`, or download Gemma's tokenizer.json, the vocabulary of the published SigLIP 2 weights"
    )


def _read_vocabulary(file: str | bytes) -> _Vocabulary:
    try:
        if not file:  # sentencepiece takes no bytes for a model without pieces
            raise ValueError("the file is empty")
        return _JsonVocabulary(file) if isinstance(file, str) else _SentencePieceVocabulary(file)
    except ImportError:
        raise
    except Exception as error:
        # Both libraries raise bare Exception or RuntimeError on a file they cannot read.
        raise ValueError(
            f"neither a Hugging Face tokenizer.json nor a SentencePiece model ({error})"
        ) from error


def _required_id(
    vocabulary: _Vocabulary, names: Sequence[str], *, given: int | None, option: str, path: Path
) -> int:
    found = vocabulary.find(names) if given is None else given
    if found is None:
        raise ValueError(f"{path} has none of {', '.join(names)}; give the id to use as {option}=...")
    return found


def _cleaning_steps(contract: TextContract) -> list[normalizers.Normalizer]:
    if contract.canonicalize:
        return [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    if contract.lowercase and contract.lowercase_ascii_only:
        return [normalizers.Replace(letter, letter.lower()) for letter in string.ascii_uppercase]
    return [normalizers.Lowercase()] if contract.lowercase else []


def _file_digest(file: str | bytes) -> bytes:
    return hashlib.sha256(file.encode("utf-8") if isinstance(file, str) else file).digest()
