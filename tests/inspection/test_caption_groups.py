"""Groups are scored by one model that saw none of the scored captions, and flagged as groups only."""

import math

import numpy as np
import pytest
from gaussian_noise import fractional_noise
from made_up import seeded, sentence

from siglip2.inspection.collect import Facts, Text
from siglip2.inspection.groups import grouped, report_groups


def facts(texts, **more):
    return [
        Facts(f"{i}", "shard", "set", texts=(Text(text, "caption", "en", None),), **more)
        for i, text in enumerate(texts)
    ]


def test_groups_hold_each_text_once_in_an_order_of_their_own():
    texts = [f"caption number {i}" for i in range(50)]
    found = grouped(facts([*texts, *texts, texts[0].upper()]), "field")
    assert sorted(found["caption"]) == sorted(texts)
    assert grouped(facts(texts[::-1]), "field") == grouped(facts(texts), "field")


def test_groups_are_named_by_field_language_script_source_or_value():
    one = facts(["кот"], group="site")
    assert [list(grouped(one, by)) for by in ("field", "language", "script", "source", "json.site")] == [
        ["caption"], ["en"], ["Cyrillic"], ["set"], ["site"],
    ]  # fmt: skip
    assert list(grouped(facts(["x"]), "json.site")) == ["(none)"]


class Known:
    """A scorer that gives the texts of each group bits of a known memory: `a0 17` has row 17 of group `a`."""

    name = "known"

    def __init__(self, **memories):
        self.rows = {key: fractional_noise(600, 48, h, seed=i) + 8 for i, (key, h) in enumerate(memories.items())}

    def bits(self, texts):
        return [self.rows[text.split()[0]][int(text.split()[1])] for text in texts]


def test_only_the_group_with_another_memory_is_flagged():
    groups = {name: [f"{name} {i}" for i in range(600)] for name in ("people", "others", "machine")}
    scorer = Known(people=0.65, others=0.65, machine=0.85)
    report = report_groups(groups, by="field", human=["people"], scorer=scorer)
    assert report.flagged == ("machine",)
    assert [(one.group, one.reference, one.captions) for one in report.comparisons] == [
        ("others", "people", 600),
        ("machine", "people", 600),
    ]


def test_a_group_is_flagged_only_if_it_is_outside_of_every_reference():
    groups = {name: [f"{name} {i}" for i in range(600)] for name in ("people", "poets", "machine")}
    scorer = Known(people=0.65, poets=0.85, machine=0.85)
    report = report_groups(groups, by="field", human=["people", "poets"], scorer=scorer)
    assert report.flagged == ()


def test_other_bits_with_the_same_memory_are_not_flagged():
    class Harder(Known):
        def bits(self, texts):
            return [b + 3 * text.startswith("machine") for b, text in zip(super().bits(texts), texts, strict=True)]

    groups = {name: [f"{name} {i}" for i in range(600)] for name in ("people", "machine")}
    report = report_groups(groups, by="field", human=["people"], scorer=Harder(people=0.65, machine=0.65))
    assert report.comparisons[0].outside == ("mean_bits",)
    assert report.flagged == ()


def test_ngrams_see_none_of_the_captions_that_they_score():
    rng = seeded(0)
    texts = [sentence(rng, 24) for _ in range(1200)]  # words hardly ever repeat: seen captions would cost few bits
    report = report_groups(grouped(facts(texts), "field"), by="field")
    (row,) = report.groups
    assert 450 < row.scored < 750
    assert row.captions == 1200
    assert row.estimates["mean_bits"].value > 10
    assert "held-out captions" in report.scorer


def test_ngrams_tell_formulas_from_independent_words():
    rng = seeded(1)
    people = [sentence(rng, 30, 50) for _ in range(1000)]
    formulas = [
        " and ".join(f"a photo showing a {sentence(rng, 1, 50)} near it" for _ in range(4)) for _ in range(1000)
    ]
    found = {"people": people, "machine": formulas}
    report = report_groups(found, by="field", human=["people"])
    values = {row.name: row.estimates["mean_bits"].value for row in report.groups}
    assert values["machine"] < values["people"] - 2
    assert report.flagged == ("machine",)
    assert repr(report) == repr(report_groups(found, by="field", human=["people"]))  # NaN is not equal to itself


def test_one_caption_or_a_few_are_never_judged():
    report = report_groups(
        {"one": ["a single caption of quite a few words"], "people": ["x"]}, by="field", human=["people"]
    )
    assert [row.estimates for row in report.groups] == [{}, {}]
    assert report.flagged == ()
    assert report.comparisons[0].reason


def test_an_unknown_reference_is_an_error_that_names_the_groups():
    with pytest.raises(ValueError, match=r"no group 'peple'.*'people'"):
        report_groups({"people": ["a"]}, by="field", human=["peple"])


def test_a_group_without_near_steps_has_no_self_similarity_and_is_not_flagged_for_it():
    class Coarse(Known):
        """Every other step is far away from zero."""

        def bits(self, texts):
            return [np.resize([0.0, 10.0, 3.0], 48) + 0 * b for b in super().bits(texts)]

    groups = {name: [f"{name} {i}" for i in range(300)] for name in ("people", "machine")}
    report = report_groups(groups, by="field", human=["people"], scorer=Coarse(people=0.5, machine=0.5))
    assert math.isnan(report.groups[0].estimates["self_similarity"].value)
    assert report.flagged == ()
