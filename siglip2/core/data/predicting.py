"""Pictures given by hand, as batches of one."""

import glob
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from siglip2.core.batch import Batch
from siglip2.core.data.image_io import decode_image
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.views import IMAGE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find_pictures(specs: Sequence[str]) -> list[Path]:
    """Returns the image files behind files, globs and folders, in order.

    Raises:
        FileNotFoundError: if one of them leads to no image.
    """
    found: list[Path] = []
    for spec in specs:
        path = Path(spec)
        inside = sorted(path.iterdir()) if path.is_dir() else sorted(Path(p) for p in glob.glob(spec))
        pictures = [p for p in inside if p.suffix.lower() in SUFFIXES] if path.is_dir() else inside
        if not pictures:
            raise FileNotFoundError(f"no picture at '{spec}': give an image file, a glob, or a folder of images")
        found += pictures
    return found


class PicturesToRank(Dataset[Batch]):
    """One picture per batch, its path as the key.

    Args:
        specs: files, globs or folders.
        patchifier: the recipe's patchifier.
        layout: the layout that the pictures are encoded in.
    """

    def __init__(self, specs: Sequence[str], patchifier: Patchifier, layout: Layout):
        self.paths, self.patchifier, self.layout = find_pictures(specs), patchifier, layout

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self.paths):
            raise IndexError(index)
        path = self.paths[index]
        try:
            image = decode_image(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        patches = self.patchifier(image, IMAGE, self.layout)
        return Batch({IMAGE.name: patches}, 1, index, (str(path),))
