"""What is kept of a sample is what is in it, and what is wrong is named."""

import json

import pytest
from made_up import drawing, encoded, write_shard

from siglip2.core.data.fields import Fields
from siglip2.core.data.source import open_source
from siglip2.core.data.text import Tokenizer
from siglip2.inspection.collect import Reader, chosen, collect, with_group

GOOD = encoded(drawing(0, size=(80, 60)))


def facts(tmp_path, samples, fields=None, reader=None):
    path = write_shard(tmp_path / "00000.tar", samples)
    source = open_source(str(path), fields=fields)
    return collect(source, range(len(source)), reader or Reader())


def test_sizes_boxes_captions_and_presence_are_those_stored(tmp_path):
    region = {"box": [0.1, 0.2, 0.6, 0.5], "caption": "a thing"}
    meta = {"captions": {"en": "a cat", "de": ["eine Katze", "noch eine"]}, "regions": [region], "label": 3}
    (one,) = facts(tmp_path, [("a", {"jpg": GOOD, "json": meta})], Fields(caption="json.captions"))
    assert (one.picture.width, one.picture.height, one.picture.format) == (80, 60, "JPEG")
    assert one.picture.num_bytes == len(GOOD)
    assert [(t.language, t.text) for t in one.texts] == [("en", "a cat"), ("de", "eine Katze"), ("de", "noch eine")]
    assert one.boxes == (pytest.approx((0.5, 0.3)),)
    assert one.present == ("image", "caption", "label", "regions")
    assert one.faults == ()


def test_damage_is_named_by_field_and_the_other_fields_are_kept(tmp_path):
    samples = [
        ("cut", {"jpg": GOOD[: len(GOOD) // 2], "txt": "half a picture"}),
        ("words", {"jpg": b"not a picture", "txt": "no picture"}),
        ("blank", {"jpg": GOOD, "txt": "   "}),
        ("silent", {"jpg": GOOD, "cls": 1}),
        ("garbled", {"jpg": GOOD, "txt": b"\xff\xfe"}),
        ("good", {"jpg": GOOD, "txt": "a caption"}),
    ]
    found = {one.key: one for one in facts(tmp_path, samples)}
    assert {key: [fault.field for fault in one.faults] for key, one in found.items()} == {
        "cut": ["image"],
        "words": ["image"],
        "blank": ["caption"],
        "silent": [],
        "garbled": ["caption"],
        "good": [],
    }
    assert "cannot be decoded" in found["cut"].faults[0].reason
    assert found["cut"].texts[0].text == "half a picture"
    assert found["silent"].present == ("image", "label")


def test_headers_alone_do_not_see_a_cut_file_but_keep_its_size(tmp_path):
    samples = [("cut", {"jpg": GOOD[: len(GOOD) // 2], "txt": "half a picture"})]
    (one,) = facts(tmp_path, samples, reader=Reader(decode=False))
    assert one.faults == ()
    assert (one.picture.width, one.picture.height, one.picture.look) == (80, 60, None)


def test_pictures_over_the_limit_of_pixels_are_faults_without_being_decoded(tmp_path):
    samples = [("large", {"jpg": GOOD, "txt": "large"})]
    (one,) = facts(tmp_path, samples, Fields(max_pixels=80 * 60 - 1), Reader(decode=False))
    assert one.picture is None
    assert "80x60" in one.faults[0].reason


def test_unusable_boxes_are_notes(tmp_path):
    meta = {"caption": "x", "regions": [{"box": [0.5, 0.5, 0.2, 0.9], "caption": "turned"}]}
    (one,) = facts(tmp_path, [("a", {"jpg": GOOD, "json": meta})])
    assert one.boxes == ()
    assert "bad box" in one.notes[0]


def test_token_counts_are_those_of_the_tokenizer(tmp_path, toy_tokenizer):
    tokenizer = Tokenizer.load(toy_tokenizer)
    texts = ["a red disc, number 3", "Eine Kiste", "x" * 300]
    samples = [(f"{i}", {"jpg": GOOD, "txt": text}) for i, text in enumerate(texts)]
    found = facts(tmp_path, samples, reader=Reader(tokenizer))
    ids = [tokenizer.encode([text])[0].tolist() for text in texts]
    eos, pad = tokenizer.contract.eos_id, tokenizer.contract.pad_id
    for one, row in zip(found[:2], ids, strict=False):
        assert one.texts[0].tokens == len([i for i in row if i != pad]) - 1
        assert eos in row
    assert found[2].texts[0].tokens > tokenizer.contract.room


def test_extra_fields_hold_captions_and_values_to_group_by(tmp_path):
    meta = {"caption": "alt text", "synthetic": ["made up", "also made up"], "site": "example", "score": 0.5}
    fields = Fields(caption="json.caption", extra={"synthetic": "json.synthetic", "score": "json.score"})
    (one,) = facts(tmp_path, [("a", {"jpg": GOOD, "json": meta})], with_group(fields, "json.site"))
    assert [(t.field, t.text) for t in one.texts] == [
        ("caption", "alt text"), ("synthetic", "made up"), ("synthetic", "also made up"),
    ]  # fmt: skip
    assert one.group == "example"
    assert one.present == ("image", "caption", "synthetic", "score")
    assert one.faults == ()


def test_two_workers_read_what_one_reads(tmp_path):
    samples = [(f"{i:03d}", {"jpg": GOOD, "txt": json.dumps(i)}) for i in range(70)]
    source = open_source(str(write_shard(tmp_path / "0.tar", samples)))
    told = []
    both = [collect(source, range(70), Reader(), workers=w, progress=told.append) for w in (1, 2)]
    assert both[0] == both[1]
    assert [one.key for one in both[0]] == [key for key, _ in samples]
    assert sum(told) == 140


def test_limit_takes_the_first_and_a_seed_draws():
    assert chosen(5) == [0, 1, 2, 3, 4]
    assert chosen(5, limit=2) == [0, 1]
    assert chosen(5, limit=9, seed=1) == [0, 1, 2, 3, 4]
    drawn = chosen(10_000, limit=100, seed=1)
    assert drawn == chosen(10_000, limit=100, seed=1) != chosen(10_000, limit=100, seed=2)
    assert len(set(drawn)) == 100
    assert drawn == sorted(drawn)
    assert max(drawn) > 5000
