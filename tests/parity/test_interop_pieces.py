"""Exports of weights whose tokenizer is a SentencePiece model give its ids to transformers and open_clip."""

import io

import open_clip
import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

from siglip2.core.data.piece_model import TIES
from siglip2.core.data.text import KNOWN_CONTRACTS, Tokenizer
from siglip2.core.interop.contracts import same_vocabulary
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import write
from siglip2.core.interop.parity import SAMPLES
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers

sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.parity
GEMMA = {
    "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity", "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>",
    "eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "\n", "▁▁", "<h1>"],
}  # fmt: skip
C4 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
TEXTS = [*SAMPLES, "<H1>x</H1> </s> <0x41>", "a\nb\tc\x00", "   ", "ﬁne № ½ …"]


@pytest.fixture
def make_weights(tmp_path):
    """Random weights with a SentencePiece model that is trained here."""

    def make(model, *, native=False, **contract):
        trained = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SAMPLES * 3), model_writer=trained, num_threads=1, minloglevel=2,
            **{"vocab_size": 420, "hard_vocab_limit": False, **model},
        )  # fmt: skip
        (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.model", **contract)
        narrow, length = ShapeOptions(width=32, depth=1, mlp_dim=32, num_heads=2), tokenizer.contract.length
        sizes = {"vocab_size": tokenizer.vocab_size, "context_length": length}
        towers = build_two_towers("tiny/16", patch_size=16, grid=(4, 4), vision=narrow, text=narrow, **sizes)
        state = {name: tensor.detach() for name, tensor in towers.state_dict().items()}
        about = {"heads": {"vision": 2, "text": 2}, "native": native, "tokenizer": tokenizer}
        about["pixels"] = native_pixels(16, 4) if native else square_pixels(64, 16, filter="bilinear")
        return assemble("siglip2", state, place="test", **about)

    return make


def differing(weights, ids):
    """The texts of which a library makes other ids."""
    ours = weights.tokenizer.encode(TEXTS)
    return [text for text, one, other in zip(TEXTS, ours, ids, strict=True) if not torch.equal(one, other.int())]


@pytest.mark.parametrize(
    ("model", "native", "contract"),
    [
        (GEMMA, False, KNOWN_CONTRACTS["hf"]),
        (GEMMA, False, KNOWN_CONTRACTS["big_vision"]),
        (GEMMA, True, KNOWN_CONTRACTS["hf"]),
        (C4, False, {**KNOWN_CONTRACTS["open_clip"], "length": 16, "pad_id": 1}),
        (C4, False, {"lowercase": False}),
    ],
    ids=["gemma", "gemma, A to Z", "gemma, naflex", "SigLIP 1", "as it is"],
)
def test_processor_of_an_export_gives_the_ids_of_the_sentencepiece_model(
    make_weights, model, native, contract, tmp_path
):
    weights = make_weights(model, native=native, **contract)
    written = write(weights, "hf", tmp_path / "out")
    assert written.parity.other_ids == 0
    processor = AutoProcessor.from_pretrained(written.folder)
    assert differing(weights, processor(text=TEXTS, return_tensors="pt")["input_ids"]) == []
    again = read_weights(str(written.folder))
    assert again.tokenizer.contract == weights.tokenizer.contract
    assert same_vocabulary(again.tokenizer, weights.tokenizer)
    assert same_vocabulary(weights.tokenizer, again.tokenizer)
    assert differing(weights, again.tokenizer.encode(TEXTS)) == []


def test_another_sentencepiece_model_is_another_vocabulary(make_weights, tmp_path):
    one = make_weights(C4)
    folder = write(one, "hf", tmp_path / "out", check=False).folder
    other = make_weights({**C4, "user_defined_symbols": ["<x>"]})
    assert not same_vocabulary(read_weights(str(folder)).tokenizer, other.tokenizer)
    assert same_vocabulary(one.tokenizer, one.tokenizer)


def test_tokenizer_of_open_clip_gives_these_ids(make_weights, tmp_path):
    weights = make_weights(C4, **KNOWN_CONTRACTS["open_clip"])
    folder = write(weights, "open_clip", tmp_path / "out", check=False).folder
    differ = differing(weights, open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))
    assert differ == ["a\nb\tc\x00"]  # ftfy drops the last of them


def test_naflex_export_says_that_transformers_has_another_tokenizer_class_for_it(make_weights, tmp_path):
    weights = make_weights(C4, native=True)
    written = write(weights, "hf", tmp_path / "out")
    assert any("AutoTokenizer and AutoProcessor will give other ids" in note for note in written.notes)
    assert TIES in written.notes
    assert written.parity.other_ids > 0
    fast = PreTrainedTokenizerFast.from_pretrained(written.folder)
    ids = fast(TEXTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    assert differing(weights, ids) == []
    plain = write(make_weights(GEMMA, native=True), "hf", tmp_path / "plain", check=False)
    assert not any("other ids" in note for note in plain.notes)


def test_model_that_cannot_be_converted_is_copied_and_the_note_says_why(make_weights, tmp_path):
    weights = make_weights({**C4, "model_type": "word", "vocab_size": 30})
    written = write(weights, "hf", tmp_path / "out")
    assert any("its pieces are whole words or characters; it was copied as tokenizer.model" in n for n in written.notes)
    assert not (written.folder / "tokenizer.json").exists()
    assert written.parity.other_ids is None
    again = read_weights(str(written.folder))
    assert again.tokenizer.file == weights.tokenizer.file
    assert again.tokenizer.contract == weights.tokenizer.contract
