"""A wrong field name fails before training, with what there is and the fix."""

import pytest
from toy_samples import picture, write_shard
from webdataset import TarWriter

from siglip2.core.data.check import check_source
from siglip2.core.data.fields import Fields
from siglip2.core.data.source import open_source


def test_check_passes_on_good_data(shards, classes):
    check_source(open_source(str(shards)))
    check_source(open_source(str(classes)), ("image", "label"))
    check_source(open_source(str(shards), fields=Fields(extra={"width": "json.width"})), ("width",))


def test_check_names_keys_spec_and_fix_for_a_missing_caption(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "0", "jpg": picture(0), "json": {"url": "u", "text": "t"}})
    with pytest.raises(ValueError) as caught:
        check_source(open_source(str(tmp_path)))
    message = str(caught.value)
    assert "no caption under 'txt|json.caption'; it has jpg, json, json.url, json.text" in message
    assert message.endswith("for example data.fields.caption: json.text")
    check_source(open_source(str(tmp_path), fields=Fields(caption="json.text")))


def test_check_looks_at_the_last_shard_too(shards):
    with open(shards / "00003.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "0", "jpg": picture(0)})
    with pytest.raises(ValueError, match=r"00003\.tar: sample '0': no caption"):
        check_source(open_source(str(shards)))


def test_check_forgives_one_bad_sample_but_not_all(shards):
    write_shard(shards / "00000.tar", 0, 1)
    with open(shards / "00000.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "0", "jpg": b"broken", "txt": "a"})
        tar.write({"__key__": "1", "jpg": picture(0), "txt": "a"})
    check_source(open_source(str(shards)))
    with pytest.raises(ValueError, match="no image in the first 1 samples of a shard. .* not an image file"):
        check_source(open_source(str(shards)), num=1)
