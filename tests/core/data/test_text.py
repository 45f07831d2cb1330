"""The ids of a caption: against transformers, sentencepiece and open_clip, pickled and in checkpoints."""

import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from siglip2.core.data.text import KNOWN_CONTRACTS, TextContract, Tokenizer, canonicalize_text
from siglip2.core.data.train_tokenizer import train_tokenizer

CORPUS = [
    "a photo of a dog on the beach",
    "two dogs, 3 cats & 12 birds",
    "ein Hund am Strand, schöne Straße",
    "собака на пляже",
    "ένας σκύλος στην παραλία",
    "浜辺の犬と猫",
    "कुत्ता समुद्र तट पर",
    "كلب على الشاطئ",
] * 4
CAPTIONS = [
    "a dog on the beach",
    "",
    " leading and  double spaces ",
    "A PHOTO of THE Beach",
    "СОБАКА НА ПЛЯЖЕ, ÉCOLE STRASSE İSTANBUL",
    "浜辺の犬 on ٣ beaches, 2024-10-31",
    "emoji 🐶🏖️, unseen 𝄞 ꙮ and\ttab\nnewline",
    "low_res_photo.jpg <b>bold</b> <0x41> ▁",
    "мир и собака 浜辺の犬 कुत्ता כלב dog " * 40,
]
PUNCTUATION = [
    "Hello, World!",
    "a_b__c.jpg",
    "  (it's)  50% off -- now\t\n",
    "¿Qué? — “quoted”",
    "!!!",
    "",
    "ΟΔΟΣ İ",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(CORPUS, vocab_size=600, out=tmp_path_factory.mktemp("json") / "tokenizer.json")


@pytest.fixture(scope="module")
def cased_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cased") / "tokenizer.json"
    return train_tokenizer(CORPUS, vocab_size=600, out=out, lowercase=False)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model like Gemma's: BPE, bytes, no prefix, no normalisation, the same special ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=450, model_type="bpe",
        byte_fallback=True, split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
        eos_piece="<eos>", bos_piece="<bos>", user_defined_symbols=["<mask>"], num_threads=1, minloglevel=2,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    out.write_bytes(model.getvalue())
    return out


def hf_ids(hf_tokenizer, captions: list[str]) -> torch.Tensor:
    batch = hf_tokenizer(captions, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    return batch["input_ids"].to(torch.int32)


def caption_of(tokenizer: Tokenizer, num_ids: int) -> str:
    """A caption of exactly so many ids: digits are single pieces in every vocabulary here."""
    caption = "7" * num_ids
    assert len(tokenizer.ids(caption)) == num_ids
    return caption


def through_torch_save(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("num_ids", [0, 1, 62, 63, 64, 65, 500])
def test_captions_of_every_length_equal_transformers_with_eos_and_right_padding(path, tokenizer, num_ids):
    transformers = pytest.importorskip("transformers")
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        eos_token="<eos>",
        add_eos_token=True,
        padding_side="right",
    )
    hf.update_post_processor()
    caption = caption_of(tokenizer, num_ids)
    torch.testing.assert_close(tokenizer.encode([caption]), hf_ids(hf, [caption]), rtol=0, atol=0)


def test_multilingual_captions_equal_the_gemma_tokenizer_of_googles_conversion(path, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = json.loads(path.read_text())["model"]
    gemma = transformers.GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    lowered = [caption.lower() for caption in CAPTIONS]
    torch.testing.assert_close(tokenizer.encode(CAPTIONS), hf_ids(gemma, lowered), rtol=0, atol=0)


def test_multilingual_captions_equal_siglip2_tokenizer_with_the_contract_set(path, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = json.loads(path.read_text())["model"]
    siglip2 = transformers.Siglip2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    torch.testing.assert_close(tokenizer.encode(CAPTIONS), hf_ids(siglip2, CAPTIONS), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"canonicalize": True}, {"bos": True, "length": 16}], ids=str)
def test_written_tokenizer_json_gives_the_same_ids_without_knowing_the_contract(path, options):
    from tokenizers import Tokenizer as JsonTokenizer

    tokenizer = Tokenizer.load(path, **options)
    peer = JsonTokenizer.from_str(tokenizer.to_tokenizer_json())
    expected = [peer.encode(caption).ids for caption in CAPTIONS]
    assert tokenizer.encode(CAPTIONS).tolist() == expected


def test_written_tokenizer_json_lowercases_ascii_only_if_the_contract_does(cased_path):
    from tokenizers import Tokenizer as JsonTokenizer

    tokenizer = Tokenizer.load(cased_path, **KNOWN_CONTRACTS["big_vision"])
    peer = JsonTokenizer.from_str(tokenizer.to_tokenizer_json())
    assert tokenizer.encode(CAPTIONS).tolist() == [peer.encode(caption).ids for caption in CAPTIONS]


def test_the_same_file_read_back_by_transformers_from_a_folder_gives_the_same_ids(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_tokenizer_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "right"}))
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(tokenizer.encode(CAPTIONS), hf_ids(hf, CAPTIONS), rtol=0, atol=0)


