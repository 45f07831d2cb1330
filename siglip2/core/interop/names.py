"""One table of names per library, used in both directions, so that reading and writing cannot disagree."""

# D width, H heads, h width of a head, P patch values, p patch size, R rows, C columns, N = R C cells

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """The same numbers in the shape that another library gives them.

    Args:
        write: ours -> theirs, given the tensor and the attention heads of its tower.
        read: theirs -> ours.
        axes: of theirs; None for any.
    """

    write: Callable[[Tensor, int], Tensor]
    read: Callable[[Tensor], Tensor]
    axes: int | None = None


def _square(table_ND: Tensor) -> Tensor:
    side = round(table_ND.shape[0] ** 0.5)
    if side * side != table_ND.shape[0]:
        raise ValueError(f"the position table has {table_ND.shape[0]} cells, which are no square grid")
    return table_ND.unflatten(0, (side, side))


def _flat(table_RCD: Tensor) -> Tensor:
    rows, columns, _ = table_RCD.shape
    if rows != columns:
        raise ValueError(f"the position table is {rows} x {columns}: other libraries read it as a square")
    return table_RCD.flatten(0, 1)


def _convolution(weight_DP: Tensor) -> Tensor:
    side = round((weight_DP.shape[1] / 3) ** 0.5)
    return weight_DP.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)  # [D, row, column, channel] -> [D, 3, p, p]


AS_IS = Form(lambda t, _: t, lambda t: t)
SCALAR = Form(lambda t, _: t.reshape(()), lambda t: t.reshape(1))  # ours has the shape [1]
ONE_ROW = Form(lambda t, _: t[None], lambda t: t[0])
CONVOLUTION = Form(lambda t, _: _convolution(t), lambda t: t.permute(0, 2, 3, 1).flatten(1), 4)
CELLS = Form(lambda t, _: _flat(t), _square, 2)  # [R, C, D] <-> [N, D]
ONE_CELLS = Form(lambda t, _: _flat(t)[None], lambda t: _square(t[0]), 3)  # <-> [1, N, D]


@dataclass(frozen=True)
class Entry:
    """Tensors of ours that are tensors of theirs: joined along the first axis and cut into as many as they have.

    Args:
        ours: names, `{i}` for the number of a layer.
        theirs: names, likewise.
        form: of each of theirs.
        parts: how the joined tensor falls into ours, as shares of its rows.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = AS_IS
    parts: tuple[int, ...] = (1,)

    def of_layer(self, number: int) -> "Entry":
        """Returns the entry with a layer's number in its names."""
        ours = tuple(n.replace("{i}", str(number)) for n in self.ours)
        return Entry(ours, tuple(n.replace("{i}", str(number)) for n in self.theirs), self.form, self.parts)

    def written(self, state: Mapping[str, Tensor], heads: int) -> Iterator[tuple[str, Tensor]]:
        """Yields name and tensor of theirs, each in memory of its own."""
        whole = state[self.ours[0]] if len(self.ours) == 1 else torch.cat([state[n] for n in self.ours])
        for name, piece in zip(self.theirs, whole.chunk(len(self.theirs)), strict=True):
            yield name, self.form.write(piece, heads).clone(memory_format=torch.contiguous_format)

    def read(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields name and tensor of ours.

        Raises:
            ValueError: if a tensor cannot have that form.
        """
        shapes = ", ".join(f"{n} {list(state[n].shape)}" for n in self.theirs)
        cannot = f"{shapes} cannot be read as {', '.join(self.ours)}"
        if any(not state[n].numel() or state[n].ndim != (self.form.axes or state[n].ndim) for n in self.theirs):
            raise ValueError(cannot)
        try:
            pieces = [self.form.read(state[n]) for n in self.theirs]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            share = whole.shape[0] // sum(self.parts) if whole.ndim else 0
            split = [whole] if len(self.ours) == 1 else whole.split([share * part for part in self.parts])
        except (RuntimeError, IndexError) as error:
            raise ValueError(cannot) from error
        yield from ((n, t.contiguous()) for n, t in zip(self.ours, split, strict=True))


def linear(ours: str, theirs: str) -> list[Entry]:
    """Entries of a layer whose weight and bias are called so in both libraries."""
    return [Entry((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def expanded(table: Sequence[Entry], depths: Mapping[str, int]) -> list[Entry]:
    """Returns the entries of all layers.

    Args:
        table: with `{i}` where a layer's number belongs.
        depths: layers of each tower, by the first word of our names: `vision`, `text`.
    """
    out = []
    for entry in table:
        tower = entry.ours[0].partition(".")[0]
        layers = range(depths.get(tower, 0))
        out += [entry.of_layer(i) for i in layers] if "{i}" in entry.ours[0] else [entry]
    return out


def depth_of(names: Iterable[str], pattern: str) -> int:
    """Returns how many layers there are, counted up to the largest number at `{i}`.

    Args:
        names: of tensors.
        pattern: what a layer's names begin with, as in a table.
    """
    regex = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return 1 + max((int(found[1]) for name in names if (found := regex.match(name))), default=-1)


def write_names(state: Mapping[str, Tensor], entries: Sequence[Entry], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns our tensors under the names of another library.

    Args:
        state: ours.
        entries: of all layers.
        heads: attention heads of each tower.
    """
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        theirs.update(entry.written(state, heads.get(entry.ours[0].partition(".")[0], 1)))
    return theirs


def read_names(state: Mapping[str, Tensor], entries: Sequence[Entry], *, place: str, like: str) -> dict[str, Tensor]:
    """Returns the tensors of another library under our names.

    Args:
        state: theirs.
        entries: of all layers.
        place: what messages call the file.
        like: what a message says beside, the nearest known shape.

    Raises:
        ValueError: if one is missing, or one is there that no entry knows; the first of both are listed.
    """
    expected = {name for entry in entries for name in entry.theirs}
    missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected)
    if not any(re.search(r"\bblocks\.0\.", name) for entry in entries for name in entry.ours):
        raise ValueError(f"{place} has no layers of a transformer. {like}")
    if missing or unknown:
        lines = [f"{len(names)} {word} ({_first(names)})" for word, names in _named(missing, unknown) if names]
        raise ValueError(
            f"{place} does not hold the tensors of a SigLIP: of {len(expected)} expected, {' and '.join(lines)}. "
            f"{like}. It may be cut short, or of another architecture"
        )
    ours: dict[str, Tensor] = {}
    for entry in entries:
        try:
            ours.update(entry.read(state))
        except ValueError as error:
            raise ValueError(f"{place}: {error}. {like}") from error
    return ours


def _named(missing: list[str], unknown: list[str]) -> list[tuple[str, list[str]]]:
    return [("are missing", missing), ("are unknown", unknown)]


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
