"""Captions are drawn by the shares of their fields and languages."""

import json
from collections import Counter

import numpy as np
import pytest

from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.views import CAPTION, Context, TextView, draw_caption
from siglip2.plugins.locca.sequences import LocCaView
from siglip2.testing import tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER

FIELDS = Fields(caption="json.caption", extra={"synthetic": "json.synthetic", "alt": "json.alt"})
SHARES = {"caption": 0.6, "synthetic": 0.4}


def sample(**stored):
    return Sample("0", "made", {"json": json.dumps(stored).encode()}, FIELDS)


def context(number=0, **more):
    return Context((3, number, 7), PATCHIFIER, PATCHIFIER.layout(0), tiny_tokenizer(), **more)


def drawn(made, count=2000, language=None, **more):
    return Counter(draw_caption(made, context(i, **more), language).text for i in range(count))


def test_each_field_is_drawn_by_its_share():
    counts = drawn(sample(caption="web", synthetic="made", alt="never"), captions=SHARES)
    assert set(counts) == {"web", "made"}
    assert abs(counts["web"] - 1200) < 4 * (2000 * 0.6 * 0.4) ** 0.5


def test_shares_of_the_fields_a_sample_has_count_where_it_lacks_one():
    assert drawn(sample(caption="web"), captions=SHARES) == {"web": 2000}
    counts = drawn(sample(caption="web", alt="alt"), captions={**SHARES, "alt": 0.2})
    assert abs(counts["web"] - 1500) < 4 * (2000 * 0.75 * 0.25) ** 0.5


def test_languages_are_drawn_inside_the_field_that_was_drawn():
    made = sample(caption={"en": "one", "de": "eins"}, synthetic={"de": ["zwei", "drei"], "fr": "un"})
    counts = drawn(made, captions=SHARES, languages={"en": 3.0, "de": 1.0})
    wanted = {"one": 0.6 * 0.75, "eins": 0.6 * 0.25, "zwei": 0.4 * 0.5, "drei": 0.4 * 0.5}
    assert set(counts) == set(wanted)
    for text, share in wanted.items():
        assert abs(counts[text] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


def test_a_field_without_a_caption_in_the_language_is_left_out():
    made = sample(caption={"en": "one"}, synthetic={"de": "zwei"})
    assert drawn(made, 50, "de", captions=SHARES) == {"zwei": 50}
    assert drawn(made, 50, captions=SHARES, languages={"fr": 1.0}) == drawn(made, 50, captions=SHARES)  # each is alone
    with pytest.raises(BadSample, match="no caption in fr in caption, synthetic"):
        draw_caption(made, context(captions=SHARES), "fr")


def test_a_field_that_cannot_be_read_is_noted_and_the_others_are_used():
    made = sample(caption="web", synthetic=7)
    assert drawn(made, 5, captions=SHARES) == {"web": 5}
    assert made.notes == ["the synthetic holds [7], expected a text, a list of texts or language: text"]


def test_a_sample_with_none_of_the_fields_is_bad():
    with pytest.raises(BadSample, match="no caption in caption, synthetic"):
        draw_caption(sample(alt="alt"), context(captions=SHARES))


def test_without_shares_of_fields_the_same_random_numbers_are_spent_as_ever():
    made = sample(caption={"en": ["one", "two"], "de": "eins"}, synthetic="made")
    for i in range(50):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, i, 7))))
        texts = [["eins"], ["one", "two"]][int(rng.choice(2, p=[0.5, 0.5]))]
        here = context(i)
        assert draw_caption(made, here).text == texts[int(rng.integers(len(texts)))]
        assert here.rng.random() == rng.random()


@pytest.mark.parametrize("view", [CAPTION, LocCaView()], ids=["text", "locca"])
def test_view_of_texts_takes_them_from_the_field_that_is_drawn(view):
    made = sample(caption="red disc", synthetic="blue box")
    for name, text in (("caption", "red disc"), ("synthetic", "blue box")):
        ids = view(made, context(captions={name: 1.0}))
        assert text in tiny_tokenizer().decode(ids.flatten()[: ids.shape[-1]])


def test_evaluation_reads_the_field_caption():
    ids = TextView("caption:de", language="de")(sample(caption={"de": "blau"}, synthetic={"de": "rot"}), context())
    assert tiny_tokenizer().decode(ids[0]) == "blau"
