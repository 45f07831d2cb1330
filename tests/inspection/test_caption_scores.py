"""Bits are those of a proper distribution, and of transformers' own loss."""

import itertools
import math

import numpy as np
import pytest

from siglip2.inspection.scoring import UNKNOWN, CausalScorer, NgramScorer, words

TEXTS = ["a cat on a mat", "a dog on a log", "the cat sat", "a cat sat on the dog"]


def test_ngram_probabilities_sum_to_one_after_any_history():
    scorer = NgramScorer(TEXTS)
    vocabulary = [*scorer.vocabulary, UNKNOWN]
    for history in itertools.product([*vocabulary, "<start>"], repeat=2):
        assert math.fsum(scorer.probability(token, history) for token in vocabulary) == pytest.approx(1)


def test_ngram_probability_is_that_of_witten_and_bell_by_hand():
    scorer = NgramScorer(["a b", "a c", "a b"], order=2)
    uniform = 1 / 4  # a, b, c and one unknown
    unigram = (2 + 3 * uniform) / (6 + 3)  # b: 2 of 6 tokens, 3 kinds
    assert scorer.probability("b", ("a",)) == pytest.approx((2 + 2 * unigram) / (3 + 2))
    assert scorer.probability("b", (UNKNOWN,)) == pytest.approx(unigram)


def test_every_token_has_bits_and_unseen_ones_the_most():
    bits = NgramScorer(TEXTS).bits(["a cat on a zebra", ""])
    assert [len(b) for b in bits] == [5, 0]
    assert bits[0].argmax() == 4
    assert (bits[0] > 0).all()


def test_words_fold_case_keep_punctuation_and_part_scripts_without_spaces():
    assert words("A Cat, don't!") == ["a", "cat", ",", "don", "'", "t", "!"]
    assert words("赤い猫 cat") == ["赤", "い", "猫", "cat"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, toy_tokenizer):
    """A folder with a small random GPT-2 and the toy tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(toy_tokenizer), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parity
def test_bits_of_a_causal_model_are_transformers_loss_however_texts_are_batched(language_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["a red disc, number 3", "a blue box", "Kiste in golden, Nummer 11 und noch eine"]
    bits = CausalScorer(language_model, batch_size=2).bits(texts)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    for text, found in zip(texts, bits, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert len(found) == len(ids) - 1
        assert np.mean(found) * math.log(2) == pytest.approx(float(loss), rel=1e-4)


def test_a_missing_scorer_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="causal language model"):
        CausalScorer(tmp_path / "nothing")
