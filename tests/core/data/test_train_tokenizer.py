"""The vocabulary trained on captions: Gemma's shape, nothing lost, the same bytes every time."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import SPECIAL_TOKENS, train_tokenizer

CORPUS = [
    "A dog on the beach",
    "two dogs and 12 cats",
    "собака на пляже",
    "浜辺の犬",
    "line\nbreak",
    "dog dog",
] * 3


def trained(folder: Path, texts=CORPUS, **options) -> Tokenizer:
    return Tokenizer.load(train_tokenizer(texts, out=folder / "tokenizer.json", **{"vocab_size": 400, **options}))


def test_special_ids_are_gemmas(tmp_path):
    vocabulary = json.loads(trained(tmp_path).file)["model"]["vocab"]
    assert [vocabulary[name] for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(5, 261))


def test_vocabulary_has_the_size_asked_for_without_gaps(tmp_path):
    vocabulary = json.loads(trained(tmp_path, vocab_size=320).file)["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(320))


@pytest.mark.parametrize("text", ["🐶🏖️ ꙮ 𝄞", "control \x00\x07 codes", "ไม่มีในคลัง", "\u2028 \ufeff"])
def test_text_never_seen_is_encoded_without_unknowns_and_decoded_whole(tmp_path, text):
    tokenizer = trained(tmp_path)
    assert 3 not in tokenizer.ids(text)
    assert tokenizer.decode(tokenizer.ids(text)) == text.lower()


def test_without_byte_fallback_unseen_characters_are_unknown(tmp_path):
    tokenizer = trained(tmp_path, byte_fallback=False, vocab_size=100)
    assert 3 in tokenizer.ids("🐶")
    assert 3 not in tokenizer.ids("dog")


def test_digits_are_single_tokens_even_if_numbers_repeat(tmp_path):
    tokenizer = trained(tmp_path, [*CORPUS, *["box 2024 2024"] * 50])
    space = tokenizer.ids(" ")
    assert tokenizer.ids(" 2024") == space + [tokenizer.ids(d)[0] for d in "2024"]


def test_frequent_words_become_one_token_and_carry_their_space(tmp_path):
    tokenizer = trained(tmp_path, ["a dog"] * 20)
    assert len(tokenizer.ids("a dog")) == 2


def test_same_captions_give_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys; from siglip2.core.data.train_tokenizer import train_tokenizer; "
        f"train_tokenizer({CORPUS!r}, vocab_size=330, out=sys.argv[1], character_coverage=0.9)"
    )
    here = train_tokenizer(CORPUS, vocab_size=330, out=tmp_path / "here.json", character_coverage=0.9)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.json")], check=True)
    assert here.read_bytes() == (tmp_path / "there.json").read_bytes()


def test_order_of_captions_does_not_change_the_bytes(tmp_path):
    forward = train_tokenizer(CORPUS, vocab_size=330, out=tmp_path / "f.json")
    backward = train_tokenizer(reversed(CORPUS), vocab_size=330, out=tmp_path / "b.json")
    assert forward.read_bytes() == backward.read_bytes()


def test_a_generator_is_enough_and_folders_are_made(tmp_path):
    out = train_tokenizer((text for text in CORPUS), vocab_size=310, out=tmp_path / "new" / "folder" / "t.json")
    assert out.is_file()
    assert Tokenizer.load(out).vocab_size == 310


def test_many_rare_characters_leave_half_of_the_room_to_merges(tmp_path):
    texts = [
        "".join(map(chr, range(0x4E00, 0x4E00 + 500))),
        *["dog on the beach with many words going around some lovely place"] * 50,
    ]
    model = json.loads(trained(tmp_path, texts, vocab_size=311).file)["model"]
    assert len(model["vocab"]) == 311
    assert len(model["merges"]) >= 20


def test_cased_training_keeps_capital_letters_apart(tmp_path):
    path = train_tokenizer(CORPUS, vocab_size=400, out=tmp_path / "t.json", lowercase=False)
    tokenizer = Tokenizer.load(path, lowercase=False)
    assert tokenizer.ids("A") != tokenizer.ids("a")
    assert tokenizer.decode(tokenizer.ids("A Dog")) == "A Dog"


def test_small_corpus_logs_that_fewer_ids_came_out(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert trained(tmp_path, ["a dog"], vocab_size=5000).vocab_size < 5000
    assert "asked for 5000 ids" in caplog.text


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_corpus_without_text_is_refused_and_writes_nothing(tmp_path, texts):
    with pytest.raises(ValueError, match=r"no caption with text.*check that the shards"):
        train_tokenizer(texts, vocab_size=400, out=tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_too_small_vocabulary_says_how_many_ids_are_needed(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small: 261 special ids .* need 272"):
        train_tokenizer(CORPUS, vocab_size=100, out=tmp_path / "t.json")


def test_coverage_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"character_coverage 99\.95"):
        train_tokenizer(CORPUS, vocab_size=400, out=tmp_path / "t.json", character_coverage=99.95)
