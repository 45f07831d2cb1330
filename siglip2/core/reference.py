"""A frozen model of ours that scores examples for the one that is trained: its towers, and images as it reads them."""

# N patches, P patch values

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from siglip2.core.batch import Patches
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.text import Tokenizer
from siglip2.core.layout import Patchifier
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import TwoTowers, build_two_towers
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.square import square_patches
from siglip2.core.views import Context, View

if TYPE_CHECKING:
    from siglip2.core.data.fields import Sample

log = logging.getLogger(__name__)
SMALL = 2**16  # values of a tensor
Pixels = Mapping[str, Any]
"""A pixel contract, as `Patchifier.contract` returns it and as a checkpoint keeps it."""


class Reference(nn.Module):
    """Two trained towers that are only asked: frozen, always in evaluation mode, and in no checkpoint.

    They move, shard and compile with the module that they are part of, whose state dicts neither have nor need them.

    Args:
        towers: with temperature and bias of their own.
        pixels: the contract of the images that they were trained on.
    """

    def __init__(self, towers: TwoTowers, pixels: Pixels):
        super().__init__()
        self.towers, self.pixels = towers.requires_grad_(False), dict(pixels)
        self.fingerprint = _fingerprint(towers)  # now, while its tensors are whole
        self._prefix = ""
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_note_prefix)
        self.register_load_state_dict_post_hook(_miss_nothing)
        self.train()

    def train(self, mode: bool = True) -> "Reference":
        """Stays in evaluation mode."""
        return super().train(False)


def _fingerprint(towers: TwoTowers) -> str:
    """What changes when the weights do: a digest of the small tensors, every one of which is trained."""
    digest = hashlib.sha256()
    for name, tensor in towers.named_parameters():
        if tensor.numel() <= SMALL:
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _note_prefix(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module._prefix = prefix  # which the hook behind is not told


def _miss_nothing(module: Any, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.startswith(module._prefix)]


def load_reference(
    path: str, tokenizer: Tokenizer, patchifier: Patchifier, *, fused_attention: bool = True
) -> Reference:
    """Builds the towers of a checkpoint out of the file alone, whatever their size, patch size and resolution.

    Args:
        path: a checkpoint of ours, local or an fsspec URL.
        tokenizer: of the run, whose texts it is to read.
        patchifier: of the run; if the checkpoint has its pixel contract, it may be of any kind.
        fused_attention: attention through torch's fused kernel.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ours, was trained with another text contract, or on images that cannot be
            made here.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint["siglip2"]
    if differences := tokenizer.differences(Tokenizer.from_state(ours["text"])):
        raise ValueError(
            f"the reference {path} reads other texts than this run: {'; '.join(differences)}. Take one that was "
            f"trained with this tokenizer, or --data.tokenizer {path} and data.text as it has them"
        )
    patch_size, grid = _shape_of(path, ours["pixels"], patchifier)
    model = ours["recipe"]["model"]
    with torch.random.fork_rng(devices=[]):  # the run's own parameters are drawn as they are without a reference
        towers = build_two_towers(
            model["size"],
            patch_size=patch_size,
            grid=grid,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.contract.length,
            vision=ShapeOptions(**model.get("vision", {})),
            text=ShapeOptions(**model.get("text", {})),
            timm_name=model.get("timm"),
            fused_attention=fused_attention,
        )
    saved = checkpoint["state_dict"].items()
    towers.load_state_dict({name.removeprefix("model."): t for name, t in saved if name.startswith("model.")})
    values = sum(parameter.numel() for parameter in towers.parameters())
    log.info("reference %s: %s, %.1f M parameters, frozen", path, model.get("timm") or model["size"], values / 1e6)
    return Reference(towers, ours["pixels"])


def _shape_of(path: str, pixels: Pixels, patchifier: Patchifier) -> tuple[int, tuple[int, int]]:
    """Patch size and position grid of the towers that were trained on such images."""
    if pixels == patchifier.contract():
        return patchifier.patch_size, patchifier.grid
    if not _known(pixels):
        raise ValueError(
            f"the reference {path} was trained on images of the patchifier '{pixels.get('patchifier')}', which cannot "
            f"be made here: expected squares or native grids, or the pixel contract of this run"
        )
    side = pixels["table"] if "table" in pixels else pixels["image_size"] // pixels["patch_size"]
    return pixels["patch_size"], (side, side)


def _known(pixels: Pixels) -> bool:
    """Whether `contract_view` can make such images."""
    return "patch_size" in pixels and ("table" in pixels or "image_size" in pixels)


@dataclass(frozen=True)
class SquareView:
    """The whole image squashed to a square: patches [1, N, P] uint8, in a size of the view's own.

    Args:
        name: the key under which the step finds it.
        side: of the square in pixels.
        patch_size: side of a patch in pixels.
        filter: of the resize, bilinear or bicubic.
        antialias: whether the resize is antialiased.
    """

    name: str
    side: int
    patch_size: int
    filter: str
    antialias: bool
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Patches:
        image = sample.image()
        return square_patches(image, self.side, self.patch_size, filter=self.filter, antialias=self.antialias)


@dataclass(frozen=True)
class NativeView:
    """The whole image at about its own aspect ratio: patches [1, N, P] uint8, padded to a length of the view's own.

    Args:
        name: the key under which the step finds it.
        seq_len: N, patches at most.
        patch_size: side of a patch in pixels.
        max_scale: images are not enlarged beyond this factor; None for no limit.
    """

    name: str
    seq_len: int
    patch_size: int
    max_scale: float | None
    copies: int = 1

    def __call__(self, sample: "Sample", context: Context) -> Patches:
        image = sample.image()
        _, height, width = image.shape
        limits = {"max_patches": self.seq_len, "max_scale": self.max_scale}
        grid = native_grid(height, width, patch_size=self.patch_size, **limits)  # type: ignore[arg-type]
        return padded(native_patches(image, grid, self.patch_size), self.seq_len)


def contract_view(name: str, pixels: Pixels, tokens: int | None = None) -> View:
    """Returns a view of the whole image as a pixel contract makes it, in any recipe.

    Args:
        name: of the view.
        pixels: the contract of a patchifier of squares or of native grids.
        tokens: patches per image instead of the contract's own number (of squares) or of its position table.

    Raises:
        ValueError: if images of such a contract cannot be made here, or `tokens` patches are no square.
    """
    if not _known(pixels):
        raise ValueError(
            f"images of the patchifier '{pixels.get('patchifier')}' cannot be made in another size: expected one of "
            f"squares or of native grids"
        )
    patch_size = pixels["patch_size"]
    if "table" in pixels:
        return NativeView(name, tokens or pixels["table"] ** 2, patch_size, pixels["max_scale"])
    if tokens is None:
        return SquareView(name, pixels["image_size"], patch_size, pixels["filter"], pixels["antialias"])
    rows = math.isqrt(tokens)
    if rows * rows != tokens:
        raise ValueError(
            f"images are squashed to squares, and {tokens} patches are none: take {rows**2} or {(rows + 1) ** 2}"
        )
    return SquareView(name, rows * patch_size, patch_size, pixels["filter"], pixels["antialias"])
