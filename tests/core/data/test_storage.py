"""A file appears whole or not at all, and a shard spec names its shards or says what lies near."""

import os

import pytest

from siglip2.core.data import storage
from siglip2.core.data.storage import expand_shards


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_file(str(tmp_path / "x"), b"1")
    assert os.listdir(tmp_path) == []


def test_shard_specs_expand(tmp_path):
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet", "00000_stats.json"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.tar").touch()
    a, b, c, x = (f"{tmp_path}/{name}" for name in ("00000.tar", "00001.tar", "00002.tar", "more/x.tar"))
    assert expand_shards(f"{tmp_path}/{{00000..00002}}.tar") == [a, b, c]
    assert expand_shards(f"{tmp_path}/0000[01].tar") == [a, b]
    assert expand_shards(f"{tmp_path}/") == [a, b, c]
    assert expand_shards(f"file://{tmp_path}/00001.tar") == [b]
    assert expand_shards(f"{x}::{tmp_path}/*.tar") == [x, a, b, c]
    assert expand_shards([x, f"{a}::{a}"]) == [x, a, a]
    assert expand_shards(f"{tmp_path}/{{more/*,00002}}.tar") == [x, c]
    assert expand_shards("s3://bucket/{0..1}.tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("", ValueError, "no shards given; expected a path such as"),
        ([], ValueError, "no shards given"),
        (
            "{tmp}/{00000..00003}.tar",
            FileNotFoundError,
            r"00001.tar \(and 2 more of 4 shards\); .* holds 00000.tar, sub",
        ),
        ("{tmp}/none/*.tar", FileNotFoundError, "nothing matches .*/none/.*; .* holds 00000.tar, sub"),
        ("{tmp}/sub", FileNotFoundError, r"nothing matches .*/sub/\*.tar; .*/sub holds nothing"),
        ("{tmp}/{0..1.tar", ValueError, "a brace is not closed"),
        ("pipe:cat x.tar", ValueError, "samples are read at random, a pipe is not; name the URL"),
        ("memory://nowhere/*.tar", FileNotFoundError, "check the bucket"),
    ],
)
def test_wrong_shard_spec_says_what_lies_near(tmp_path, spec, error, message):
    (tmp_path / "00000.tar").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(error, match=message):
        expand_shards(spec.replace("{tmp}", str(tmp_path)) if spec else spec)
