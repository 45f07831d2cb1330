"""Pictures out of files, folders, tables and shards, as spans that a loader worker makes patches of."""

# b pictures of a span, N patches

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from siglip2.core.batch import Patches, collate
from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.data.predicting import SUFFIXES, find_pictures
from siglip2.core.data.source import Source, open_source
from siglip2.core.data.storage import MAX_BYTES, is_local, read_for
from siglip2.core.layout import Patchifier
from siglip2.core.views import IMAGE

DATA = (".tar", ".csv", ".tsv")


class PictureFiles:
    """Picture files as a source; a sample's key is its path.

    Args:
        specs: files, globs or folders, with the folders in them.

    Raises:
        FileNotFoundError: if one of them leads to no picture.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self.name, self.paths = " ".join(specs), all_pictures(specs)

    def __len__(self) -> int:
        return len(self.paths)

    def shard_sizes(self) -> list[int]:
        """One shard: all files."""
        return [len(self)]

    def read(self, i: int) -> Sample:
        """File i; BadSample if it is missing or too large."""
        sample = Sample(self.paths[i], os.path.dirname(self.paths[i]), {})
        sample.record["jpg"] = read_for(sample, self.paths[i], max_bytes=MAX_BYTES)  # what it is, its bytes tell
        return sample


def all_pictures(specs: Sequence[str]) -> list[str]:
    """Returns the picture files behind files, globs and folders, with the folders in them, in order.

    Hidden files and folders are left out, as `siglip2 embed` does.

    Raises:
        FileNotFoundError: if one of them leads to no picture.
    """
    found: list[str] = []
    for spec in specs:
        inside = _below(spec) if os.path.isdir(spec) else [str(path) for path in find_pictures([spec])]
        if not inside:
            raise FileNotFoundError(f"no picture in '{spec}' or the folders in it ({', '.join(SUFFIXES)})")
        found += inside
    return found


def _below(root: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [os.path.join(folder, name) for name in pictures]
    return sorted(found)


def open_pictures(specs: Sequence[str], *, fields: Fields | None = None) -> Source:
    """Opens pictures, whatever they are stored as.

    Args:
        specs: image files, globs and folders of them, with the folders in those; or shards (brace notation, a folder of
            *.tar, `a::b`, any fsspec URL) or one table.
        fields: where the picture is found in a sample of shards or a table.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if pictures and data sets are mixed.
    """
    data = [spec for spec in specs if _is_data(spec)]
    if not data:
        return PictureFiles(specs)
    if len(data) < len(specs):
        files = [spec for spec in specs if spec not in data]
        raise ValueError(f"expected picture files, or shards and tables, found both: {files[0]} and {data[0]}")
    return open_source(data if len(data) > 1 else data[0], fields=fields)


def _is_data(spec: str) -> bool:
    if "::" in spec or not is_local(spec) or spec.endswith(DATA):
        return True
    return os.path.isdir(spec) and any(name.endswith(".tar") for name in os.listdir(spec))


@dataclass(frozen=True)
class Span:
    """What a loader worker makes of some samples in a row.

    Args:
        places: (shard or folder, key) of each.
        image: those that could be read, in order; None if there are none.
        seen: which samples those are, counted from the first of the span.
        failures: (sample, reason) of the others.
    """

    places: tuple[tuple[str, str], ...]
    image: Patches | None
    seen: tuple[int, ...]
    failures: tuple[tuple[int, str], ...]

    def pin_memory(self) -> "Span":
        """Returns the span in page-locked memory (called by torch's DataLoader)."""
        return replace(self, image=None if self.image is None else self.image.apply(lambda t: t.pin_memory()))


class Spans(Dataset[Span]):
    """A source in stored order, some samples at a time.

    Args:
        source: the pictures.
        patchifier: the model's.
        size: samples of a span.
    """

    def __init__(self, source: Source, patchifier: Patchifier, size: int) -> None:
        self.source, self.patchifier, self.size = source, patchifier, size
        self.layout = patchifier.eval_layout(size)

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def __getitem__(self, index: int) -> Span:
        if index >= len(self):
            raise IndexError(index)
        first = index * self.size
        places, images, failures = [], {}, []
        for row in range(min(self.size, len(self.source) - first)):
            try:
                sample = self.source.read(first + row)
                places.append((sample.where, sample.key))
                images[row] = self.patchifier(sample.image(), IMAGE, self.layout)
            except BadSample as bad:
                places[row:] = [(bad.where, bad.key)]
                failures.append((row, bad.reason))
            except (OSError, ValueError) as error:  # a shard that cannot be read: each of its samples says so
                places[row:] = [(self.source.name, f"sample {first + row}")]
                failures.append((row, str(error)))
        image = collate([{IMAGE.name: one} for one in images.values()])[IMAGE.name] if images else None
        return Span(tuple(places), image, tuple(images), tuple(failures))
