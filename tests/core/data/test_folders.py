"""Folders of pictures give labels and captions, and say what they hold when they hold no picture."""

import json

import pytest
from toy_samples import keys, picture

from siglip2.core.data.fields import BadSample
from siglip2.core.data.folders import FolderSource
from siglip2.core.data.source import open_source


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
