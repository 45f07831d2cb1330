"""What happens to a caption before and after the vocabulary."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

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
            raise ValueError(f"text length {self.length} has no room for a caption and its EOS; SigLIP 2 uses 64")
        if self.padding_side != "right":
            raise ValueError(
                f"padding_side {self.padding_side!r}: the text tower is trained with padding on the 'right'"
            )
        if self.bos and self.bos_id is None:
            raise ValueError("bos=True, but the vocabulary has no BOS; give its id as bos_id or leave bos=False")
        for name in ("pad_id", "eos_id", "bos_id"):
            id_ = getattr(self, name)
            if id_ is not None and not 0 <= id_ < self.vocab_size:
                raise ValueError(f"{name} {id_} is outside of the vocabulary of {self.vocab_size} ids")

    def clean(self, text: str, *, keep_punctuation: bool = False) -> str:
        """Returns the caption as the vocabulary will see it.

        Args:
            text: as somebody wrote it.
            keep_punctuation: only change the case, for text that a program wrote and has to read again.
        """
        # A lone surrogate (half an emoji cut off in a JSON string) has no UTF-8 form and would stop the run.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self.canonicalize:
            return text.lower() if keep_punctuation else canonicalize_text(text)
        if self.lowercase:
            return text.translate(_LOWER_ASCII) if self.lowercase_ascii_only else text.lower()
        return text

    @property
    def room(self) -> int:
        """How many ids of a caption fit beside EOS and, if asked for, BOS."""
        return self.length - 1 - self.bos

    def fit(self, ids: Sequence[int]) -> list[int]:
        """Returns `length` ids: BOS if asked for, as many of `ids` as fit, EOS, padding."""
        head = [self.bos_id] if self.bos and self.bos_id is not None else []
        kept = [*head, *ids[: self.room], self.eos_id]
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
            raise ValueError(f"text contract has unknown fields {unknown}, expected {sorted(known)}; update siglip2")
        return cls(**values)

    def differences(self, other: TextContract) -> list[str]:
        """Returns one line for each field in which two contracts differ: `length: 64 here, 32 there`."""
        here, there = self.to_dict(), other.to_dict()
        return [f"{name}: {here[name]!r} here, {there[name]!r} there" for name in here if here[name] != there[name]]
