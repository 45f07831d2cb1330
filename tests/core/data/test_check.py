"""A wrong field name fails before training, with what there is and the fix."""

from functools import partial

import pytest
from toy_samples import picture, write_shard
from webdataset import TarWriter

from siglip2.core.data.check import check_captions, check_source
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


def test_check_uses_two_samples_of_the_first_and_of_the_last_shard(shards):
    used = []
    check_source(open_source(str(shards)), use=used.append)
    assert used == [0, 1, 7, 8]


def test_check_forgives_one_sample_that_cannot_be_used_but_not_all_of_a_shard(shards):
    source = open_source(str(shards))

    def use(i, refused):
        if i in refused:
            error = source.read(i).bad("too dark")
            error.add_note("while making the view 'image'")
            raise error

    check_source(source, use=partial(use, refused=(0, 8)))
    with pytest.raises(ValueError) as caught:
        check_source(source, use=partial(use, refused=(7, 8)))
    message = f"{source.name}: none of the first 2 samples of a shard can be used. {shards / '00002.tar'}: sample"
    assert str(caught.value) == f"{message} '000000007': too dark (while making the view 'image')"


def captioned(path, *synthetic):
    with open(path, "wb") as file, TarWriter(file) as tar:
        for number, text in enumerate(synthetic):
            extra = {} if text is None else {"synthetic": text}
            tar.write({"__key__": f"{number}", "jpg": picture(0), "json": {"caption": "a", **extra}})
    return open_source(str(path), fields=Fields(extra={"synthetic": "json.synthetic"}))


def test_captions_that_only_some_samples_have_pass_the_check(tmp_path):
    check_captions(captioned(tmp_path / "a.tar", None, None, None, "made"), ("caption", "synthetic"))


def test_caption_field_that_no_sample_has_is_named_with_what_there_is(tmp_path):
    source = captioned(tmp_path / "a.tar", None, " ", None)
    with pytest.raises(ValueError, match=r"a\.tar: no synthetic in the first 3 samples .* it has jpg, json, json\.cap"):
        check_captions(source, ("caption", "synthetic"))


def test_captions_in_files_that_cannot_be_read_are_an_error_with_the_reason(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file, TarWriter(file) as tar:
        tar.write({"__key__": "0", "jpg": picture(0), "txt": b"\xff\xfe"})
    with pytest.raises(ValueError, match=r"no caption in the first 1 samples .* 'txt' is not UTF-8 text"):
        check_captions(open_source(str(tmp_path / "a.tar")), ("caption",))


def test_check_lets_errors_of_the_user_of_samples_pass(shards):
    def use(i):
        raise KeyError("no such option")

    with pytest.raises(KeyError):
        check_source(open_source(str(shards)), use=use)
