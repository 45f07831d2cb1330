"""Text and pixel contract in files: in ours, beside every export, and in the tokenizer files of transformers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as JsonTokenizer

from siglip2.core.data.piece_model import limits
from siglip2.core.data.text import EOS_NAMES, PAD_NAMES, TextContract, Tokenizer, find_tokenizer_file
from siglip2.core.data.vocabulary import read_vocabulary
from siglip2.core.interop.files import read_json, write_json
from siglip2.core.interop.published import MC4
from siglip2.core.interop.weights import Weights

CONTRACT_FILE = "siglip2_contract.json"
# SigLIP 2, section 2.1: captions in lower case. Some of Gemma's tokenizer files at the hub do not say so.
LOWERCASED = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")
MC4_EXTRA = 100  # sentinels of T5 at the end of the multilingual vocabulary, which no text becomes
CANONICAL = ("SiglipTokenizer", "SiglipTokenizerFast")  # which strips punctuation, as SigLIP 1 was trained


def write_contract(folder: Path, weights: Weights) -> None:
    """Writes both contracts, GELU and depth of each tower as plain values; no other library reads that file."""
    text = weights.tokenizer.contract.to_dict() if weights.tokenizer else None
    towers = {"gelu": weights.gelus, "depth": weights.depths}
    write_json(folder / CONTRACT_FILE, {"text": text, "pixels": weights.pixels, **towers})


def read_contract(folder: Path) -> dict[str, Any]:
    """Returns what `write_contract` wrote; nothing if the folder was not written by us."""
    path = folder / CONTRACT_FILE
    return read_json(path) if path.is_file() else {}


def read_tokenizer_files(folder: Path, *, rows: int, length: int, clean: str | None = None) -> tuple[Any, list[str]]:
    """Returns the tokenizer of a folder with the text contract that its files say, or None, and notes about it.

    Args:
        folder: with `tokenizer.json` or a SentencePiece model, and `tokenizer_config.json`.
        rows: of the token table.
        length: ids per text.
        clean: how open_clip's `tokenizer_kwargs` clean a text.

    Raises:
        ValueError: if the tokenizer has more ids than the token table rows, or the file cannot be read.
    """
    try:
        path = find_tokenizer_file(folder)
    except FileNotFoundError:
        return None, ["there is no tokenizer beside the weights"]
    raw = path.read_bytes()
    file = raw.decode("utf-8") if path.suffix == ".json" else raw
    try:
        vocabulary = read_vocabulary(file)
    except ImportError as error:
        return None, [f"the tokenizer {path.name} was left out: {error}"]
    if rows == MC4 and rows < vocabulary.size <= rows + MC4_EXTRA:
        return None, [f"the tokenizer {path.name} was left out: its last {vocabulary.size - rows} ids have no row"]
    if vocabulary.size > rows:
        raise ValueError(
            f"{path}: a tokenizer of another vocabulary, {vocabulary.size} ids where the token table has {rows} rows"
        )
    saved = read_contract(folder).get("text")
    if saved is not None:
        return Tokenizer(file, TextContract.from_dict(saved)), []
    described = folder / "tokenizer_config.json"
    options, notes = _options(read_json(described) if described.is_file() else {}, vocabulary.lowercases, clean)
    names = options.pop("names")
    pad, eos = (vocabulary.find(names[kind]) for kind in ("pad", "eos"))
    found = Tokenizer.load(path, length=length, pad_id=pad, eos_id=eos, **options)
    return Tokenizer(file, replace(found.contract, vocab_size=rows)), notes


def _options(config: Mapping[str, Any], lowercases: bool, clean: str | None) -> tuple[dict[str, Any], list[str]]:
    """What the files say of cleaning and of special tokens."""
    kind = str(config.get("tokenizer_class", ""))
    canonical = clean == "canonicalize" if clean else kind in CANONICAL and config.get("do_lower_case", True)
    notes = []
    if config.get("padding_side", "right") != "right":
        notes.append("the tokenizer files pad on the left; the weights were trained with padding on the right")
    names = {"pad": _token(config, "pad_token", PAD_NAMES), "eos": _token(config, "eos_token", EOS_NAMES)}
    if kind in CANONICAL and "pad_token" not in config:
        names["pad"] = ("</s>",)  # that tokenizer's default
    options = {
        "lowercase": lowercases or canonical or clean == "lower" or kind in LOWERCASED,
        "canonicalize": canonical,
        "bos": bool(config.get("add_bos_token", False)),
        "names": names,
    }
    return options, notes


def _token(config: Mapping[str, Any], key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    value = config.get(key)
    content = value.get("content") if isinstance(value, Mapping) else value
    return (str(content), *names) if content else names


def write_tokenizer_files(
    folder: Path, tokenizer: Tokenizer, processor: str | None = None, images: Mapping[str, Any] | None = None
) -> list[str]:
    """Writes tokenizer files that give the trained ids to those who load them with `AutoTokenizer`; returns notes.

    The whole contract is in `tokenizer.json`, into which a SentencePiece model is converted; one that cannot be is
    copied, and the note says why. `padding`, `truncation` and `max_length` in `tokenizer_config.json` are
    what a processor of transformers hands to the tokenizer unless the caller says otherwise: without them
    `SiglipProcessor` would pad nothing.

    Args:
        folder: to write into.
        tokenizer: with its contract.
        processor: the class that transformers should load beside it.
        images: what that processor is to tell its image processor, where its class says something else.
    """
    contract, notes = tokenizer.contract, []
    try:
        built_in = tokenizer.to_tokenizer_json()
        notes += [] if isinstance(tokenizer.file, str) else limits(tokenizer.file)
    except (ValueError, ImportError) as error:
        if isinstance(tokenizer.file, str):
            raise
        (folder / "tokenizer.model").write_bytes(tokenizer.file)
        return [f"{error}; it was copied as tokenizer.model, which transformers will not load"]
    (folder / "tokenizer.json").write_text(built_in, encoding="utf-8")
    backend = JsonTokenizer.from_str(built_in)
    special = {"pad_token": backend.id_to_token(contract.pad_id), "eos_token": backend.id_to_token(contract.eos_id)}
    unknown = next((name for name in ("<unk>", "[UNK]") if backend.token_to_id(name) is not None), None)
    special |= {"unk_token": unknown} if unknown else {}
    special |= {"bos_token": backend.id_to_token(contract.bos_id)} if contract.bos_id is not None else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"processor_class": processor} if processor else {}),
        **special,
        "padding_side": "right",
        "truncation_side": "right",
        "model_max_length": contract.length,
        "model_input_names": ["input_ids"],  # no attention mask: the text tower reads its padding
        "padding": "max_length",
        "truncation": True,
        "max_length": contract.length,
        "split_special_tokens": True,  # a caption that spells <eos> is text
        "clean_up_tokenization_spaces": False,
        **(images or {}),  # a processor hands on whatever of its options it finds here
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    return notes


def is_plain_bpe(folder: Path) -> bool:
    """Says whether the `tokenizer.json` of a folder has merges, and its vocabulary no normalisation of its own.

    Only such a vocabulary survives the tokenizer class that transformers has for siglip2.
    """
    content = read_json(folder / "tokenizer.json")
    steps = json.dumps(content.get("normalizer"))
    return content["model"]["type"] == "BPE" and not any(f'"{step}"' in steps for step in ("Precompiled", "Prepend"))


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Says whether two tokenizers have the same pieces under the same ids and, where both say so, the same merges.

    An export has the contract built into its tokenizer file, so the files of equal tokenizers may differ.
    """
    if one.file == other.file:
        return True
    try:  # of a SentencePiece model what an export makes of it
        files = [t.file if isinstance(t.file, str) else t.to_tokenizer_json() for t in (one, other)]
    except (ValueError, ImportError):
        return False
    first, second = map(JsonTokenizer.from_str, files)
    same = first.get_vocab(with_added_tokens=True) == second.get_vocab(with_added_tokens=True)
    return same and first.model.__getstate__() == second.model.__getstate__()
