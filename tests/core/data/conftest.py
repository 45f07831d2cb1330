"""Toy datasets: shards as img2dataset leaves them, and folders of classes."""

import pytest
from toy_samples import picture, write_shard


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
