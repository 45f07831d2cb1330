"""An index says where the samples of a shard lie, survives damaged shards, and notices a shard that changed."""

import gzip
import io
import json
import logging
import os
import tarfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from siglip2.core.data import storage, tar_headers, tar_index
from siglip2.core.data.index_shards import index_shards
from siglip2.core.data.tar_index import TarIndex, index_tar, load_index, sidecar_path


def write_tar(path, files, format=tarfile.PAX_FORMAT):
    """A tar with the named files; None makes a folder."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return str(path)


def pairs(count, size=700):
    """`count` samples of a picture and a text."""
    return [
        (f"{i:03d}.{e}", bytes([65 + i]) * (size if e == "jpg" else 9)) for i in range(count) for e in ("jpg", "txt")
    ]


def content(path, index=None):
    """What an index finds in its shard: [(key, {extension: bytes})]."""
    index = index_tar(path) if index is None else index
    stored = Path(path).read_bytes()
    found = [(index.key(i), index.members(i)) for i in range(len(index))]
    return [(key, {e: stored[at : at + size] for e, (at, size) in members.items()}) for key, members in found]


def through_webdataset(path):
    with open(path, "rb") as file:  # by its parts: its own opener leaves the file open
        samples = list(group_by_keys(tar_file_expander([{"url": path, "stream": file}])))
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


NAMES = [
    ("folder", None),
    ("folder/001.JPG", b"upper"),
    ("folder/001.left.png", b"dots"),
    ("folder.v2/001.jpg", b"dot in the folder"),
    ("./002.txt", b""),
    ("__meta__", b"left out"),
    ("__info__/a.txt", b"left out"),
    ("x/__kept__.txt", b"kept"),
    ("noextension", b"left out"),
    (".hidden.txt", b"left out"),
    ("größe/猫.jpg", "bytes of 猫".encode()),
    ("long/" + "d" * 90 + "/" + "n" * 120 + ".jpg", b"long"),
    ("last.txt", b"z" * 1025),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_index_equals_webdataset(tmp_path, format):
    path = write_tar(tmp_path / "a.tar", NAMES, format)
    assert content(path) == through_webdataset(path)
    assert index_tar(path).damage == ""


def test_ustar_prefixes_are_joined(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("p" * 120 + "/a.jpg", b"1")], tarfile.USTAR_FORMAT)
    assert content(path) == through_webdataset(path)


def test_members_of_8_gib_and_more_are_sized(tmp_path):
    for format, size in [(tarfile.GNU_FORMAT, 2**33 + 5), (tarfile.PAX_FORMAT, 2**33 + 5)]:
        info = tarfile.TarInfo("big.bin")
        info.size = size
        path = tmp_path / "big.tar"
        with open(path, "wb") as file:  # sparse: only the headers are on disk
            header = info.tobuf(format)
            file.write(header)
            file.truncate(len(header) + -(-size // 512) * 512 + 1024)
        assert index_tar(str(path)).members(0) == {"bin": (len(header), size)}


def test_stored_index_reads_back_the_same(tmp_path):
    path = write_tar(tmp_path / "a.tar", NAMES)
    index = index_tar(path)
    again = TarIndex.from_bytes(index.to_bytes())
    assert again.head == index.head
    assert content(path, again) == content(path, index)
    empty = index_tar(write_tar(tmp_path / "empty.tar", []))
    assert len(TarIndex.from_bytes(empty.to_bytes())) == 0


@pytest.mark.parametrize("stored", [b"", b"\x00" * 5000, b'{"version": 1}\n', b"[1]"])
def test_something_else_is_not_taken_for_an_index(stored):
    with pytest.raises(ValueError, match="not a tar index of version 1"):
        TarIndex.from_bytes(stored)


def test_cut_or_newer_index_is_refused(tmp_path):
    stored = index_tar(write_tar(tmp_path / "a.tar", pairs(3))).to_bytes()
    with pytest.raises(ValueError):
        TarIndex.from_bytes(stored[:-1])
    with pytest.raises(ValueError):
        TarIndex.from_bytes(stored[:4200])
    with pytest.raises(ValueError, match="version 1"):
        TarIndex.from_bytes(stored.replace(b'"version": 1', b'"version": 2'))


def test_split_keys_join_and_duplicates_are_counted(tmp_path):
    files = [("a.jpg", b"a"), ("b.jpg", b"b"), ("a.txt", b"A"), ("b.txt", b"B"), ("a.jpg", b"again")]
    path = write_tar(tmp_path / "a.tar", files)
    assert content(path) == [("a", {"jpg": b"a", "txt": b"A"}), ("b", {"jpg": b"b", "txt": b"B"})]
    assert index_tar(path).head.num_duplicates == 1


@pytest.mark.parametrize("cut", range(1, 6 * 2560, 257))
def test_cut_shard_keeps_the_whole_samples_before_the_cut(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", pairs(5), tarfile.USTAR_FORMAT)
    whole = content(path)  # each sample: 512 header, 1024 picture (700 used), 512 header, 512 text (9 used)
    os.truncate(path, cut)
    index = index_tar(path)
    kept = sum(cut >= 2560 * i + 2048 + 9 for i in range(5))
    if kept == 0 and cut >= 512 + 700:  # a lone sample cannot be told from half a one
        assert content(path, index) == [("000", {"jpg": whole[0][1]["jpg"]})]
    else:
        assert content(path, index) == whole[:kept]
    if cut < 5 * 2560 + 512:
        assert index.damage.startswith(f"a.tar: cut at byte {cut}")
        assert index.damage.endswith(f"{len(index)} samples before it are kept")
    else:
        assert index.damage == ""


def test_broken_header_keeps_the_samples_before_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(5), tarfile.USTAR_FORMAT)
    whole = content(path)
    with open(path, "r+b") as file:
        file.seek(3 * 2560)
        file.write(b"\xff" * 512)
    index = index_tar(path)
    assert content(path, index) == whole[:3]
    assert index.damage == f"a.tar: no tar header at byte {3 * 2560}; 3 samples before it are kept"


def test_what_is_no_tar_is_damage_and_what_is_compressed_an_error(tmp_path):
    page = tmp_path / "page.tar"
    page.write_bytes(b"<html>" * 200)
    assert len(index_tar(str(page))) == 0
    assert "no tar header at byte 0" in index_tar(str(page)).damage
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(np.random.default_rng(0).bytes(2000)))
    with pytest.raises(ValueError, match=r"compressed \(gzip\); unpack it"):
        index_tar(str(packed))


def test_long_names_do_not_overflow_the_head(tmp_path):
    path = write_tar(tmp_path / ("猫" * 80 + ".tar"), [("猫" * 2000 + ".jpg", bytes(9000))])
    os.truncate(path, Path(path).stat().st_size - 8000)
    index = TarIndex.from_bytes(index_tar(path).to_bytes())
    assert index.damage.endswith("0 samples before it are kept")


def test_joined_tars_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_headers, "TRAILING_BYTES", 9000)
    path = write_tar(tmp_path / "a.tar", pairs(3))
    Path(path).write_bytes(Path(path).read_bytes() * 2)
    index = index_tar(path)
    assert len(index) == 3
    assert "behind the end mark" in index.damage


def test_index_is_stored_and_used(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    first = load_index(path)
    monkeypatch.setattr(tar_index, "index_tar", None)  # would fail if called
    assert content(path, load_index(path)) == content(path, first)
    os.utime(path, (1, 1))  # copying a dataset changes times and nothing else
    assert content(path, load_index(path)) == content(path, first)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index"]


@pytest.mark.parametrize(
    "other",
    [pairs(4), [(name.replace("00", "99"), data) for name, data in pairs(3)]],
    ids=["another size", "the same size"],
)
def test_index_of_a_shard_that_changed_is_made_anew(tmp_path, other):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    load_index(path)
    write_tar(path, other)
    assert content(path, load_index(path)) == through_webdataset(path)
    assert TarIndex.from_bytes((tmp_path / "a.tar.index").read_bytes()).head == index_tar(path).head


def test_damaged_index_is_made_anew(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    load_index(path)
    os.truncate(sidecar_path(path), 4100)
    with caplog.at_level(logging.WARNING):
        assert content(path, load_index(path)) == through_webdataset(path)
    assert "is damaged and is made anew" in caplog.text


def test_read_only_folder_is_fine(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    monkeypatch.setattr(storage.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert len(load_index(path)) == 3
    assert os.listdir(tmp_path) == ["a.tar"]


def test_fingerprint_is_of_the_first_and_last_header(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(2), tarfile.USTAR_FORMAT)
    stored = Path(path).read_bytes()
    last = 2560 + 512 + 1024
    assert index_tar(path).head.fingerprint == zlib.crc32(stored[:512] + stored[last : last + 512])


@pytest.mark.parametrize("workers", [1, 3])
def test_index_shards_writes_indexes_and_sizes(tmp_path, workers):
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", pairs(number + 2))
    (tmp_path / "sizes.json").write_text('{"00009.tar": 5, "00000.tar": 99}')
    os.truncate(tmp_path / "00002.tar", 9000)
    steps = []
    summary = index_shards(f"{tmp_path}/{{00000..00002}}.tar", workers=workers, progress=lambda *s: steps.append(s))
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {
        "00000.tar": 2,
        "00001.tar": 3,
        "00002.tar": len(index_tar(f"{tmp_path}/00002.tar")),
        "00009.tar": 5,
    }
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert summary.num_samples == sum(sizes.values()) - 5
    assert "samples in 3 shards" in str(summary)
    assert "damaged: " in str(summary).splitlines()[1]
    assert all((tmp_path / f"{number:05d}.tar.index").exists() for number in range(3))


def test_index_shards_writes_beside_remote_shards(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    memory = fsspec.filesystem("memory")
    memory.pipe("/index-remote/00000.tar", Path(path).read_bytes())
    try:
        index_shards("memory://index-remote/*.tar")
        assert json.loads(memory.cat("/index-remote/sizes.json")) == {"00000.tar": 3}
        assert content(path, TarIndex.from_bytes(memory.cat("/index-remote/00000.tar.index"))) == content(path)
    finally:
        memory.rm("/index-remote", recursive=True)
