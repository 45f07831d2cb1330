"""Regions are read as they are stored, bad ones are noted and left out, and evaluation sees one text with its box."""

import json
import zlib
from collections import Counter

import pytest
import torch

from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.layout import Layout
from siglip2.core.regions import Region, RegionBox, RegionText, regions
from siglip2.core.views import Context, Text, draw_text, shares
from siglip2.testing import TinySource, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER

BOX = [0.1, 0.2, 0.5, 0.6]
GOOD = {"box": BOX, "caption": "a red disc"}


def sample(*entries, key="0000", **meta):
    record = {"regions": list(entries), **meta}
    return Sample(key, "toy", {"json": json.dumps(record).encode()})


def context(*entropy, languages=None):
    return Context(entropy or (0,), PATCHIFIER, Layout(4, 8), tiny_tokenizer(), languages)


def test_a_region_has_its_box_its_texts_by_language_and_its_score():
    captions = {"en": "a red disc", "de": ["eine rote Scheibe", " die Scheibe "], "fr": " "}
    found = regions(sample({"box": BOX, "captions": captions, "score": 0.5, "label": 3}, GOOD))
    both = {"en": ["a red disc"], "de": ["eine rote Scheibe", "die Scheibe"]}
    assert found == [Region(tuple(BOX), both, 0.5), Region(tuple(BOX), {"": ["a red disc"]}, None)]


def test_a_text_may_be_called_caption_or_text():
    found = regions(sample(GOOD, {"box": BOX, "text": ["one", "two"]}))
    assert [r.captions for r in found] == [{"": ["a red disc"]}, {"": ["one", "two"]}]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("a red disc", "bad region: region 1 is 'a red disc', expected a mapping"),
        ({"caption": "x"}, "bad box: region 1 has None, expected four numbers"),
        ({"box": "0 0 1 1", "caption": "x"}, "bad box: region 1 has '0 0 1 1', expected four numbers"),
        ({"box": [0, 0, 1], "caption": "x"}, "bad box: region 1 has [0, 0, 1], expected four numbers"),
        ({"box": [0, 0, 1, "1"], "caption": "x"}, "bad box: region 1 has [0, 0, 1, '1'], expected four numbers"),
        ({"box": [0, 0, 1, True], "caption": "x"}, "bad box: region 1 has [0, 0, 1, True], expected four numbers"),
        ({"box": [0, 0, 1, float("nan")], "caption": "x"}, "bad box: region 1 has [0, 0, 1, nan], expected four"),
        ({"box": [0, 0, float("inf"), 1], "caption": "x"}, "bad box: region 1 has [0, 0, inf, 1], expected four"),
        ({"box": [0.2, 0.4, 1.3, 0.5], "caption": "x"}, "bad box: region 1 has [0.2, 0.4, 1.3, 0.5], expected 0 <="),
        ({"box": [-0.2, 0.4, 0.3, 0.5], "caption": "x"}, "bad box: region 1 has [-0.2, 0.4, 0.3, 0.5], expected 0 <="),
        ({"box": [10, 20, 30, 10**400], "caption": "x"}, "bad box: region 1 has [10, 20, 30, 1000"),
        ({"box": [0.5, 0.2, 0.5, 0.6], "caption": "x"}, "bad box: region 1 has [0.5, 0.2, 0.5, 0.6], expected 0 <="),
        ({"box": [0.1, 0.6, 0.5, 0.2], "caption": "x"}, "bad box: region 1 has [0.1, 0.6, 0.5, 0.2], expected 0 <="),
        ({"box": BOX}, "no region text: region 1 has None, expected a text"),
        ({"box": BOX, "captions": {"en": " ", "de": None}}, "no region text: region 1 has {'en': ' ', 'de': None}"),
        ({"box": BOX, "caption": 7}, "no region text: region 1 has 7, expected a text"),
        ({**GOOD, "score": "high"}, "bad score: region 1 has 'high', expected a number"),
    ],
)
def test_a_bad_region_is_noted_and_the_others_are_used(entry, reason):
    found = sample(GOOD, entry, GOOD)
    assert len(regions(found)) == 2
    assert len(found.notes) == 1
    assert found.notes[0].startswith(reason)
    assert len(found.notes[0]) < 160


def test_a_bad_region_is_noted_once_however_often_it_is_read():
    found = sample({"box": BOX})
    assert regions(found) == regions(found) == []
    assert len(found.notes) == 1


def test_a_box_just_beyond_the_edge_is_cut_at_the_edge():
    found = sample({**GOOD, "box": [-0.0005, 0, 1, 1.0005]}, {**GOOD, "box": [1, 0, 1.0005, 1]})
    assert [r.box for r in regions(found)] == [(0, 0, 1, 1)]
    assert [note.partition(":")[0] for note in found.notes] == ["bad box"]  # nothing of the second is inside


