"""A CSV or TSV table of picture files as a source."""

import csv
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fsspec
import numpy as np

from siglip2.core.data.fields import Fields, Sample, alternatives
from siglip2.core.data.storage import MAX_BYTES, ByteFile, is_local, nearby, read_for

IMAGE_COLUMNS = ("filepath", "image", "image_path", "path", "file_name", "filename")
CAPTION_COLUMNS = ("title", "caption", "text")
LABEL_COLUMNS = ("label", "cls")


class TableSource:
    """A CSV or TSV file with a header, one picture file and its caption a row.

    Columns: `filepath`, `image`, `path` ... for the picture and `title`, `caption` or `text` for the caption,
        unless `fields`
    names columns of the table. Paths are relative to the table's folder.

    Args:
        path: local path or URL of the table.
        fields: what the columns mean.
        separator: None takes a tab for .tsv, a comma for .csv, and a tab for a .csv whose header has tabs (as
            open_clip's).
        max_bytes: a larger picture file is a bad sample.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if it has no rows, or no column for the picture.
    """

    def __init__(
        self,
        path: str,
        *,
        fields: Fields | None = None,
        separator: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name, self.max_bytes = path, max_bytes
        if is_local(path) and not os.path.isfile(path):
            raise FileNotFoundError(f"no table {path}; {nearby(path)}")
        with fsspec.open(path, "rb") as file:
            header = file.readline().decode("utf-8-sig")
            tabs = path.endswith(".tsv") or ("\t" in header and "," not in header)
            self.separator = separator or ("\t" if tabs else ",")
            self.columns = next(csv.reader([header], delimiter=self.separator), [])
            self._offsets = _row_offsets(file, self.separator, path)
        if len(self) == 0:
            raise ValueError(
                f"no rows in {path}; expected a header such as filepath{self.separator}title and a row each"
            )
        self.fields = self._adopt(fields or Fields())
        self._image = next(word for word in alternatives(self.fields.image) if word in self.columns)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def shard_sizes(self) -> list[int]:
        """One shard: the table."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """Row i, the picture's bytes in place of its path; BadSample if row or file cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self.name}")
        begin, end = int(self._offsets[i]), int(self._offsets[i + 1])
        with ByteFile(self.name) as file:
            text = file.read(begin, end - begin).decode(errors="replace")
        values = next((row for row in csv.reader(text.splitlines(keepends=True), delimiter=self.separator) if row), [])
        sample = Sample(f"row {i}", self.name, dict(zip(self.columns, values, strict=False)), self.fields)
        if len(values) != len(self.columns):
            raise sample.bad(f"{len(values)} values for {len(self.columns)} columns; is a quote or the separator odd?")
        sample.key = sample.record[self._image]
        path = sample.key if not is_local(sample.key) else os.path.join(os.path.dirname(self.name), sample.key)
        sample.record[self._image] = read_for(sample, path, max_bytes=self.max_bytes)
        return sample

    def _adopt(self, fields: Fields) -> Fields:
        """`fields` with the usual column names where its own are not in the table."""
        usual = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "label": LABEL_COLUMNS}
        for field, names in usual.items():
            if not any(word.split(".")[0] in self.columns for word in alternatives(fields.spec(field))):
                found = [name for name in names if name in self.columns]
                renamed: dict[str, Any] = {field: found[0]} if found else {}
                fields = replace(fields, **renamed)
        if not any(word in self.columns for word in alternatives(fields.image)):
            raise ValueError(
                f"{self.name} has the columns {', '.join(self.columns)}, none of them for the picture "
                f"({', '.join(IMAGE_COLUMNS)}); set data.fields.image to the column with its path"
            )
        return fields


def _row_offsets(file: Any, separator: str, path: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row begins, in bytes, and where the last one ends; a quoted value may span lines."""
    position = file.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode(errors="replace")

    offsets, begin = [], position
    try:
        for row in csv.reader(lines(), delimiter=separator):
            if row:
                offsets.append(begin)
                begin = position
    except csv.Error as error:
        raise ValueError(f"{path}: row {len(offsets) + 1} at byte {begin} cannot be read: {error}") from None
    return np.array([*offsets, begin], dtype=np.int64)
