"""A table of picture files reads any row, and says which column it lacks."""

import csv
import pickle

import pytest
import torch
from toy_samples import picture

from siglip2.core.data.check import check_source
from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.data.source import open_source
from siglip2.core.data.tables import TableSource


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