def test_samples_without_regions_have_none_and_need_no_note():
    for found in [Sample("0", "toy", {"txt": b"a caption"}), sample(), Sample("0", "toy", {"json": b"{}"})]:
        assert regions(found) == []
        assert found.notes == []


def test_regions_that_are_no_list_are_noted():
    found = Sample("0", "toy", {"json": json.dumps({"regions": {"box": BOX}}).encode()})
    assert regions(found) == []
    assert found.notes == ["bad regions: found dict, expected a list of mappings"]


def test_low_scores_are_left_out_without_a_note_and_no_score_is_no_low_score():
    found = sample({**GOOD, "score": 0.29}, {**GOOD, "score": 0.3}, {**GOOD, "score": 1}, GOOD)
    assert [r.score for r in regions(found, min_score=0.3)] == [0.3, 1, None]
    assert found.notes == []


TEXTS = {"en": ["one", "two"], "de": ["eins"], "fr": []}


@pytest.mark.parametrize(
    ("languages", "language", "expected"),
    [
        (None, None, {"de": 1.0, "en": 1.0}),
        ({"en": 0.9, "de": 0.1, "it": 1.0}, None, {"de": 0.1, "en": 0.9}),
        ({"en": 1.0}, None, {"en": 1.0}),
        ({"it": 1.0}, None, {}),
        ({"en": 1.0}, "de", {"de": 1.0}),  # asked for by name
        (None, "fr", {}),
    ],
)
def test_languages_are_drawn_by_their_shares(languages, language, expected):
    assert shares(TEXTS, context(languages=languages), language) == expected


def test_a_language_that_is_alone_needs_no_share():
    assert shares({"": ["x"]}, context(languages={"en": 1.0})) == {"": 1.0}


def test_texts_are_drawn_by_share_then_evenly():
    drawn = Counter(draw_text(TEXTS, context(i, languages={"en": 0.75, "de": 0.25})) for i in range(800))
    expected = {Text("en", "one"): 300, Text("en", "two"): 300, Text("de", "eins"): 200}
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[text] - number) < 50 for text, number in expected.items())  # four standard deviations


def test_no_text_is_drawn_where_none_may_be():
    assert draw_text(TEXTS, context(languages={"it": 1.0})) is None


def three_regions(key):
    """Regions 0 and 2 have a German text."""
    texts = [{"en": "zero", "de": "null"}, {"en": "one"}, {"en": "two", "de": "zwei"}]
    boxes = [[0, 0, 0.1 * (i + 1), 1] for i in range(3)]
    return sample(*[{"box": b, "captions": t} for b, t in zip(boxes, texts, strict=True)], key=key)


@pytest.mark.parametrize("key", ["a", "b", "c", "d"])
def test_text_and_box_of_a_language_are_of_one_region_chosen_by_the_key(key):
    number = zlib.crc32(key.encode())
    for language, names in {"en": ["zero", "one", "two"], "de": ["null", "zwei"]}.items():
        ids = RegionText("t", language)(three_regions(key), context())
        box = RegionBox("b", language)(three_regions(key), context(7))
        name = names[number % len(names)]
        assert torch.equal(ids, tiny_tokenizer()(name)[None])
        assert ids.dtype == torch.int32
        right = 0.1 * (1 + ["zero", "one", "two"].index(name) if language == "en" else 1 + 2 * (name == "zwei"))
        torch.testing.assert_close(box, torch.tensor([[0, 0, right, 1]]))


def test_without_a_language_any_region_will_do():
    view = RegionText()(three_regions("a"), context(languages={"de": 1.0, "en": 1.0}))
    assert view.shape == (1, 16)
    assert RegionBox()(TinySource().read(3), context()).shape == (1, 4)


def test_a_region_text_that_the_text_tower_cannot_read_whole_is_noted_once():
    fits, long = "1" * 15, "1" * 16  # a digit is a token; 16 with the end
    for text, notes in ((fits, []), (long, ["region text cut: 16 tokens, the text tower reads 15 and their end"])):
        given = sample({"box": BOX, "caption": text})
        for _ in range(2):
            assert torch.equal(RegionText()(given, context()), tiny_tokenizer()(text)[None])
        assert given.notes == notes


@pytest.mark.parametrize("view", [RegionText("t", "it"), RegionBox("b", "it")])
def test_evaluation_leaves_out_samples_without_a_region_in_the_language(view):
    with pytest.raises(BadSample, match="no region with a box and a text in 'it'"):
        view(three_regions("a"), context())


def test_evaluation_leaves_out_samples_without_regions():
    with pytest.raises(BadSample, match="no region with a box and a text"):
        RegionBox()(sample(), context())
