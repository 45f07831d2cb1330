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
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor

from siglip2.core.data.piece_model import converted
from siglip2.core.data.text_contract import KNOWN_CONTRACTS, TextContract, canonicalize_text
from siglip2.core.data.vocabulary import Vocabulary, find_tokenizer_file, read_vocabulary

__all__ = ["KNOWN_CONTRACTS", "TextContract", "Tokenizer", "canonicalize_text", "find_tokenizer_file"]

PAD_NAMES = ("<pad>", "[PAD]")
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "[SEP]")
BOS_NAMES = ("<bos>", "<s>", "<|startoftext|>", "[CLS]")


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
        self._vocabulary = read_vocabulary(file)
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
            path: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, a folder with one of them, or a hub id.
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
            ValueError: if the file is not a tokenizer, or has no padding or end id and none is given; or a hub id
                cannot be downloaded.
            ImportError: if the file is a SentencePiece model and `sentencepiece` is not installed.
        """
        path = find_tokenizer_file(path)
        raw = path.read_bytes()
        try:
            file = raw.decode("utf-8") if raw.lstrip()[:1] == b"{" else raw
            vocabulary = read_vocabulary(file)
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

    def ids(self, text: str, *, keep_punctuation: bool = False) -> list[int]:
        """Returns the ids of the cleaned text alone, of any length: no BOS, EOS, truncation or padding.

        Args:
            text: a caption, or a piece of one.
            keep_punctuation: clean it of capitals only, whatever the contract says of punctuation and spaces.
        """
        return self._vocabulary.ids(self.contract.clean(text, keep_punctuation=keep_punctuation))

    def __call__(self, text: str) -> Tensor:
        """Returns the ids of one caption, int32, shape [length]."""
        return torch.tensor(self.contract.fit(self.ids(text)), dtype=torch.int32)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the ids of several captions, int32, shape [B, length].

        Raises:
            TypeError: if `texts` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError("encode() got one string, expected a list of captions; call tokenizer(text) for one")
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
        letter), and that captions which spell a special token are plain text. A SentencePiece model is
        converted; what that changes is said by `piece_model.limits`.

        Raises:
            ValueError: if the vocabulary is a SentencePiece model that cannot be converted.
            ImportError: if it is one, and `sentencepiece` or `protobuf` is not installed.
        """
        contract, file = self.contract, self.file
        backend = JsonTokenizer.from_str(file) if isinstance(file, str) else converted(file, contract.clean)
        steps = _cleaning_steps(contract) + ([backend.normalizer] if backend.normalizer else [])
        backend.normalizer = normalizers.Sequence(steps)
        eos, pad = backend.id_to_token(contract.eos_id), backend.id_to_token(contract.pad_id)
        single, special_tokens = ["$A", eos], [(eos, contract.eos_id)]
        if contract.bos and contract.bos_id is not None:
            bos = backend.id_to_token(contract.bos_id)
            single, special_tokens = [bos, *single], [(bos, contract.bos_id), *special_tokens]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
        backend.enable_truncation(contract.length)
        backend.enable_padding(direction="right", length=contract.length, pad_id=contract.pad_id, pad_token=pad)
        return backend.to_str(pretty=False)


def _required_id(vocabulary: Vocabulary, names: Sequence[str], *, given: int | None, option: str, path: Path) -> int:
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
