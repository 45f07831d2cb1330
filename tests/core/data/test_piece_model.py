"""A SentencePiece model written as a `tokenizer.json` gives the ids of SentencePiece, or is refused."""

import io
import random
import sys

import pytest
import torch
from tokenizers import Tokenizer as JsonTokenizer

from siglip2.core.data.piece_model import GRAPHEMES, TIES, converted, limits
from siglip2.core.data.text import KNOWN_CONTRACTS, Tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

CORPUS = [
    "a photo of a dog on the beach, <h1>12 birds</h1> & 3 cats",
    "It's a low_res photo.jpg -- 50% off (really?)",
    "ein Hund am Strand, schöne Straße",
    "собака на пляже",
    "ένας σκύλος στην παραλία",
    "浜辺の犬と猫、日本語のキャプション。中文",
    "कुत्ता समुद्र तट पर",
    "كلب على الشاطئ",
    "한국어 텍스트",
] * 4
GEMMA = {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "bos_piece": "<bos>", "pad_id": 0,
    "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
}  # fmt: skip
C4 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}  # T5's
MODELS = {
    "gemma": {
        **GEMMA,
        "user_defined_symbols": ["<mask>", "<h1>", "</h1>", "\n", "\n\n", "▁▁", "▁▁▁", "\t\t", "<MASK>"],
    },
    "gemma without bytes": {**GEMMA, "byte_fallback": False},
    "llama": {**GEMMA, "add_dummy_prefix": True},
    "c4": C4,
    "c4 with extra ids": {**C4, "user_defined_symbols": ["▁<extra_id_0>", "▁<extra_id_10>", "<mask>"]},
    "unigram with bytes": {**C4, "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe with nfkc": {**C4, "model_type": "bpe"},
}
ODD = [
    "", " ", "   ", "a dog", " leading and  double   spaces ", "\ttab\nnewline\n\nreturn\r\n\x00\x07\x7f end\n",
    "A PHOTO of THE Beach: ÉCOLE, СОБАКА", "snake_case, kebab-case & It's 50% off!!! (3.14)", "¿Qué? — “quoted” …",
    "日本語のキャプション。中文，全角ＡＢＣ　①", "한국어 ภาษาไทย हिन्दी", "עברית العربيّة شَدَّة", "🙂 👩🏽‍🚀 🇩🇪 ❤️ 1️⃣ 𝄞 ꙮ",
    "<eos> is spelled <pad> <s></s><unk><0x41><0x0A>", "<mask><h1>x</h1> <MASK> <extra_id_0> a<extra_id_10>b", "▁ ▁▁x▁",
    "aaaaaaaaaaaaaaaaaaa !!!!!!!!!!!! ababababababa", "\u00a0\u200b\ufeff\u3000x\u2028", "very long " * 100, "7" * 300,
]  # fmt: skip
LETTERS = "abcdefghijklm  <>/_s0123456789éßяж日本語한국어🙂👩🚀\t\n\x01\u00a0\u200bﬁ…▁AB.,!?'"


def trained(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, num_threads=1, minloglevel=2,
        **{"vocab_size": 480, "hard_vocab_limit": False, **options},
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def files():
    """Every model, trained once."""
    return {name: trained(**options) for name, options in MODELS.items()}


@pytest.fixture
def load(files, tmp_path):
    """A tokenizer with one of the models."""

    def load(name, **contract):
        (tmp_path / "tokenizer.model").write_bytes(files[name])
        return Tokenizer.load(tmp_path, **contract)

    return load


def random_texts():
    draw = random.Random(0)
    words = [word for text in CORPUS for word in text.split()]
    for _ in range(300):
        yield "".join(draw.choices(LETTERS, k=draw.randrange(40)))
        yield " ".join(draw.choices(words, k=draw.randrange(1, 12)))


CLEANING = {**KNOWN_CONTRACTS, "as it is": {"lowercase": False}}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("cleaning", list(CLEANING))
def test_tokenizer_json_of_a_sentencepiece_model_gives_its_ids_with_the_contract_built_in(load, name, cleaning):
    tokenizer = load(name, **CLEANING[cleaning])
    peer = JsonTokenizer.from_str(tokenizer.to_tokenizer_json())
    peer.encode_special_tokens = True  # which transformers does, told by tokenizer_config.json
    texts = [*ODD, *random_texts()]
    ours = tokenizer.encode(texts).tolist()
    differ = [text for text, ids in zip(texts, ours, strict=True) if peer.encode(text).ids != ids]
    assert differ == []


@pytest.mark.parametrize("name", list(MODELS))
def test_its_ids_become_the_text_that_sentencepiece_makes_of_them(load, name, files):
    tokenizer, peer = load(name), converted(files[name], str)
    for text in ODD[:13]:
        ids = tokenizer.ids(text)
        if tokenizer._vocabulary.backend.unk_id() not in ids:  # which SentencePiece shows as a sign of its own
            assert peer.decode(ids) == tokenizer._vocabulary.text(ids)


def test_literal_names_of_special_pieces_stay_text(files):
    """In a Unigram vocabulary they are pieces like others to tokenizers, and those of bytes have the best score."""
    peer, pieces = converted(files["unigram with bytes"], str), sentencepiece.SentencePieceProcessor()
    pieces.load_from_serialized_proto(files["unigram with bytes"])
    peer.encode_special_tokens = True
    for name in ("<pad>", "</s>", "<unk>", "<0x41>", "<0xFF>", "a</s>b", "<0x0<0x41>"):
        ids = peer.encode(name, add_special_tokens=False).ids
        assert ids == pieces.encode(name)
        assert len(ids) > 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gemma", []), ("llama", []), ("unigram with bytes", [TIES]), ("c4", [TIES, GRAPHEMES])],
)
def test_limits_are_said_where_there_are_any(files, name, expected):
    assert limits(files[name]) == expected


def test_decomposed_hangul_is_such_a_limit_of_normalising_vocabularies_alone(load):
    decomposed = "\u1112\u1161\u11ab"
    for name, same in (("c4", False), ("gemma", True)):
        tokenizer = load(name)
        ids = JsonTokenizer.from_str(tokenizer.to_tokenizer_json()).encode(decomposed).ids
        assert (ids == tokenizer(decomposed).tolist()) == same


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word"}, "its pieces are whole words or characters"),
        ({"model_type": "char"}, "its pieces are whole words or characters"),
        ({**C4, "treat_whitespace_as_suffix": True}, "it marks spaces behind a word"),
        ({**GEMMA, "add_dummy_prefix": True, "user_defined_symbols": ["<mask>"]}, "it has pieces of the user's beside"),
        ({**C4, "remove_extra_whitespaces": False}, r"'tab.* would become other ids"),
    ],
    ids=["word", "char", "suffix", "pieces of the user's", "carriage return"],
)
def test_model_that_cannot_be_converted_exactly_is_refused(options, reason):
    with pytest.raises(ValueError, match=f"cannot be written as a tokenizer.json: {reason}"):
        converted(trained(**options), str)


