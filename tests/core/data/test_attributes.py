"""Fields of samples answer questions by yes or no, or say why they cannot."""

import json

import pytest

from siglip2.core.data.attributes import Attribute, fields_for, read_attributes
from siglip2.core.data.fields import Sample


def asked(question, **stored):
    attribute = Attribute.parse(question)
    return attribute.holds(
        Sample("0", "a.tar", {"json": json.dumps(stored).encode()}, fields_for([attribute], pictures=False))
    )


@pytest.mark.parametrize("value", [1, True, 1.0, "1", "true", "True "])
def test_field_that_says_yes(value):
    assert asked("json.woman", woman=value)


@pytest.mark.parametrize("value", [0, False, 0.0, "0", "false", None])
def test_field_that_says_no_or_is_missing(value):
    assert not asked("json.woman", woman=value)
    assert not asked("json.woman")


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ("a Doctor, at work", True),
        ("doctors", False),
        (["a nurse", "the doctor"], True),
        ({"en": "a nurse", "de": ["der doctor"]}, True),
        (["nurse"], False),
        (3, False),
    ],
)
def test_value_is_looked_for_as_a_whole_word(stored, found):
    assert asked("caption=doctor", caption=stored) is found


def test_value_may_be_a_number():
    assert asked("label=3", label=3)
    assert not asked("label=3", label=13)


@pytest.mark.parametrize("value", [0.7, 2, "maybe", ["1"]])
def test_field_that_is_neither_yes_nor_no_is_refused_with_its_sample(value):
    with pytest.raises(ValueError, match="a.tar: sample '0': json.woman is .*expected 0 or 1.*json.woman=value"):
        asked("json.woman", woman=value)


class Answers:
    """Three samples, the second of which cannot be read."""

    name = "answers"

    def __len__(self):
        return 3

    def shard_sizes(self):
        return [3]

    def read(self, i):
        sample = Sample(str(i), "a.tar", {"json": json.dumps({"woman": i // 2}).encode()}, self.fields)
        if i == 1:
            raise sample.bad("cut")
        return sample


def test_samples_that_cannot_be_read_have_no_answers():
    questions, source = [Attribute("json.woman")], Answers()
    source.fields = fields_for(questions, pictures=False)
    answers, readable = read_attributes(source, questions)
    assert answers.tolist() == [[False], [False], [True]]
    assert readable.tolist() == [True, False, True]


def test_field_that_no_sample_has_is_an_error():
    questions, source = [Attribute("json.woman"), Attribute("json.mann")], Answers()
    source.fields = fields_for(questions, pictures=False)
    with pytest.raises(ValueError, match="no sample of answers has json.mann"):
        read_attributes(source, questions)


@pytest.mark.parametrize("text", ["=a", "a=", "", " =b"])
def test_question_without_field_or_value_is_refused(text):
    with pytest.raises(ValueError, match=f"cannot read '{text}', expected FIELD or FIELD=value"):
        Attribute.parse(text)
