"""Whatever kind a dataset is, a wrong path says what was looked for and what lies near."""

from pathlib import Path

import pytest
from toy_samples import picture

from siglip2.core.data.folders import FolderSource
from siglip2.core.data.source import open_source


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


def test_source_module_imports_without_torchvision():
    import subprocess
    import sys

    code = "import sys, siglip2.core.data.source; sys.exit('torchvision' in sys.modules or 'webdataset' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
