"""Sources read any sample of a dataset as it lies on disk, and wrong paths and fields fail with the fix."""

import csv
import io
import json
import logging
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from siglip2.core.data import source as source_module
from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.data.source import FolderSource, Source, TableSource, TarSource, check_source, open_source


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, start, count, **more):
    """A shard as img2dataset lays it out."""
    with open(path, "wb") as file, TarWriter(file) as tar:
        for number in range(start, start + count):
            meta = {"caption": f"json {number}", "key": f"{number:09d}", "width": 6}
            parts = {"jpg": picture(number), "txt": f"text {number} 猫", "json": meta, **more}
            tar.write({"__key__": f"{number:09d}", **parts})


@pytest.fixture
def shards(tmp_path):
    """Three shards of 3, 4 and 5 samples, and the files that img2dataset puts beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, (start, count) in enumerate([(0, 3), (3, 4), (7, 5)]):
        write_shard(folder / f"{shard:05d}.tar", start, count)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


def keys(source):
    return [source.read(i).key for i in range(len(source))]


def test_tar_source_reads_what_webdataset_reads(shards):
    expected = []
    for path in sorted(shards.glob("*.tar")):
        with open(path, "rb") as file:
            expected += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    source = open_source(str(shards))
    assert isinstance(source, Source)
    assert source.shard_sizes() == [3, 4, 5]
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        sample = source.read(i)
        assert {"__key__": sample.key, "__url__": sample.where, **sample.record} == expected[i]


def test_fields_of_a_shard_sample(shards):
    sample = open_source(f"{shards}/{{00000..00002}}.tar").read(8)
    assert sample.key == "000000008"
    assert sample.where == f"{shards}/00002.tar"
    assert sample.image().shape == (3, 4, 6)
    assert sample.captions() == {"": ["text 8 猫"]}
    by_json = open_source(str(shards), fields=Fields(caption="json.caption")).read(8)
    assert by_json.captions() == {"": ["json 8"]}


def test_indexes_are_read_when_there(shards, monkeypatch):
    before = keys(open_source(str(shards)))
    assert len(list(shards.glob("*.tar.index"))) == 3
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(open_source(str(shards))) == before


def test_index_made_in_memory_goes_along_to_workers(shards, monkeypatch):
    monkeypatch.setattr("siglip2.core.data.tar_index.write_file", lambda *_: (_ for _ in ()).throw(PermissionError()))
    source = open_source(str(shards))
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(pickle.loads(pickle.dumps(source))) == [f"{i:09d}" for i in range(12)]


class Keys(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        sample = self.source.read(i)
        return sample.key, sample.image()[0, 0, 0]


def test_workers_read_the_same(shards):
    dataset = Keys(open_source(str(shards)))
    here = [dataset[i] for i in range(len(dataset))]  # files are open before the fork
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [(key, int(red)) for key, red in loader] == [(key, int(red)) for key, red in here]


def test_few_shards_stay_open(shards, monkeypatch):
    monkeypatch.setattr(source_module, "OPEN_SHARDS", 2)
    source = open_source(str(shards))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert keys(source) + keys(source) == [f"{i:09d}" for i in range(12)] * 2
    assert len(source._opened) == 2
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_a_shard_may_be_named_twice(shards):
    source = open_source([f"{shards}/00000.tar", f"{shards}/00001.tar::{shards}/00000.tar"])
    assert source.shard_sizes() == [3, 4, 3]
    assert source.read(8).key == "000000001"


def test_members_far_apart_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "SLACK_BYTES", 0)
    write_shard(tmp_path / "a.tar", 0, 3)
    assert open_source(str(tmp_path)).read(2).captions() == {"": ["text 2 猫"]}


def test_damaged_shard_is_logged_once_and_its_rest_used(shards, caplog):
    path = shards / "00001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        source = open_source(str(shards))
    assert 0 < source.shard_sizes()[1] < 4
    assert caplog.text.count(f"damaged shard in {path.parent}: 00001.tar: cut at byte") == 1
    assert source.read(source.shard_sizes()[0]).key == "000000003"


def test_oversized_member_is_a_bad_sample(shards):
    write_shard(shards / "00001.tar", 3, 4, npy=b"x" * 5000)
    source = open_source(str(shards), max_bytes=4000)
    with pytest.raises(BadSample, match="'npy' has 5000 bytes, over the limit of 4000"):
        source.read(4)
    assert source.read(0).key == "000000000"


def test_shard_that_shrinks_while_in_use_gives_bad_samples(shards):
    source = open_source(str(shards))
    source.read(11)
    os.truncate(shards / "00002.tar", 3000)
    with pytest.raises(BadSample, match="is cut: the shard became shorter"):
        source.read(11)


def test_shard_that_is_replaced_while_in_use_is_an_error(shards):
    source = open_source(str(shards))
    write_shard(shards / "00001.tar", 0, 9)
    with pytest.raises(ValueError, match=r"00001.tar changed while in use: it had 4 samples, now 9"):
        source.read(4)


def test_no_such_sample_is_an_index_error(shards):
    for source in (open_source(str(shards)), FolderSourceOf(shards.parent)):
        with pytest.raises(IndexError):
            source.read(len(source))
        with pytest.raises(IndexError):
            source.read(-1)


def FolderSourceOf(folder):
    (folder / "flat").mkdir()
    (folder / "flat" / "a.jpg").write_bytes(picture(1))
    return FolderSource(str(folder / "flat"))


@pytest.fixture
def remote(shards):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/remote-set/{path.name}", path.read_bytes())
    yield "memory://remote-set"
    memory.rm("/remote-set", recursive=True)


@pytest.mark.parametrize("spec", ["{}/{{00000..00002}}.tar", "{}/*.tar", "{}/"])
def test_remote_shards_read_as_local_ones(shards, remote, spec, caplog):
    local = open_source(str(shards))
    with caplog.at_level(logging.WARNING):
        source = open_source(spec.format(remote))
    assert caplog.text.count("`siglip2 index` stores it beside the shard") == 3
    assert [source.read(i).record for i in range(12)] == [local.read(i).record for i in range(12)]


def test_remote_index_is_used(shards, remote, caplog, monkeypatch):
    open_source(str(shards))
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.index"):
        memory.pipe(f"/remote-set/{path.name}", path.read_bytes())
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(open_source(f"{remote}/*.tar")) == [f"{i:09d}" for i in range(12)]
    assert caplog.text == ""


def test_cache_keeps_whole_remote_shards(remote, tmp_path):
    first = open_source(f"{remote}/*.tar", cache_dir=str(tmp_path / "cache"))
    expected = keys(first)
    fsspec.filesystem("memory").rm("/remote-set/00001.tar")  # from here on only the copy is left
    assert keys(pickle.loads(pickle.dumps(first))) == expected
    names = [name for name in os.listdir(tmp_path / "cache") if name.endswith(".tar")]
    assert len(names) == 3


def write_table(path, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


ROWS = [
    ["images/0.jpg", "plain", 5],
    ["images/1.jpg", 'quoted, "twice"\nover lines', 6],
    ["images/2.jpg", "猫", 7],
]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "delimiter", "header"),
    [
        ("a.csv", ",", ["filepath", "title", "label"]),
        ("a.tsv", "\t", ["filepath", "caption", "label"]),
        (
            "a.csv",
            "\t",
            ["image", "text", "cls"],
        ),  # open_clip's default separator, whatever the file is called
    ],
)
def test_table_rows(images, name, delimiter, header):
    source = open_source(write_table(images / name, [header, *ROWS], delimiter))
    assert isinstance(source, TableSource)
    assert source.shard_sizes() == [3]
    for i in (2, 0, 1):
        sample = pickle.loads(pickle.dumps(source)).read(i)
        assert sample.key == ROWS[i][0]
        assert sample.captions() == {"": [ROWS[i][1]]}
        assert int(sample.get("label")) == ROWS[i][2]
        assert torch.equal(sample.image(), open_source(str(images / "images")).read(i).image())
    check_source(source, ("image", "caption", "label"))


def test_table_columns_may_be_named_and_paths_absolute(images):
    header = ["where", "title", "alt"]
    rows = [[str(images / "images/0.jpg"), "not this", "this"]]
    path = write_table(images / "a.csv", [header, *rows], ",")
    sample = open_source(path, fields=Fields(image="where", caption="alt")).read(0)
    assert sample.captions() == {"": ["this"]}
    assert sample.record["where"] == picture(0)
    with pytest.raises(ValueError, match=r"has the columns where, title, alt, .* set data\.fields\.image"):
        open_source(path)


def test_table_with_byte_order_mark_blank_lines_and_windows_line_ends(images):
    text = "\ufefffilepath,title\r\n\r\nimages/0.jpg,zero\r\n\r\nimages/1.jpg,one"
    (images / "a.csv").write_bytes(text.encode())
    source = open_source(str(images / "a.csv"))
    assert [source.read(i).captions()[""] for i in range(len(source))] == [["zero"], ["one"]]


def test_broken_rows_are_bad_samples(images):
    rows = [["filepath", "title"], ["images/9.jpg", "a"], ["images/0.jpg"], ["images/0.jpg", "b"]]
    source = open_source(write_table(images / "a.csv", rows, ","))
    with pytest.raises(BadSample, match=r"no file .*images/9\.jpg"):
        source.read(0)
    with pytest.raises(BadSample, match="row 1.* 1 values for 2 columns"):
        source.read(1)
    assert source.read(2).captions() == {"": ["b"]}
    with pytest.raises(BadSample, match="over the limit of 10"):
        TableSource(str(images / "a.csv"), max_bytes=10).read(2)


def test_empty_or_missing_table(images):
    with pytest.raises(FileNotFoundError, match=r"no table .*b\.csv; .* holds images"):
        open_source(str(images / "b.csv"))
    with pytest.raises(ValueError, match="no rows in"):
        open_source(write_table(images / "a.csv", [["filepath", "title"]], ","))


@pytest.fixture
def classes(tmp_path):
    for folder, names in {"dog": ["x.JPG", "y.png"], "cat": ["sub/a.jpg", "b.webp", "notes.md"]}.items():
        for name in names:
            path = tmp_path / "set" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(9, {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")))
    (tmp_path / "set" / "dog" / "y.txt").write_text("a dog called y")
    (tmp_path / "set" / "dog" / ".hidden.jpg").write_bytes(b"")
    return tmp_path / "set"


def test_class_folders_give_label_and_caption(classes):
    source = open_source(str(classes))
    assert isinstance(source, FolderSource)
    assert source.classes == ["cat", "dog"]
    found = {s.key: (s.get("label"), s.captions()[""]) for s in map(source.read, range(len(source)))}
    assert found == {
        "cat/b": (0, ["cat"]),
        "cat/sub/a": (0, ["cat"]),
        "dog/x": (1, ["dog"]),
        "dog/y": (1, ["a dog called y"]),
    }
    assert all(source.read(i).image().shape == (3, 4, 6) for i in range(len(source)))


def test_flat_folder_takes_captions_from_beside(tmp_path):
    for name in ("b.jpg", "a.v2.jpg", "c.png"):
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "a.v2.txt").write_text("text")
    (tmp_path / "b.json").write_text(json.dumps({"caption": {"de": "Wort"}}))
    source = open_source(str(tmp_path))
    assert keys(source) == ["a.v2", "b", "c"]
    assert source.read(0).captions() == {"": ["text"]}
    assert source.read(1).captions() == {"de": ["Wort"]}
    assert not source.read(0).has("label")
    with pytest.raises(BadSample, match="no caption"):
        source.read(2).captions()


def test_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"no pictures \(jpeg, jpg, png, webp\) under .* holds a\.heic"):
        open_source(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder .*/none; .* holds a\.heic"):
        open_source(str(tmp_path / "none"), format="folder")


@pytest.mark.parametrize(
    ("path", "format", "error", "message"),
    [
        ("{tmp}/none", "auto", FileNotFoundError, r"no shard .*/none; .* holds notes\.md. Check the path"),
        ("{tmp}/notes.md", "auto", ValueError, r"cannot tell what .*notes\.md is; expected .tar shards"),
        ("{tmp}", "lmdb", ValueError, "no format called 'lmdb'; known: auto, tar, table, folder"),
        ("a.csv::b.csv", "auto", ValueError, "one table at a time"),
        ([], "auto", ValueError, "no shards given"),
    ],
)
def test_wrong_path_says_what_was_looked_for(tmp_path, path, format, error, message):
    (tmp_path / "notes.md").touch()
    path = path.replace("{tmp}", str(tmp_path)) if isinstance(path, str) else path
    with pytest.raises(error, match=message):
        open_source(path, format=format)


def test_shards_without_samples_are_an_error(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        TarWriter(file).close()
    with pytest.raises(ValueError, match=r"no samples in .* \(1 shards\)"):
        TarSource(str(tmp_path))


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


def test_source_module_imports_without_torchvision():
    import subprocess
    import sys

    code = "import sys, siglip2.core.data.source; sys.exit('torchvision' in sys.modules or 'webdataset' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
