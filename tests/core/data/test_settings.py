"""What a source of a mixture does not say is as `data.train` has it."""

import pytest

from siglip2.core.data.fields import Fields
from siglip2.core.data.settings import SourceSet, TrainSet

EN, DE = Fields(caption="json.en"), Fields(caption="json.de")


def test_source_takes_over_what_it_does_not_say_itself():
    common = {"languages": {"en": 1.0}, "captions": {"caption": 1.0}, "cache_dir": "c"}
    whole = TrainSet(
        sources={"en": SourceSet("a", 3), "de": SourceSet("b", 1, fields=DE, window=2, max_bytes=5, weights="fair")},
        fields=EN,
        window=128,
        **common,
    )
    assert whole.parts() == {
        "en": TrainSet("a", fields=EN, window=128, **common),
        "de": TrainSet("b", fields=DE, window=2, max_bytes=5, weights="fair", **common),
    }
    assert whole.source_shares() == {"en": 0.75, "de": 0.25}


def test_one_set_is_one_part_without_a_name_or_a_share():
    alone = TrainSet("a", window=3)
    assert alone.parts() == {"": alone}
    assert alone.source_shares() == {}


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weight_that_is_no_share_is_refused_by_the_name_of_its_source(weight):
    with pytest.raises(ValueError, match=rf"data\.train\.sources\.de\.weight is {weight:g}, expected a share above 0"):
        TrainSet(sources={"en": SourceSet("a", 1), "de": SourceSet("b", weight)}).source_shares()


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        ({"en": -1.0, "de": 2.0}, r"languages\.en is -1, expected a share of 0 or more"),
        ({"en": float("inf")}, r"languages\.en is inf, expected a share of 0 or more"),
        ({"de": 1.0, "en": float("nan")}, r"languages\.en is nan, expected a share of 0 or more"),
        ({"en": 0.0, "de": 0.0}, r"languages has no share above 0"),
    ],
)
def test_languages_that_are_no_shares_are_refused(languages, message):
    with pytest.raises(ValueError, match=rf"data\.train\.{message}"):
        TrainSet("a", languages=languages).parts()
    with pytest.raises(ValueError, match=rf"data\.train\.sources\.web\.{message}"):
        TrainSet(sources={"web": SourceSet("a", 1, languages=languages)}).parts()


def test_language_can_have_the_share_0():
    assert TrainSet("a", languages={"en": 0.0, "de": 1.0}).parts()[""].languages == {"en": 0.0, "de": 1.0}
