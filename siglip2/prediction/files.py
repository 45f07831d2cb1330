"""Predictions as a file: parquet through pyarrow, or a plain array with its keys beside it. Whole or not at all.

Rows are written as they come, so that memory does not grow with the data set.
"""

# b rows at a time, K values of a row

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Plain = Mapping[str, Any]
ROW_GROUP = 8192  # rows that parquet keeps together, and memory holds
MATCHES, EMBEDDING = "matches", "embedding"


class Predictions(Protocol):
    """A file that takes rows in order and appears under its name when it is closed."""

    def write(self, places: Sequence[tuple[str, str]], values_bK: Tensor, failures: Mapping[int, str]) -> None:
        """Appends rows.

        Args:
            places: (shard or folder, key) of each.
            values_bK: float32; NaN where there are none.
            failures: row -> reason.
        """

    def close(self) -> None:
        """Ends the file and gives it its name."""

    def abandon(self) -> None:
        """Leaves nothing behind."""


def open_predictions(path: str, *, rows: int, width: int, texts: Sequence[str], about: Plain) -> Predictions:
    """Returns the file that predictions are written to.

    Args:
        path: ending in .parquet or .npy; its folder is made.
        rows: that will be written.
        width: K.
        texts: what the K values are probabilities of; none if they are an embedding.
        about: what made them, plain values.

    Raises:
        ValueError: if the ending is another one.
        ImportError: if it is .parquet and pyarrow is not installed.
    """
    target = Path(path)
    if target.suffix not in (".parquet", ".npy"):
        raise ValueError(f"--out is {path}, expected a file that ends in .parquet or .npy")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        return ArrayFile(target, rows, width, texts)
    return ParquetFile(target, width, texts, about)


def lines_of(
    places: Sequence[tuple[str, str]], values_bK: Tensor, failures: Mapping[int, str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns what a file says of each row: `where`, `key`, `error`, and with texts the likeliest and its probability.

    Args:
        places: (shard or folder, key) of each.
        values_bK: NaN where there are none.
        failures: row -> reason.
        texts: what the values are probabilities of, if they are.
    """
    rows: list[dict[str, Any]] = [{"where": where, "key": key, "error": None} for where, key in places]
    for row, reason in failures.items():
        rows[row]["error"] = reason
    if texts:
        match_b, index_b = values_bK.max(1)
        for line, index, match in zip(rows, index_b.tolist(), match_b.tolist(), strict=True):
            line |= {"text": None, "match": None} if line["error"] else {"text": texts[index], "match": match}
    return rows


class ArrayFile:
    """`x.npy`, float32 [n, K], and `x.npy.jsonl`, where line i says what row i is.

    Args:
        path: of the array.
        rows: n.
        width: K.
        texts: what the values are probabilities of; none if they are an embedding.
    """

    def __init__(self, path: Path, rows: int, width: int, texts: Sequence[str]) -> None:
        self.path, self.texts, self.done = path, list(texts), 0
        self.beside = path.with_name(f"{path.name}.jsonl")
        self._drafts = [_draft(path), _draft(self.beside)]
        self._array = np.lib.format.open_memmap(self._drafts[0], mode="w+", dtype=np.float32, shape=(rows, width))
        self._lines = self._drafts[1].open("w", encoding="utf-8")

    def write(self, places: Sequence[tuple[str, str]], values_bK: Tensor, failures: Mapping[int, str]) -> None:
        self._array[self.done : self.done + len(places)] = values_bK.numpy()
        self.done += len(places)
        for line in lines_of(places, values_bK, failures, self.texts):
            self._lines.write(json.dumps(line) + "\n")

    def close(self) -> None:
        assert self.done == len(self._array)
        self._array.flush()
        self._lines.close()
        os.replace(self._drafts[1], self.beside)
        os.replace(self._drafts[0], self.path)  # last: where there is an array, its keys are there

    def abandon(self) -> None:
        self._lines.close()
        for draft in self._drafts:
            draft.unlink(missing_ok=True)


class ParquetFile:
    """`x.parquet`: where, key, error, and `text`, `match`, `matches` [K]; or `embedding` [K] without texts.

    Args:
        path: of the file.
        width: K.
        texts: what the values are probabilities of; none if they are an embedding.
        about: what made them; stored with the texts under `siglip2` in the file's metadata, as JSON.

    Raises:
        ImportError: if pyarrow is not installed.
    """

    def __init__(self, path: Path, width: int, texts: Sequence[str], about: Plain) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ImportError(
                "parquet is written by pyarrow, which is not installed: `pip install pyarrow`, or give --out x.npy"
            ) from None
        self._pa, self.path, self.texts, self._draft = pa, path, list(texts), _draft(path)
        columns = {"where": pa.string(), "key": pa.string(), "error": pa.string()}
        values = pa.list_(pa.float32(), width)
        columns |= {"text": pa.string(), "match": pa.float32(), MATCHES: values} if texts else {EMBEDDING: values}
        head = json.dumps({**about, "texts": self.texts}, ensure_ascii=False)
        self._schema = pa.schema(list(columns.items()), metadata={"siglip2": head})
        self._writer = pq.ParquetWriter(self._draft, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._values: list[Tensor] = []

    def write(self, places: Sequence[tuple[str, str]], values_bK: Tensor, failures: Mapping[int, str]) -> None:
        self._rows += lines_of(places, values_bK, failures, self.texts)
        self._values.append(values_bK)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        os.replace(self._draft, self.path)

    def abandon(self) -> None:
        self._writer.close()
        self._draft.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        pa, values_nK = self._pa, torch.cat(self._values)
        absent = pa.array([row["error"] is not None for row in self._rows])
        lists = pa.FixedSizeListArray.from_arrays(
            pa.array(values_nK.flatten().numpy()), values_nK.shape[1], mask=absent
        )
        named = list(self._schema)[:-1]
        columns = [pa.array([row[column.name] for row in self._rows], column.type) for column in named]
        self._writer.write_table(pa.Table.from_arrays([*columns, lists], schema=self._schema))
        self._rows, self._values = [], []


def _draft(path: Path) -> Path:
    return path.with_name(f".writing-{os.getpid()}-{path.name}")