def edited(file, change):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file)
    change(model)
    return model.SerializeToString()


def rename(old, new):
    def change(model):
        next(p for p in model.pieces if p.piece == old).piece = new

    return change


def unused(model):
    next(p for p in reversed(model.pieces) if p.type == 1).type = 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [(unused, "it has unused pieces"), (rename("z", "ꙮꙮ"), "its piece 'ꙮꙮ' has a letter that is no piece")],
    ids=["unused", "letter"],
)
def test_pieces_that_merges_cannot_reach_are_refused(change, reason):
    file = edited(trained(**GEMMA, required_chars="z"), change)
    with pytest.raises(ValueError, match=reason):
        converted(file, str)


def test_letter_that_is_a_byte_alone_is_still_merged():
    """Gemma has no piece for one tab, but pieces for several."""
    file = edited(trained(**GEMMA), lambda model: setattr(model.pieces[-1], "piece", "\t\t"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file)
    assert pieces.piece_to_id("\t") == pieces.unk_id()
    peer = converted(file, str)
    for text in ("\t", "\t\t", "a\t\t\tb\t", "é\t\t<0x09>"):
        ids = peer.encode(text, add_special_tokens=False).ids
        assert ids == pieces.encode(text)
        assert peer.decode(ids) == text
    assert pieces.piece_to_id("\t\t") in peer.encode("\t\t", add_special_tokens=False).ids


def test_missing_protobuf_is_named_with_the_extra(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    with pytest.raises(ImportError, match=r"'sentencepiece' and 'protobuf'.*siglip2\[hf\]"):
        converted(files["c4"], str)


def test_written_ids_are_padded_and_end_in_eos_as_the_contract_says(load):
    tokenizer = load("c4", length=8, pad_id=1)  # SigLIP 1 pads with its end
    ids = JsonTokenizer.from_str(tokenizer.to_tokenizer_json()).encode("a dog").ids
    assert ids == tokenizer("a dog").tolist()
    assert torch.tensor(ids)[-3:].tolist() == [1, 1, 1]
