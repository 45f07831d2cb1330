"""`navit`: every image keeps its aspect ratio and has a resolution of its own, and several share a row."""

# R rows, S patches of a row, N patches of an image, P patch values

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.hooks import hookimpl
from siglip2.core.layout import Layout
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.packing import pack_groups, packed, rows_for
from siglip2.core.plugin import Plugin
from siglip2.core.views import View

DROP_SPREAD = 0.3  # variance of the dropped share, as a share of the largest possible (NaViT, appendix A.4)


@dataclass(frozen=True)
class NaViTPatchifier:
    """Draws a resolution for each image in training, and puts several images into a row.

    Args:
        patch_size: side of a patch in pixels.
        table: side of the square position table.
        training: the layout of every training batch.
        sides: smallest and largest side of the square that has an image's area, in pixels.
        max_tokens: patches per image in training, at most.
        group: consecutive images that are packed together.
        rows: of a whole group.
        slots: images per row, at most.
        drop_mean: mean share of dropped patches; 0 drops none.
        drop_max: largest share.
        eval_seq_len: patches per image in evaluation.
        max_scale: images are not enlarged beyond this factor; None for no limit.
    """

    patch_size: int
    table: int
    training: Layout
    sides: tuple[float, float]
    max_tokens: int
    group: int
    rows: int
    slots: int
    drop_mean: float
    drop_max: float
    eval_seq_len: int
    max_scale: float | None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the position table, which is resized to the grid of each image."""
        return self.table, self.table

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (self.layout(0),)

    def layout(self, index: int) -> Layout:
        return self.training

    def eval_layout(self, batch_size: int) -> Layout:
        return Layout(self.eval_seq_len, batch_size)

    def __call__(self, image: Tensor, view: View, layout: Layout, rng: np.random.Generator | None = None) -> Patches:
        """Returns the patches [1, N, P] uint8 of an image [3, H, W] uint8.

        In a packed layout as many as were drawn, not padded; else padded to the layout's length, and nothing is drawn.
        """
        if not layout.packed:
            return padded(self._resized(image, layout.seq_len), layout.seq_len)
        if rng is None:
            raise ValueError("navit: the resolution of an image in a packed batch is drawn, so `rng` is needed")
        side = rng.uniform(*self.sides)
        budget = max(1, round((side / self.patch_size) ** 2))
        return self._thinned(self._resized(image, min(budget, self.max_tokens)), rng)

    def _resized(self, image: Tensor, max_patches: int) -> Patches:
        _, height, width = image.shape
        grid = native_grid(height, width, patch_size=self.patch_size, max_patches=max_patches, max_scale=self.max_scale)
        return native_patches(image, grid, self.patch_size)

    def _thinned(self, image: Patches, rng: np.random.Generator) -> Patches:
        if self.drop_mean == 0:
            return image
        count = image.patches.shape[1]
        kept = max(1, round(count * (1 - dropped_share(rng, mean=self.drop_mean, most=self.drop_max))))
        which = torch.from_numpy(np.sort(rng.permutation(count)[:kept]))
        return replace(image, patches=image.patches[:, which], coords=image.coords[:, which])

    def pack(self, images: Sequence[Patches], layout: Layout) -> Patches:
        """Returns images [1, N, P], each of any N, as rows [R, S, P]; R follows from their number alone."""
        lengths = [image.patches.shape[1] for image in images]
        places = pack_groups(lengths, group=self.group, rows=self.rows, seq_len=layout.seq_len, slots=self.slots)
        rows = rows_for(len(images), group=self.group, rows=self.rows)
        return packed(images, places, rows=rows, seq_len=layout.seq_len, slots=self.slots, longest=self.max_tokens)

    def contract(self) -> dict[str, object]:
        plain = asdict(self)
        # what is drawn in training is left out: any resolution will do
        kept = {key: plain[key] for key in ("patch_size", "table", "max_scale")}
        return {"patchifier": "navit", **kept, "filter": "bilinear", "antialias": True, "mean": 0.5, "std": 0.5}


def dropped_share(rng: np.random.Generator, *, mean: float, most: float) -> float:
    """Returns which share of an image's patches is dropped: `most` times a Beta variable.

    Source: NaViT, https://arxiv.org/abs/2307.06304, appendix A.4: u ~ Beta(a, b) with mean m = mean / most and variance
    0.3 m (1 - m), so that a + b = 1 / 0.3 - 1.

    Args:
        rng: random numbers.
        mean: of the share, in (0, most).
        most: largest share, in (0, 1].
    """
    weight, m = 1 / DROP_SPREAD - 1, mean / most
    return most * float(rng.beta(m * weight, (1 - m) * weight))


class NaViT(Plugin):
    """Images at their own aspect ratio and at resolutions that are drawn, several in one row (NaViT, arXiv 2307.06304).

    Each image reads only itself, in attention and in pooling. Rows are fixed in number, so that every batch has the
    same shapes: images are packed in groups, the longest first. If a group has more patches than its rows hold, each
    of its images loses the same share of them, spread over the image; none is left out. With the defaults and aspect
    ratios as of photographs about 6 % of the rows stay empty and 1 % of the patches is lost; fewer images per row lose
    less and leave more empty, larger groups improve both. Evaluation is as with `naflex`: nothing is drawn or packed.

    Args:
        seq_len: patches per row; 256 in NaViT with patches of 16 px (table 2, contrastive), where rows are said to hold
            5 images, which takes dropping.
        batch_size: examples per step over all devices.
        min_side: smallest side in pixels of the square that has the drawn area; 64 in NaViT (section 3.2).
        max_side: largest; the side is drawn evenly between the two. 256 in NaViT's classification setting.
        max_tokens: patches per image at most; null takes `seq_len`.
        images_per_row: in the mean, which fixes the number of rows. Ours, for the default sides; with half of the
            patches dropped 4.5 fit, and 16 slots.
        slots: images that one row holds at most. Ours; room that is not used costs only pooling.
        group: consecutive images of a device that are packed together. Ours. If each device's share of the batch is a
            multiple of it, the number of devices changes nothing.
        drop_mean: mean share of each image's patches that is dropped in training, at random; 0 drops none.
        drop_max: largest share, drawn for each image from a Beta distribution (NaViT, appendix A.4). 0.9 is ours.
        eval_seq_len: patches per image in evaluation and prediction; 256 comes close to an image's own resolution
            (NaViT, appendix C).
        patch_size: side of a patch in pixels.
        table: side of the square position table, resized to the grid of each image. SigLIP 2's, not NaViT's factorised
            positions.
        max_scale: images are not enlarged beyond this factor; null enlarges them to what was drawn.
        start: leave at 0: a recipe always needs its patchifier.
        stop: leave at 1.

    Raises:
        ValueError: if an option is out of its range, or the rows have no room for the images.
    """

    name = "navit"

    def __init__(
        self,
        seq_len: int = 256,
        batch_size: int = 32768,
        min_side: float = 64,
        max_side: float = 256,
        max_tokens: int | None = None,
        images_per_row: float = 2.25,
        slots: int = 8,
        group: int = 128,
        drop_mean: float = 0.0,
        drop_max: float = 0.9,
        eval_seq_len: int = 256,
        patch_size: int = 16,
        table: int = 16,
        max_scale: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        longest = seq_len if max_tokens is None else max_tokens
        numbers = {
            "seq_len": seq_len,
            "batch_size": batch_size,
            "max_tokens": longest,
            "group": group,
            "eval_seq_len": eval_seq_len,
            "patch_size": patch_size,
            "table": table,
        }
        if min(numbers.values()) < 1 or (max_scale is not None and max_scale <= 0):
            shown = ", ".join(f"{key}={value}" for key, value in numbers.items())
            raise ValueError(f"navit: expected positive numbers, found {shown}, max_scale={max_scale}")
        if not 0 < min_side <= max_side:
            raise ValueError(
                f"navit: expected 0 < min_side <= max_side, found min_side={min_side}, max_side={max_side}"
            )
        if longest > seq_len or not 1 <= images_per_row <= slots <= seq_len:
            raise ValueError(
                f"navit: expected max_tokens <= seq_len and 1 <= images_per_row <= slots <= seq_len, found "
                f"max_tokens={longest}, images_per_row={images_per_row}, slots={slots}, seq_len={seq_len}"
            )
        if not 0 <= drop_mean < drop_max <= 1:
            raise ValueError(
                f"navit: expected 0 <= drop_mean < drop_max <= 1, found drop_mean={drop_mean}, drop_max={drop_max}"
            )
        self._patchifier = NaViTPatchifier(
            patch_size=patch_size,
            table=table,
            training=Layout(seq_len, batch_size, packed=True),
            sides=(min_side, max_side),
            max_tokens=longest,
            group=group,
            rows=math.ceil(group / images_per_row),
            slots=slots,
            drop_mean=drop_mean,
            drop_max=drop_max,
            eval_seq_len=eval_seq_len,
            max_scale=max_scale,
        )

    @hookimpl
    def patchifier(self) -> NaViTPatchifier:
        return self._patchifier
