"""The field map finds image and caption under the names that datasets use, and says so when it cannot."""

import io
import json
import pickle

import pytest
import torch
from PIL import Image

from siglip2.core.data.fields import BadSample, Fields, Sample, resolve

META = {"caption": "from json", "a": {"b": [10, {"c": "deep"}]}, "empty": None, "label": 4}
RECORD = {
    "jpg": b"\xff",
    "json": json.dumps(META).encode(),
    "cls": b"7\n",
    "meta.json": b'{"text": "dotted"}',
}


def sample(record, **specs):
    return Sample("k", "00000.tar", record, Fields(**specs))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("jpg;png", b"\xff"),
        ("png;jpg", b"\xff"),
        ("png | jpg", b"\xff"),
        ("png", None),
        ("txt|json.caption", "from json"),
        ("json.empty|json.caption", "from json"),
        ("json.a.b.1.c", "deep"),
        ("json.a.b.7", None),
        ("json.caption.x", None),
        ("json", META),
        ("cls|json.label", 7),
        ("json.label", 4),
        ("meta.json.text", "dotted"),
        ("meta.json", {"text": "dotted"}),
    ],
)
def test_first_alternative_present_wins(spec, expected):
    assert resolve(spec, RECORD) == expected


def test_text_members_are_decoded_and_others_are_not():
    assert resolve("txt", {"txt": "Größe 猫".encode()}) == "Größe 猫"
    assert resolve("caption.txt", {"caption.txt": b"a"}) == "a"
    assert resolve("npy", {"npy": b"a"}) == b"a"
    assert resolve("cls", {"cls": b"cat"}) == "cat"


def test_json_is_parsed_once_and_only_when_needed():
    parsed = {}
    assert resolve("txt|json.caption", {"txt": b"t", "json": b"{broken"}, parsed=parsed) == "t"
    first = resolve("json", RECORD, parsed=parsed)
    assert resolve("json", RECORD, parsed=parsed) is first


@pytest.mark.parametrize("spec", ["", " ", "jpg;;png", "json.", ".txt", "json..a", None])
def test_malformed_spec_names_the_field_and_the_grammar(spec):
    with pytest.raises(ValueError, match=r"field 'caption': cannot read .*txt\|json\.caption"):
        Fields(caption=spec)


def test_extra_fields_are_named_and_cannot_hide_the_usual_ones():
    fields = Fields(extra={"depth": "npy"})
    assert fields.spec("depth") == "npy"
    assert hash(fields) == hash(Fields(extra={"depth": "npy"}))
    assert Sample("k", "w", {"npy": b"1"}, fields).get("depth") == b"1"
    with pytest.raises(ValueError, match="'image' repeats"):
        Fields(extra={"image": "png"})
    with pytest.raises(ValueError, match="field 'depth': cannot read"):
        Fields(extra={"depth": ""})
    with pytest.raises(ValueError, match="no field called 'deepness'; known: image, .*, depth"):
        fields.spec("deepness")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("one", {"": ["one"]}),
        ([" one ", "", "two"], {"": ["one", "two"]}),
        ({"en": "one", "de": ["eins", "zwei"], "fr": ""}, {"en": ["one"], "de": ["eins", "zwei"]}),
    ],
)
def test_captions_may_be_text_list_or_by_language(caption, expected):
    assert sample({"json": json.dumps({"caption": caption}).encode()}).captions() == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"jpg": b""}, r"no caption under 'txt\|json.caption'; it has jpg$"),
        ({"jpg": b"", "json": b'{"text": "x"}'}, "it has jpg, json, json.text$"),
        ({"txt": b"  "}, "the caption is blank"),
        ({"txt": b"\xff\xfe"}, "'txt' is not UTF-8 text: .* at byte 0"),
        ({"json": b"{"}, "'json' is not JSON"),
        ({"json": b'{"caption": 3}'}, r"the caption holds \[3\], expected a text"),
    ],
)
def test_missing_or_broken_caption_is_a_bad_sample_that_says_why(record, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        sample(record).captions()
    assert str(caught.value).startswith("00000.tar: sample 'k': ")


def test_has_tells_presence_without_decoding():
    assert sample({"jpg": b"no image"}).has("image")
    assert not sample({"jpg": b""}).has("caption")


def test_image_is_decoded_once():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(buffer, "PNG")
    picture = sample({"png": buffer.getvalue()})
    assert picture.image().shape == (3, 3, 4)
    assert picture.image().dtype == torch.uint8
    assert picture.image() is picture.image()


def test_broken_image_is_a_bad_sample():
    with pytest.raises(BadSample, match="not an image file"):
        sample({"jpg": b"<html>"}).image()
    with pytest.raises(BadSample, match="the image is str, expected the bytes"):
        sample({"json": b'{"path": "a.jpg"}'}, image="json.path").image()


def test_bad_sample_travels_between_processes():
    bad = pickle.loads(pickle.dumps(BadSample("00000.tar", "k", "cut")))
    assert (bad.where, bad.key, bad.reason) == ("00000.tar", "k", "cut")
    assert str(bad) == "00000.tar: sample 'k': cut"
