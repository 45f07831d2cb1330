"""A SentencePiece model as a `tokenizer.json` that gives the same ids, for libraries that read no SentencePiece.

Source: google/sentencepiece, src/{bpe,unigram}_model.cc and src/normalizer.cc; huggingface/tokenizers 0.23. What
transformers' own converter leaves to its tokenizer classes is in the file here, and differs where SentencePiece does:
names of special pieces are text, byte pieces too, and only spaces are stripped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers.models import BPE, Unigram

from siglip2.core.data.vocabulary import SentencePieceVocabulary

SPACE = "\u2581"
UNIGRAM, BPE_MODEL = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
# what every conversion is compared on, beside texts that are put together from its own pieces
PROBES = (
    "",
    " ",
    "a photo of a dog",
    "  leading, trailing and  double   spaces  ",
    "tab\tnewline\nreturn\r\nnull\x00bell\x07",
    "It's 50% OFF -- (really?) snake_case, kebab-case; 3.14 & 2,718",
    "Größe ÉCOLE łódź ĳ ﬁne № ½ ™ ²",
    "РУССКИЙ ελληνικά עברית العربية हिन्दी ภาษาไทย",
    "日本語のキャプション。中文，全角ＡＢＣ　한국어",
    "🙂 👩🏽‍🚀 🇩🇪 ❤️ 1️⃣",
    f"{SPACE} {SPACE}{SPACE}x \u00a0\u3000\u200b\u200d\ufeff y",
    "<0x41> <unk> <pad> <s> </s> <eos> <bos> <mask>",
    "aaaaaaaaaaaaaaaaa 11111111111111 !!!!!!!! ababababa",
    "very long " * 60,
)
GRAPHEMES = (
    "rare spellings become other ids in tokenizer.json than in the SentencePiece model, whose normalisation is read "
    "there letter by letter: decomposed Hangul and kana, half-width kana with a voicing mark, compatibility letters "
    "and no-break spaces with an accent or a joiner"
)
TIES = (
    "where two divisions of a text into pieces have the very same score, such as the two orders of 0 and 00, "
    "tokenizer.json may have the other one than the SentencePiece model"
)
SAME_SCORE = 1e-4  # sums of float32


def converted(file: bytes, clean: Callable[[str], str]) -> JsonTokenizer:
    """Returns the tokenizer of a SentencePiece model, after comparing the ids of odd texts with SentencePiece itself.

    It expects cleaned texts, adds neither BOS nor EOS, and does not pad.

    Args:
        file: the model.
        clean: how texts are cleaned before; pieces that no cleaned text holds are not looked for.

    Raises:
        ValueError: if a `tokenizer.json` cannot give the ids of that model.
        ImportError: if `sentencepiece` or `protobuf` is not installed.
    """
    model, vocabulary = _parsed(file), SentencePieceVocabulary(file)
    _refuse_what_has_no_counterpart(model)
    users = [p.piece for p in model.pieces if p.type == USER_DEFINED]
    found = [piece for piece in users if clean(piece) == piece]
    backend = _bpe(model, found) if model.trainer_spec.model_type == BPE_MODEL else _unigram(model, vocabulary, found)
    backend.decoder = _decoder(model)
    special = [p.piece for p in model.pieces if p.type in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    _compare(backend, vocabulary, model, clean)
    return backend


def limits(file: bytes) -> list[str]:
    """Returns sentences on the texts for which `converted` gives other ids than SentencePiece.

    Raises:
        ImportError: if `sentencepiece` or `protobuf` is not installed.
    """
    model = _parsed(file)
    ties = [TIES] if model.trainer_spec.model_type == UNIGRAM else []
    return ties + ([GRAPHEMES] if model.normalizer_spec.precompiled_charsmap else [])


def _parsed(file: bytes) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2 as format
    except ImportError as error:
        raise ImportError(
            f"a SentencePiece model is turned into a tokenizer.json with the packages 'sentencepiece' and 'protobuf' "
            f"({error}): `pip install 'siglip2[hf]'`"
        ) from error
    model = format.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    model.ParseFromString(file)
    return model


def _refuse_what_has_no_counterpart(model: Any) -> None:
    trainer, cleaning = model.trainer_spec, model.normalizer_spec
    types = {p.type for p in model.pieces}
    reason = None
    if trainer.model_type not in (UNIGRAM, BPE_MODEL):
        reason = "its pieces are whole words or characters"
    elif trainer.treat_whitespace_as_suffix:
        reason = "it marks spaces behind a word"
    elif not cleaning.escape_whitespaces:
        reason = "it leaves spaces as they are"
    elif UNUSED in types:
        reason = "it has unused pieces"
    elif trainer.byte_fallback and sum(p.type == BYTE for p in model.pieces) < 256:
        reason = "it falls back to bytes that it has no pieces for"
    elif USER_DEFINED in types and trainer.model_type == BPE_MODEL and _changes_text(cleaning):
        reason = "it has pieces of the user's beside a normalisation"
    if reason:
        raise ValueError(f"this SentencePiece model cannot be written as a tokenizer.json: {reason}")


def _changes_text(cleaning: Any) -> bool:
    return cleaning.add_dummy_prefix or cleaning.remove_extra_whitespaces or bool(cleaning.precompiled_charsmap)


def _bpe(model: Any, users: list[str]) -> JsonTokenizer:
    """Merges in the order of their scores; pieces of the user's are cut out of the text before."""
    scores = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    # Gemma's tab: SentencePiece merges letters that are no pieces. As a byte of the letter's own name it has that id
    for letter in {letter for piece in scores for letter in piece if letter.isascii()} - vocab.keys():
        if f"<0x{ord(letter):02X}>" in vocab:
            vocab[letter] = vocab.pop(f"<0x{ord(letter):02X}>")
    letters = vocab.keys() | {letter for piece in users for letter in piece}
    for piece in scores:
        if len(piece) > 1 and not letters.issuperset(piece):
            raise ValueError(
                f"this SentencePiece model cannot be written as a tokenizer.json: its piece {piece!r} has a letter "
                f"that is no piece"
            )
    merged = scores.keys() | {name for name in vocab if len(name) == 1}
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in merged and piece[cut:] in merged
    ]
    backend = JsonTokenizer(
        BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[0])],
            unk_token=_unknown(model),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    backend.normalizer = _normalizer(model)
    backend.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in users])
    return backend


