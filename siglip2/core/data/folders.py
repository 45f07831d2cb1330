"""Folders of pictures as a source: one folder per class, or flat."""

import os

from siglip2.core.data.fields import Fields, Sample, alternatives
from siglip2.core.data.storage import MAX_BYTES, nearby, read_for


class FolderSource:
    """A folder of pictures, in one folder per class or flat, with files of the same stem beside them.

    `cat/001.jpg` has the label of its folder's place in the alphabet, and the folder's name for a caption
    unless a `cat/001.txt` or `cat/001.json` lies beside it. One folder alone is no class.

    Args:
        path: the local folder.
        fields: what the extensions mean; `image` says which files are pictures.
        max_bytes: a larger file makes a bad sample.

    Raises:
        FileNotFoundError: if there is no such folder, or no picture in it.
    """

    def __init__(self, path: str, *, fields: Fields | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.name, self.fields, self.max_bytes = path, fields or Fields(), max_bytes
        if not os.path.isdir(path):
            raise FileNotFoundError(f"no folder {path}; {nearby(path)}")
        kinds = set(alternatives(self.fields.image))
        self._items = [(stem, found) for stem, found in _stems(path) if kinds & {e.lower() for e in found}]
        if not self._items:
            raise FileNotFoundError(
                f"no pictures ({', '.join(sorted(kinds))}) under {path}; {nearby(os.path.join(path, ''))}; "
                "tar shards in folders of folders are named as data/*/*.tar"
            )
        folders = sorted({stem.split("/")[0] for stem, _ in self._items if "/" in stem})
        self.classes = folders if len(folders) > 1 else []

    def __len__(self) -> int:
        return len(self._items)

    def shard_sizes(self) -> list[int]:
        """One shard: the folder."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """Picture i and the files of its stem; BadSample if one of them cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)} in {self.name}")
        stem, extensions = self._items[i]
        sample = Sample(stem, self.name, {}, self.fields)
        for extension in extensions:
            path = os.path.join(self.name, f"{stem}.{extension}")
            sample.record[extension.lower()] = read_for(sample, path, max_bytes=self.max_bytes)
        folder = stem.split("/")[0]
        if "/" in stem and folder in self.classes:
            sample.record.setdefault("cls", self.classes.index(folder))
            if not {"txt", "json"} & set(sample.record):
                sample.record["txt"] = folder
        return sample


def _stems(root: str) -> list[tuple[str, list[str]]]:
    """(path below root without extension, its extensions) of all but hidden files, in alphabetical order."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension and not name.startswith("."):
                path = os.path.relpath(os.path.join(folder, stem), root).replace(os.sep, "/")
                found.setdefault(path, []).append(extension[1:])
    return sorted(found.items())
