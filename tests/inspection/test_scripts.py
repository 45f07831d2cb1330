"""Scripts are those of the letters, and normalised texts forget what a copy may change."""

import pytest

from siglip2.inspection.language import normalised, script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "Latin"),
        ("кот на столе, cat", "Cyrillic"),
        ("猫在桌子上", "Han"),
        ("ねこがいる猫", "Hiragana"),
        ("고양이", "Hangul"),
        ("قطة", "Arabic"),
        ("बिल्ली", "Devanagari"),
        ("ＦＵＬＬ width", "Latin"),
        ("42 🙂 !?", "none"),
        ("", "none"),
    ],
)
def test_script_is_that_of_most_letters(text, expected):
    assert script(text) == expected


def test_normalised_forgets_capitals_punctuation_and_spaces():
    assert normalised("  A Cat --  on\tthe MAT! ") == normalised("a cat on the mat") == "a cat on the mat"
    assert normalised("ｆｕｌｌ Straße") == normalised("full STRASSE")


def test_normalised_keeps_different_texts_apart():
    assert normalised("a cat") != normalised("a cut")
    assert normalised("बिल्ली") != normalised("बेल्ली")  # vowel signs are marks, and count
    assert normalised("!!") != normalised("??")
    assert normalised("size 3") != normalised("size 4")
