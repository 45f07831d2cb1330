"""What the decoder learns to write: each task's text, which of its tokens count, and what is left out."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from siglip2.core.data.fields import BadSample, Sample
from siglip2.core.data.text import Tokenizer
from siglip2.core.layout import Layout
from siglip2.core.views import Context
from siglip2.plugins.locca.sequences import ORDERS, BoxText, CoinView, LocCaView, Prefixes, Prompts
from siglip2.testing import TinySource, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER

BOX = (0.125, 0.25, 0.5, 0.75)
EDGES = {0.125: 62, 0.25: 125, 0.5: 250, 0.75: 375}  # of 500; 62.5 goes to the even neighbour, as numpy rounds
LONG = " ".join(["a red disc"] * 40)


def sample(caption="a red disc", regions=(), key="0000"):
    return Sample(key, "toy", {"json": json.dumps({"caption": caption, "regions": list(regions)}).encode()})


def region(text="gold box", box=BOX, **more):
    return {"box": list(box), "caption": text, **more}


def context(*entropy, languages=None, tokenizer=None):
    return Context(entropy or (0,), PATCHIFIER, Layout(4, 8), tokenizer or tiny_tokenizer(), languages)


def written(view, tokenizer=None):
    """What each task says: (all of its text, the text that counts in the loss, EOS where it is read)."""
    tokenizer = tokenizer or tiny_tokenizer()
    eos = tokenizer.contract.eos_id
    rows = []
    for ids, counts in view.tolist():
        counted = [i for i, c in zip(ids, counts, strict=True) if c]
        rows.append((tokenizer.decode(ids), tokenizer.decode(counted), counted[-1:] == [eos]))
    return rows


def test_three_tasks_are_text_after_a_prefix_that_does_not_count():
    view = LocCaView()(sample(regions=[region()]), context())
    assert view.shape == (3, 2, 64)
    assert view.dtype == torch.int32
    assert written(view) == [
        ("cap: a red disc", "a red disc", True),
        ("aref: gold box : [62, 125, 250, 375]", "gold box : [62, 125, 250, 375]", True),
        ("gcap: [62, 125, 250, 375] : gold box", "[62, 125, 250, 375] : gold box", True),
    ]


@pytest.mark.parametrize("template", ["[{}, {}, {}, {}]", "{},{},{},{}", "{} {} {} {}", "<{}>-<{}>-<{}>-<{}>"])
def test_where_captions_lose_their_punctuation_tasks_and_boxes_keep_theirs(template):
    tokenizer = tiny_tokenizer()
    canonical = Tokenizer(tokenizer.file, dataclasses.replace(tokenizer.contract, canonicalize=True))
    boxes = BoxText(template=template)
    prompts = Prompts(Prefixes(caption="Cap (zh-Hans): "), boxes)
    given = sample("A red_disc!", [region("Gold: [box], 2")])
    view = LocCaView(prompts=prompts)(given, context(tokenizer=canonical))
    box = boxes.write(BOX)
    assert written(view, canonical) == [
        ("cap (zh-hans): a red disc", "a red disc", True),
        (f"aref: gold box 2 : {box}", f"gold box 2 : {box}", True),
        (f"gcap: {box} : gold box 2", f"{box} : gold box 2", True),
    ]
    assert boxes.read(canonical.decode(view[1, 0])) == boxes.read(box) == (62 / 500, 0.25, 0.5, 0.75)


def test_padding_follows_the_one_eos_and_does_not_count():
    tokenizer = tiny_tokenizer()
    other = Tokenizer(tokenizer.file, dataclasses.replace(tokenizer.contract, pad_id=3))
    for ids, counts in LocCaView()(sample(regions=[region()]), context(tokenizer=other)).tolist():
        end = ids.index(tokenizer.contract.eos_id)
        assert set(ids[end + 1 :]) == {3}
        assert set(counts[end + 1 :]) == {0}
        start = counts.index(1)
        assert counts[:start] == [0] * start
        assert all(counts[start : end + 1])


def test_a_prefix_is_the_same_tokens_before_every_text():
    prefix = tiny_tokenizer().ids("cap: ")
    for caption in ["a red disc", "[1, 2]", ": x", "Scheibe"]:
        assert LocCaView()(sample(caption), context())[0, 0, : len(prefix)].tolist() == prefix


def test_a_prefix_may_name_the_language_of_its_text():
    captions = {"en": "a red disc", "de": "rote Scheibe"}
    prompts = Prompts(Prefixes("cap {language}: ", "find ({language}) ", "{language}: "))
    box = {"box": list(BOX), "captions": {"de": "goldene Kiste"}}
    view = LocCaView(prompts=prompts)(sample(captions, [box]), context(languages={"de": 1.0}))
    assert [text for text, _, _ in written(view)] == [
        "cap de: rote scheibe",
        "find (de) goldene kiste : [62, 125, 250, 375]",
        "de: [62, 125, 250, 375] : goldene kiste",
    ]


def test_captions_and_region_texts_follow_the_shares_of_the_languages():
    drawn = Counter()
    for i in range(200):
        view = LocCaView()(TinySource().read(2), context(i, languages={"en": 0.8, "de": 0.2}))
        drawn.update(("en" if "blue" in text else "de") for text, _, _ in written(view))
    assert drawn.total() == 600
    assert 400 < drawn["en"] < 540  # 480, a standard deviation is 10


@pytest.mark.parametrize("regions", [[], [{"box": list(BOX)}], [region(box=(0.2, 0.4, 1.3, 0.5))], [region(score=0.1)]])
def test_without_a_usable_region_only_the_caption_counts(regions):
    view = LocCaView()(sample(regions=regions), context())
    assert written(view)[0] == ("cap: a red disc", "a red disc", True)
    assert not view[1:].any()  # flags 0, ids the pad id 0


def test_bad_regions_are_noted_not_raised():
    given = sample(regions=[region(), region(box=(0.2, 0.4, 1.3, 0.5)), {"box": list(BOX)}, 7])
    view = LocCaView()(given, context())
    assert view[:, 1].any(dim=1).all()  # the first is good
    assert [note.partition(":")[0] for note in given.notes] == ["bad box", "no region text", "bad region"]


@pytest.mark.parametrize("caption", ["", "  ", [], {"en": ""}])
def test_an_empty_caption_is_a_bad_sample(caption):
    with pytest.raises(BadSample, match="caption"):
        LocCaView()(sample(caption, [region()]), context())


def test_a_caption_in_no_wanted_language_is_a_bad_sample():
    with pytest.raises(BadSample, match="no caption in .*it has .*'de', 'en'"):
        LocCaView()(TinySource().read(0), context(languages={"it": 1.0}))


def test_regions_in_no_wanted_language_are_not_used():
    box = {"box": list(BOX), "captions": {"de": "Kiste", "fr": "boîte"}}
    given = sample("a red disc", [box])
    assert not LocCaView()(given, context(languages={"en": 1.0}))[1:].any()
    assert given.notes == []


def test_a_long_caption_keeps_its_beginning_and_its_eos_and_is_noted():
    given = sample(LONG)
    ids, counts = LocCaView()(given, context())[0].tolist()
    tokenizer = tiny_tokenizer()
    whole = tokenizer.ids("cap: ") + tokenizer.ids(LONG)
    assert ids == [*whole[:63], tokenizer.contract.eos_id]
    assert counts[-1] == 1
    assert given.notes == [f"caption cut for the decoder: {len(whole) + 1} tokens, expected at most 64"]


def test_a_caption_that_just_fits_is_not_noted():
    tokenizer, given = tiny_tokenizer(), sample("a red disc")
    length = len(tokenizer.ids("cap: ") + tokenizer.ids("a red disc")) + 1
    assert written(LocCaView(length)(given, context()))[0] == ("cap: a red disc", "a red disc", True)
    assert given.notes == []
    LocCaView(length - 1)(given, context())
    assert given.notes == [f"caption cut for the decoder: {length} tokens, expected at most {length - 1}"]


def test_a_region_text_that_would_cut_its_box_is_not_used_for_referring_but_cut_for_grounding():
    given = sample(regions=[region(LONG)])
    view = LocCaView()(given, context())
    assert not view[1].any()
    text, counted, ends = written(view)[2]
    assert text.startswith("gcap: [62, 125, 250, 375] : a red disc a red")
    assert counted == text.removeprefix("gcap: ")
    assert ends
    kinds = [note.partition(":")[0] for note in given.notes]
    assert kinds == ["region text too long", "region text cut for the decoder"]


def test_half_a_box_is_never_learned():
    given = sample(regions=[region()])
    for length in range(10, 40):
        view = LocCaView(length)(given, context())
        refer, ground = (text for text, _, _ in written(view)[1:])
        assert refer in ("", "aref: gold box : [62, 125, 250, 375]")
        assert ground == "" or ground.startswith("gcap: [62, 125, 250, 375] : g")
    assert any(note.startswith("box too long: ") for note in given.notes)


def test_a_prefix_without_room_for_a_text_is_an_error():
    with pytest.raises(ValueError, match="prefix 'cap: ' takes .* of the decoder's 4 tokens .*raise `length`"):
        LocCaView(4)(sample(), context())


def test_regions_are_drawn_evenly_and_independently_for_each_task():
    given = sample(regions=[region("one"), region("two"), region("three", score=0.2)])
    pairs = Counter()
    for i in range(200):
        _, refer, ground = (text for text, _, _ in written(LocCaView()(given, context(i))))
        pairs[refer.split()[1], ground.split()[-1]] += 1
    assert set(pairs) == {(a, b) for a in ("one", "two") for b in ("one", "two")}
    assert all(25 < number < 75 for number in pairs.values())  # 50, a standard deviation is 6


@pytest.mark.parametrize(
    ("order", "edges"),
    [
        ("xyxy", (0.125, 0.25, 0.5, 0.75)),
        ("yxyx", (0.25, 0.125, 0.75, 0.5)),
        ("left-bottom-right-top", (0.125, 0.75, 0.5, 0.25)),
    ],
)
def test_a_box_is_written_in_its_order_and_read_back(order, edges):
    boxes = BoxText(order=order)
    text = boxes.write(BOX)
    assert text == f"[{', '.join(str(EDGES[edge]) for edge in edges)}]"
    assert boxes.read(text) == (62 / 500, 0.25, 0.5, 0.75)


def test_every_order_is_tested_and_whole():
    assert set(ORDERS) == {"xyxy", "yxyx", "left-bottom-right-top"}
    assert all(sorted(order) == [0, 1, 2, 3] for order in ORDERS.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bins", [500, 1000, 37])
def test_a_box_read_back_is_off_by_at_most_half_a_bin(order, bins):
    boxes = BoxText(bins, order)
    for box in torch.rand(100, 2, 2, generator=torch.Generator().manual_seed(0)).double().sort(dim=1).values:
        given = torch.stack([box[0], box[1]]).flatten()  # xmin, ymin, xmax, ymax
        given[2:] = (given[2:] + 0.1).clamp(max=1)
        read = boxes.read("box 7 : " + boxes.write(tuple(given.tolist())))
        assert (torch.tensor(read) - given).abs().max() <= 0.5 / bins + 1e-6


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.0004, (0, 1)),
        (0.0, 0.0, (0, 1)),
        (0.0002, 0.0004, (0, 1)),
        (0.0012, 0.0018, (0, 1)),  # 0.6 and 0.9 bins
        (0.1996, 0.2004, (99, 101)),  # 99.8 and 100.2 bins
        (0.2, 0.2004, (100, 101)),
        (0.1996, 0.2, (99, 100)),
        (0.2, 0.2, (100, 101)),
        (0.9996, 1.0, (499, 500)),
        (0.9996, 0.9998, (499, 500)),
        (1.0, 1.0, (499, 500)),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_box_thinner_than_a_bin_is_written_outwards_and_can_be_read(order, low, high, expected):
    boxes = BoxText(order=order)
    first, last = (number / 500 for number in expected)
    assert boxes.read(boxes.write((low, 0.25, high, 0.75))) == (first, 0.25, last, 0.75)
    assert boxes.read(boxes.write((0.25, low, 0.75, high))) == (0.25, first, 0.75, last)


@pytest.mark.parametrize("bins", [1, 2, 37, 500])
def test_every_box_with_an_area_can_be_read(bins):
    for box in torch.rand(300, 2, 2, generator=torch.Generator().manual_seed(0)).double():
        (xmin, ymin), (width, height) = box[0].tolist(), (10 ** (-6 * box[1])).tolist()
        given = (xmin, ymin, min(xmin + width, 1.0), min(ymin + height, 1.0))
        read = BoxText(bins).read(BoxText(bins).write(given))
        assert read is not None
        assert max(abs(a - b) for a, b in zip(read, given, strict=True)) < 1 / bins


def test_a_box_beyond_the_edge_is_written_at_the_edge():
    assert BoxText().write((-0.1, 0.0, 1.0, 1.2)) == "[0, 0, 500, 500]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0, 250, 500, 500]", (0, 0.5, 1, 1)),
        ("12 red discs : [0, 250, 500, 500]", (0, 0.5, 1, 1)),
        ("a : b : [0, 250, 500, 500] and 7", (0, 0.5, 1, 1)),
        ("0 250 500 500", (0, 0.5, 1, 1)),
        ("[0, 250, 500", None),
        ("", None),
        ("no box", None),
        ("[0, 250, 501, 500]", None),
        ("[250, 0, 250, 500]", None),
        ("[300, 0, 200, 500]", None),
        ("[0, 500, 500, 250]", None),
        ("[1, 2, 3, 99999999999999999999]", None),
    ],
)
def test_only_a_box_is_read_as_a_box(text, expected):
    assert BoxText().read(text) == expected


@pytest.mark.parametrize("template", ["{}{}{}{}", "[{}, {}, {}]", "{} {} {} {} {}", "<loc1{}> {} {} {}", "box", "{a}"])
def test_a_template_that_cannot_be_read_again_is_an_error(template):
    with pytest.raises(ValueError, match="cannot be read again, expected four"):
        BoxText(template=template)


def test_wrong_bins_and_orders_are_errors():
    with pytest.raises(ValueError, match="expected bins >= 1, found 0"):
        BoxText(bins=0)
    with pytest.raises(ValueError, match="no box order called 'xywh', expected one of xyxy, yxyx"):
        BoxText(order="xywh")


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_the_coin_is_fair_to_its_probability(probability, low, high):
    tosses = [CoinView(probability)(sample(), context(i)) for i in range(200)]
    assert all(toss.dtype == torch.bool and toss.shape == (1,) for toss in tosses)
    assert low <= torch.cat(tosses).sum() <= high


def test_regions_may_be_restricted_to_some_languages_while_captions_are_not():
    texts = {"en": "a red disc", "de": "rote scheibe"}
    given = sample({"de": "eine rote scheibe"}, regions=[{"box": [0.1, 0.2, 0.5, 0.6], "captions": texts}])
    for position in range(8):
        caption, refer, ground = written(LocCaView(location_languages=("de",))(given, context(position)))
        assert caption[0] == "cap: eine rote scheibe"
        assert refer[1].startswith("rote scheibe : [")
        assert ground[1].endswith("] : rote scheibe")
    assert not LocCaView(location_languages=("it",))(given, context())[1:].any()