def test_eos_is_sticky_at_the_last_position_of_a_long_caption(tokenizer):
    ids = tokenizer(caption_of(tokenizer, 500))
    assert ids[63] == 1
    assert (ids[:63] > 1).all()


def test_short_caption_is_ids_then_eos_then_pads(tokenizer):
    plain = tokenizer.ids("a dog")
    assert tokenizer("a dog").tolist() == plain + [1] + [0] * (63 - len(plain))


def test_ids_are_int32_of_the_contracts_shape(tokenizer):
    assert tokenizer("a dog").dtype == torch.int32
    assert tokenizer("a dog").shape == (64,)
    assert tokenizer.encode(CAPTIONS).shape == (len(CAPTIONS), 64)
    assert tokenizer.encode([]).dtype == torch.int32
    assert tokenizer.encode([]).shape == (0, 64)


def test_one_caption_and_a_batch_give_the_same_ids(tokenizer):
    torch.testing.assert_close(tokenizer.encode(CAPTIONS), torch.stack([tokenizer(c) for c in CAPTIONS]))


def test_padding_truncation_and_template_inside_the_file_are_ignored(tmp_path, tokenizer):
    """`to_tokenizer_json` writes a file that pads, cuts and ends by itself, here to 8 ids and with a BOS."""
    loud = Tokenizer(tokenizer.file, dataclasses.replace(tokenizer.contract, length=8, bos=True))
    (tmp_path / "tokenizer.json").write_text(loud.to_tokenizer_json(), encoding="utf-8")
    reloaded = Tokenizer.load(tmp_path)
    torch.testing.assert_close(reloaded.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_caption_that_spells_a_special_token_neither_ends_nor_pads(tokenizer):
    plain = tokenizer.ids("a <eos> and <pad> and <bos> dog")
    assert not {0, 1, 2, 3} & set(plain)
    assert tokenizer.decode(plain) == "a <eos> and <pad> and <bos> dog"


def test_lone_surrogate_in_a_caption_does_not_raise(tokenizer):
    assert tokenizer("dog \ud83d").shape == (64,)


def test_bos_comes_first_and_long_captions_still_end_in_eos(path):
    ids = Tokenizer.load(path, bos=True)("7" * 500)
    assert (ids[0], ids[63]) == (2, 1)


def test_decode_returns_the_lowercased_caption_of_every_script(tokenizer):
    short = [caption for caption in CAPTIONS if len(tokenizer.ids(caption)) < 64 and "▁" not in caption]
    assert len(short) >= 4
    assert [tokenizer.decode(tokenizer(caption)) for caption in short] == [caption.lower() for caption in short]


@pytest.mark.parametrize("text", PUNCTUATION + CAPTIONS, ids=range(len(PUNCTUATION + CAPTIONS)))
def test_canonicalize_equals_open_clip(text):
    open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")
    assert canonicalize_text(text) == open_clip_tokenizer.canonicalize_text(text)


@pytest.mark.parametrize("text", PUNCTUATION[:3] + CAPTIONS[:3])
def test_canonical_contract_equals_the_clean_of_open_clips_siglip2_configs(text):
    open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")
    contract = TextContract(**KNOWN_CONTRACTS["open_clip"])
    assert contract.clean(text) == open_clip_tokenizer.get_clean_fn("canonicalize")(text)


def test_canonical_contract_ignores_punctuation(path):
    canonical = Tokenizer.load(path, canonicalize=True)
    assert canonical("A_dog, (on) the beach!").tolist() == canonical("a dog on the beach").tolist()


def test_text_that_a_program_reads_again_keeps_its_punctuation_and_spaces(cased_path):
    for options in KNOWN_CONTRACTS.values():
        tokenizer = Tokenizer.load(cased_path, **options)
        assert tokenizer.decode(tokenizer.ids(" Box_1 : [1,  2] ", keep_punctuation=True)) == " box_1 : [1,  2] "


def test_text_that_a_program_reads_again_keeps_its_case_where_captions_do(cased_path):
    tokenizer = Tokenizer.load(cased_path, lowercase=False)
    assert tokenizer.decode(tokenizer.ids("Box [1]", keep_punctuation=True)) == "Box [1]"


def test_big_vision_contract_lowercases_ascii_letters_alone():
    """tf.strings.lower without an encoding: `bytes.lower` is the same map, on UTF-8."""
    contract = TextContract(**KNOWN_CONTRACTS["big_vision"])
    for caption in CAPTIONS:
        assert contract.clean(caption).encode() == caption.encode().lower()


def test_pickle_of_a_tokenizer_gives_the_same_ids(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.contract == tokenizer.contract
    torch.testing.assert_close(copy.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_loader_workers_started_by_spawn_give_the_same_ids(tokenizer):
    loader = torch.utils.data.DataLoader(
        CAPTIONS, batch_size=3, collate_fn=tokenizer.encode, num_workers=1, multiprocessing_context="spawn"
    )
    torch.testing.assert_close(torch.cat(list(loader)), tokenizer.encode(CAPTIONS))


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_checkpoint_with_weights_only_holds_the_whole_tokenizer(request, tmp_path, kind):
    original = Tokenizer.load(request.getfixturevalue("path" if kind == "json" else "spm_path"), length=20)
    copy = Tokenizer.from_state(through_torch_save(original.to_state()))
    torch.testing.assert_close(copy.encode(CAPTIONS), original.encode(CAPTIONS))
    assert (copy.fingerprint(), copy.differences(original)) == (original.fingerprint(), [])


def test_sentencepiece_model_equals_the_sentencepiece_library(spm_path):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    tokenizer = Tokenizer.load(spm_path)
    for caption, ids in zip(CAPTIONS, tokenizer.encode(CAPTIONS).tolist(), strict=True):
        expected = library.encode(caption.lower(), add_eos=True)
        if len(expected) > 64:
            expected = expected[:63] + expected[-1:]
        assert ids == expected + [0] * (64 - len(expected))


def test_sentencepiece_model_reads_its_own_ids_and_size(spm_path):
    contract = Tokenizer.load(spm_path.parent).contract
    assert (contract.pad_id, contract.eos_id, contract.bos_id, contract.vocab_size) == (0, 1, 2, 450)


def test_sentencepiece_tokenizer_survives_pickle_and_decodes(spm_path):
    tokenizer = pickle.loads(pickle.dumps(Tokenizer.load(spm_path)))
    assert tokenizer.decode(tokenizer("A Dog 🐶 12")) == "a dog 🐶 12"


def test_without_sentencepiece_the_error_names_the_package(spm_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        Tokenizer.load(spm_path)


def test_fingerprint_changes_with_the_file_and_with_each_contract_field(path, cased_path, tokenizer):
    changes = [{"length": 32}, {"canonicalize": True}, {"bos": True}, {"pad_id": 4}, {"vocab_size": 700}]
    others = [Tokenizer(tokenizer.file, dataclasses.replace(tokenizer.contract, **change)) for change in changes]
    prints = {other.fingerprint() for other in [tokenizer, Tokenizer.load(cased_path), *others]}
    assert len(prints) == len(changes) + 2
    assert Tokenizer.load(path).fingerprint() == tokenizer.fingerprint()


def test_differences_name_the_field_and_both_values(cased_path, tokenizer):
    other = Tokenizer.load(cased_path, length=32)
    lines = tokenizer.differences(other)
    assert lines[0].startswith("tokenizer file: sha256 ")
    assert "length: 64 here, 32 there" in lines


def test_contract_survives_its_dictionary():
    contract = TextContract(length=16, canonicalize=True, bos=True, bos_id=2)
    assert TextContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_contract_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="unknown fields \\['stem'\\]"):
        TextContract.from_dict({"length": 64, "stem": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "no room for a caption"),
        ({"padding_side": "left"}, "padding on the 'right'"),
        ({"bos": True}, "vocabulary has no BOS"),
        ({"eos_id": 300_000}, "eos_id 300000 is outside of the vocabulary of 256000"),
        ({"pad_id": -1}, "pad_id -1 is outside"),
    ],
)
def test_impossible_contract_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        TextContract(**options)


def test_missing_file_names_the_path_and_the_next_move(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nope\.json.*siglip2 tokenizer train --out"):
        Tokenizer.load(tmp_path / "nope.json")


def test_folder_without_a_tokenizer_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of tokenizer\.json, tokenizer\.model.*Gemma's tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b'{"add_bos_token": false}', b"\x00\xff not a model", b""])
def test_file_that_is_no_tokenizer_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece")
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json: neither a Hugging Face tokenizer\.json nor a SentencePiece"):
        Tokenizer.load(tmp_path / "other.json")


def test_tokenizer_without_eos_asks_for_eos_id_and_then_takes_it(tmp_path, path):
    content = json.loads(path.read_text())
    renamed = path.read_text().replace('"<eos>"', '"<stop>"')
    assert len(content["added_tokens"]) == 5
    (tmp_path / "tokenizer.json").write_text(renamed, encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of <eos>, </s>.*eos_id=\.\.\."):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path, eos_id=1)("a dog").tolist() == Tokenizer.load(path)("a dog").tolist()


def test_keeping_case_with_a_file_that_lowercases_is_refused(path):
    with pytest.raises(ValueError, match="lowercases by itself"):
        Tokenizer.load(path, lowercase=False)


def test_file_larger_than_the_contracts_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text contract 100"):
        Tokenizer(tokenizer.file, dataclasses.replace(tokenizer.contract, vocab_size=100))


def test_one_string_instead_of_a_list_is_refused(tokenizer):
    with pytest.raises(TypeError, match="expected a list of captions"):
        tokenizer.encode("a dog")


def test_importing_text_imports_neither_sentencepiece_nor_transformers():
    code = (
        "import sys, siglip2.core.data.text as _; "
        "print(sorted({'sentencepiece', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