def _unigram(model: Any, vocabulary: SentencePieceVocabulary, users: list[str]) -> JsonTokenizer:
    """Pieces of the user's are words of their own; the names of special pieces are cut, so that they stay text."""
    spec = model.trainer_spec
    unknown = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    scored = [(p.piece, p.score) for p in model.pieces]
    backend = JsonTokenizer(Unigram(scored, unk_id=unknown, byte_fallback=spec.byte_fallback))
    backend.normalizer = _normalizer(model)
    cuts = [pre_tokenizers.Split(Regex(_inside_names(model, vocabulary)), "isolated")]
    if users:
        longest_first = "|".join(re.escape(piece) for piece in sorted(users, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(Regex(longest_first), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return backend


def _inside_names(model: Any, vocabulary: SentencePieceVocabulary) -> str:
    """A regular expression for places inside the names of special pieces, where SentencePiece begins a piece."""
    places = []
    for piece in (p.piece for p in model.pieces if p.type in (CONTROL, UNKNOWN, BYTE)):
        tail = ""  # what SentencePiece makes of the end of the name, in whole pieces
        for part in reversed(vocabulary.backend.encode(piece, out_type=str)):
            if len(part) + len(tail) >= len(piece):
                break
            tail = part + tail
        cut = len(piece) - len(tail) if tail else 1
        places.append(f"(?<={re.escape(piece[:cut])})(?={re.escape(piece[cut:])})")
    return "|".join(places)


def _unknown(model: Any) -> str:
    return next(p.piece for p in model.pieces if p.type == UNKNOWN)


def _normalizer(model: Any) -> normalizers.Normalizer:
    cleaning = model.normalizer_spec
    prefix = [normalizers.Prepend(" ")] if cleaning.add_dummy_prefix else []
    rules = [normalizers.Precompiled(cleaning.precompiled_charsmap)] if cleaning.precompiled_charsmap else []
    steps = [*prefix, *rules]
    if cleaning.remove_extra_whitespaces:
        spaces = [(r"\A +", ""), (" {2,}", " "), (rf"[ {SPACE}]+\z", "")]
        steps = [*rules, *(normalizers.Replace(Regex(pattern), to) for pattern, to in spaces), *prefix]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: Any) -> decoders.Decoder:
    first = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first])


def _compare(
    backend: JsonTokenizer, vocabulary: SentencePieceVocabulary, model: Any, clean: Callable[[str], str]
) -> None:
    backend.encode_special_tokens = True  # names of special pieces are text, as for SentencePiece
    unigram = model.trainer_spec.model_type == UNIGRAM

    def score(ids: list[int]) -> float:
        return sum(model.pieces[id_].score for id_ in ids)

    for text in map(clean, _probes(model)):
        found, expected = backend.encode(text, add_special_tokens=False).ids, vocabulary.ids(text)
        if found != expected and not (unigram and abs(score(found) - score(expected)) < SAME_SCORE):
            raise ValueError(
                f"this SentencePiece model cannot be written as a tokenizer.json: {text[:80]!r} would become other "
                f"ids, {found[:8]} where SentencePiece has {expected[:8]}"
            )


def _probes(model: Any) -> Iterable[str]:
    yield from PROBES
    pieces = [p.piece.replace(SPACE, " ") for p in model.pieces]
    draw = random.Random(0)
    for count in range(1, 200):
        yield "".join(draw.choices(pieces, k=1 + count % 12))
