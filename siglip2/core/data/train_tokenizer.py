"""Trains a small vocabulary of the same shape as Gemma's, for runs whose captions do not need 256 000 pieces.

Same special ids, byte fallback and splitting of digits as Gemma's, and a byte-pair model without a word-start
prefix, so that transformers' `GemmaTokenizer` and `Siglip2Tokenizer` read the result with identical ids.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Ids 0 to 4, in Gemma's order (transformers, models/siglip2/tokenization_siglip2.py).
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"
ALWAYS_KNOWN = (SPACE, *"0123456789")

logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    out: str | Path,
    lowercase: bool = True,
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
) -> Path:
    """Trains a byte-pair vocabulary on captions and writes it as a Hugging Face `tokenizer.json`.

    Ids: pad 0, eos 1, bos 2, unk 3, mask 4, then 256 bytes, then characters and merges. Digits stay single
    pieces. The same texts in any order and batching give the same bytes, as long as the `tokenizers` library
    is the same.

    Args:
        texts: captions; read once, so a generator over shards will do. They are spooled to a temporary file.
        vocab_size: number of ids wanted, at least 272, or 16 without byte fallback; fewer come out if the
            captions do not hold that many pieces.
        out: file to write; folders are made.
        lowercase: train on lowercased captions, and have the file lowercase whatever it is given.
        byte_fallback: give unknown characters as their UTF-8 bytes, so that no text is lost; otherwise they
            become `<unk>`.
        character_coverage: share of all characters of the captions that get a piece of their own, in (0, 1];
            the default is SentencePiece's. Characters take at most half of the room, the rest is left to
            merges.

    Returns:
        The path written.

    Raises:
        ValueError: if there is not one caption with text, or `vocab_size` or `character_coverage` are out of
            range.
    """
    reserved = [*SPECIAL_TOKENS, *(BYTE_TOKENS if byte_fallback else ())]
    smallest = len(reserved) + len(ALWAYS_KNOWN)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(reserved)} special ids and {len(ALWAYS_KNOWN)} "
            f"basic characters need {smallest}; 4096 to 32768 are common for small runs"
        )
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character_coverage {character_coverage} is not in (0, 1]; 0.9995 is common")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        counts = _spool(texts, spool, lowercase=lowercase)
        if not counts:
            raise ValueError(
                "no caption with text in the tokenizer's training data; check that the shards hold .txt "
                "files that are not empty"
            )
        room = len(ALWAYS_KNOWN) + (vocab_size - smallest) // 2
        alphabet = _alphabet(counts, coverage=character_coverage, room=room)
        tokenizer = _untrained(lowercase=lowercase, byte_fallback=byte_fallback)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=reserved,
            # Both, because the trainer's own cut of the alphabet breaks ties at random.
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_unspool(spool), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        logger.info("asked for %d ids, the captions gave %d", vocab_size, tokenizer.get_vocab_size())
    out = Path(out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_gemma_shaped(tokenizer), encoding="utf-8")
    return out


def _untrained(*, lowercase: bool, byte_fallback: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    # No word-start prefix, as in Gemma: the first word of a caption is "dog", later ones are "▁dog".
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _spool(texts: Iterable[str], spool: IO[str], *, lowercase: bool) -> Counter[str]:
    """Writes one caption a line, as JSON for its line breaks; returns how often each character came."""
    counts: Counter[str] = Counter()
    for text in texts:
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = text.lower() if lowercase else text
        if text.strip():
            counts.update(text.replace(" ", SPACE))
            spool.write(json.dumps(text) + "\n")
    return counts


def _unspool(spool: IO[str]) -> Iterator[str]:
    spool.seek(0)
    return (json.loads(line) for line in spool)


def _alphabet(counts: Counter[str], *, coverage: float, room: int) -> list[str]:
    """Returns the basic characters, then the most frequent ones until they cover enough or fill the room."""
    alphabet = dict.fromkeys(ALWAYS_KNOWN)
    wanted, seen = coverage * counts.total(), 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= wanted or len(alphabet) >= room:
            break
        alphabet[character] = None
        seen += count
    return list(alphabet)


def _gemma_shaped(tokenizer: Tokenizer) -> str:
    """Returns the file's text, with the bytes as ordinary pieces.

    The trainer can reserve ids only as special tokens, but then a caption that spells "<0x41>" would be read
    as that byte, and decoding without special tokens would drop every byte.
    """
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
