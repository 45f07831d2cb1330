"""`naflex`: every image keeps its aspect ratio, and batches differ in how many patches an image may have."""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.hooks import hookimpl
from siglip2.core.layout import Layout
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.plugin import Plugin
from siglip2.core.views import View

LENGTHS = (128, 256, 576, 784, 1024)  # SigLIP 2, section 2.4.2


@dataclass(frozen=True)
class NaFlexPatchifier:
    """Resizes images to the largest grid of about their aspect ratio within the batch's number of patches.

    Args:
        patch_size: side of a patch in pixels.
        table: side of the square position table.
        round: the layouts of one, each as often as it comes up in it; every round has an order of its own.
        eval_seq_len: patches per image in evaluation.
        max_scale: images are not enlarged beyond this factor; None for no limit.
        seed: of the order of layouts.
    """

    patch_size: int
    table: int
    round: tuple[Layout, ...]
    eval_seq_len: int
    max_scale: float | None
    seed: int

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the position table, which is resized to the grid of each image."""
        return self.table, self.table

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(self.round))

    def layout(self, index: int) -> Layout:
        number, place = divmod(index, len(self.round))
        return self.round[shuffled(self.seed, number, len(self.round))[place]]

    def eval_layout(self, batch_size: int) -> Layout:
        return Layout(self.eval_seq_len, batch_size)

    def __call__(self, image: Tensor, view: View, layout: Layout, rng: np.random.Generator | None = None) -> Patches:
        """Returns the patches [1, N, P] uint8 of an image [3, H, W] uint8, padded to the layout's length."""
        _, height, width = image.shape
        grid = native_grid(
            height, width, patch_size=self.patch_size, max_patches=layout.seq_len, max_scale=self.max_scale
        )
        return padded(native_patches(image, grid, self.patch_size), layout.seq_len)

    def contract(self) -> dict[str, object]:
        plain = asdict(self)
        # lengths are left out: any will do, trained on or not
        kept = {key: plain[key] for key in ("patch_size", "table", "max_scale")}
        return {"patchifier": "naflex", **kept, "filter": "bilinear", "antialias": True, "mean": 0.5, "std": 0.5}


@lru_cache(maxsize=8)
def shuffled(seed: int, number: int, length: int) -> tuple[int, ...]:
    """Returns the numbers 0 to length - 1 in the order of round `number`: the same in every process and release."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(number,))).random_raw(length)
    return tuple(np.argsort(bits, kind="stable").tolist())


class NaFlex(Plugin):
    """Images at their own aspect ratio, one sequence length per batch, padding masked (SigLIP 2, section 2.4.2).

    Lengths come in rounds: each occurs once in a round, or as often as `shares` says, in an order drawn for each round.

    Args:
        seq_lens: patches per image, one of them for each batch. SigLIP 2's five.
        batch_size: examples per step over all devices, whatever the length.
        batch_sizes: sequence length -> examples per step, where it differs. SigLIP 2 halves the batch of the longest.
        shares: sequence length -> how often it comes up in a round; 1 unless named. SigLIP 2 doubles the steps of the
            longest. How that goes with its uniform draw is not published.
        tokens: patches per step over all devices instead of `batch_size`: batches are as large as fits.
        divisor: with `tokens`, batch sizes are multiples of this.
        eval_seq_len: patches per image in evaluation and prediction. Any length works, best inside those trained on.
        patch_size: side of a patch in pixels.
        table: side of the square position table, resized to the grid of each image; 16 in SigLIP 2.
        max_scale: images are not enlarged beyond this factor; null fills every length, as published.
        seed: of the order of lengths, the same on all devices.
        start: leave at 0: a recipe always needs its patchifier.
        stop: leave at 1.

    Raises:
        ValueError: if an option is out of its range, or names a length that is not in `seq_lens`.
    """

    name = "naflex"

    def __init__(
        self,
        seq_lens: list[int] = list(LENGTHS),  # noqa: B006 - never written to
        batch_size: int = 32768,
        batch_sizes: dict[int, int] = {},  # noqa: B006 - never written to
        shares: dict[int, int] = {},  # noqa: B006 - never written to
        tokens: int | None = None,
        divisor: int = 8,
        eval_seq_len: int = 256,
        patch_size: int = 16,
        table: int = 16,
        max_scale: float | None = None,
        seed: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        if not seq_lens or len(set(seq_lens)) != len(seq_lens):
            raise ValueError(f"naflex: expected sequence lengths that differ, found seq_lens={seq_lens}")
        if beyond := sorted({*batch_sizes, *shares} - set(seq_lens)):
            raise ValueError(
                f"naflex: batch_sizes and shares name lengths ({', '.join(map(str, beyond))}) that are not among "
                f"seq_lens={seq_lens}: add them there, or name one of those"
            )
        numbers = {"batch_size": batch_size, "divisor": divisor, "eval_seq_len": eval_seq_len, "patch_size": patch_size}
        least = [*seq_lens, *batch_sizes.values(), *shares.values(), *numbers.values(), table]
        if min(least) < 1 or (max_scale is not None and max_scale <= 0) or seed < 0:
            raise ValueError(
                f"naflex: expected positive numbers and a seed of at least 0, found seq_lens={seq_lens}, "
                f"batch_sizes={batch_sizes}, shares={shares}, table={table}, max_scale={max_scale}, seed={seed}, "
                + ", ".join(f"{key}={value}" for key, value in numbers.items())
            )
        longest = max((n for n in seq_lens if n not in batch_sizes), default=0)
        if tokens is not None and tokens < longest * divisor:
            raise ValueError(
                f"naflex: {tokens} tokens per step hold no batch of {divisor} (the divisor) images with {longest} "
                f"patches: set tokens to at least {longest * divisor}"
            )
        fits = {n: batch_size if tokens is None else tokens // n // divisor * divisor for n in seq_lens}
        sizes = {**fits, **batch_sizes}
        layouts = tuple(Layout(n, sizes[n]) for n in seq_lens for _ in range(shares.get(n, 1)))
        self._patchifier = NaFlexPatchifier(patch_size, table, layouts, eval_seq_len, max_scale, seed)

    @hookimpl
    def patchifier(self) -> NaFlexPatchifier:
        return self._patchifier
