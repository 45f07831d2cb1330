"""N-grams of captions are formed by the published rules, in their order, and categories come out of a file."""

import pytest

from siglip2.annotation.queries import (
    GENERIC_WORDS,
    STOP_WORDS,
    Query,
    categories,
    ngram_queries,
    ngrams,
    read_categories,
)


def test_ngrams_begin_at_each_word_in_turn_and_grow():
    assert list(ngrams("red apple pie")) == ["red", "red apple", "red apple pie", "apple", "apple pie", "pie"]


def test_words_are_lower_case_and_split_at_any_white_space():
    assert list(ngrams("  Red\tAPPLE\n")) == ["red", "red apple", "apple"]


def test_generic_words_are_taken_out_before_ngrams_are_formed():
    assert list(ngrams("Red stock photo apple")) == ["red", "red apple", "apple"]


def test_a_generic_word_with_punctuation_stays_as_published():
    assert list(ngrams("photo, apple", max_words=1)) == ["photo,", "apple"]


def test_ngrams_of_stop_words_alone_are_left_out_but_stop_words_stay_inside():
    assert list(ngrams("the top of the hill", max_words=2)) == ["the top", "top", "top of", "the hill", "hill"]


@pytest.mark.parametrize("caption", ["", "  \n", "of the", "stock photo", "Image of the Background"])
def test_a_caption_of_nothing_to_look_for_gives_no_query(caption):
    assert list(ngrams(caption)) == []


def test_ngrams_have_at_most_ten_words():
    words = [f"w{k}" for k in range(14)]
    found = list(ngrams(" ".join(words)))
    assert max(len(ngram.split()) for ngram in found) == 10
    assert found[:10] == [" ".join(words[:k]) for k in range(1, 11)]
    assert len(found) == 5 * 10 + sum(range(1, 10))
    assert list(ngrams("a b c", max_words=2)) == ["a b", "b", "b c", "c"]  # `a` is a stop word


def test_punctuation_emoji_and_other_scripts_are_kept():
    assert list(ngrams("Émile’s café 🐱!", max_words=1)) == ["émile’s", "café", "🐱!"]
    assert list(ngrams("ÇİĞ köfte", max_words=1)) == ["ÇİĞ".lower(), "köfte"]


def test_a_picture_is_asked_for_the_first_300_different_ngrams():
    captions = {"en": [" ".join(f"w{k}" for k in range(40)), "w0 w1 new"], "": ["last"]}
    found = ngram_queries(captions)
    assert len(found) == len({query.text for query in found}) == 300
    assert [query.text for query in found] == list(ngrams(captions["en"][0]))[:300]


def test_a_text_of_several_captions_is_asked_for_once_in_the_language_that_was_first():
    found = ngram_queries({"en": ["red apple", "apple"], "": ["apple pie"]}, max_words=1)
    assert found == [Query("red", "en"), Query("apple", "en"), Query("pie", "")]


def test_the_word_lists_are_as_long_as_the_published_ones():
    assert len(GENERIC_WORDS) == 61
    assert len(STOP_WORDS) == 127
    assert not GENERIC_WORDS & STOP_WORDS


def test_categories_are_lower_case_unique_and_singular():
    names = ["Cat", "dogs", " traffic  light ", "", "cat", "cats", "Bus", "buses", "glass"]
    assert categories(names) == ("cat", "dogs", "traffic light", "bus", "glass")


def test_categories_are_read_one_per_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffGrüner Apfel\r\n\n猫\n".encode())
    assert read_categories(str(path)) == ("grüner apfel", "猫")


def test_a_file_without_categories_and_one_in_another_encoding_are_errors(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"no category in .*names\.txt; expected one name per line"):
        read_categories(str(path))
    path.write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_categories(str(path))
