"""What was written, loaded by the library it was written for and compared with our towers on random inputs."""

# B images, T texts, N patches, E embedding dimension, S side in pixels

import contextlib
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.data.text import Tokenizer
from siglip2.core.functional import grid_coords, pair_logits, patchify
from siglip2.core.interop import open_clip
from siglip2.core.interop.weights import Weights
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.model.vision import to_unit_range
from siglip2.core.native import padded

COUNT = 3  # images, and texts
SAMPLES = (
    "A red disc, number 3!",
    "",
    "  two  spaces, snake_case & kebab-case  ",
    "<eos> is spelled <pad>",
    "Größe ÄÖÜ, ÉCOLE, РУССКИЙ",
    "日本語のキャプション。中文",
    "한국어 ภาษาไทย हिन्दी",
    "עברית العربية",
    "🙂 👩🏽‍🚀 🇩🇪",
    "1234567890 3.14",
    "very long " * 100,
)


@dataclass(frozen=True)
class Parity:
    """The largest differences between a library's outputs and ours, in float32 on a CPU.

    Args:
        library: name and version.
        image: of unit-norm image embeddings.
        text: of unit-norm text embeddings; None without a text tower.
        logits: of all pairs; None likewise.
        other_ids: how many of `SAMPLES` the library's tokenizer makes other ids of; None if it was not asked.
    """

    library: str
    image: float
    text: float | None = None
    logits: float | None = None
    other_ids: int | None = None

    @property
    def largest(self) -> float:
        """The largest of all embeddings."""
        return max(self.image, self.text or 0.0)

    def __str__(self) -> str:
        parts = {"image embeddings": self.image, "text embeddings": self.text, "logits": self.logits}
        listed = ", ".join(f"{name} {value:.1e}" for name, value in parts.items() if value is not None)
        ids = "" if self.other_ids is None else f"; other ids for {self.other_ids} of {len(SAMPLES)} odd texts"
        return f"{self.library}: {listed}{ids}"


@dataclass(frozen=True)
class Inputs:
    """Random pictures and texts for some weights.

    Args:
        images: as our towers take them.
        ids: integer [T, length]; None without a text tower.
        pixels: the same pictures, [B, 3, S, S] in [-1, 1]; None where they keep their aspect ratio.
    """

    images: Patches
    ids: Tensor | None
    pixels: Tensor | None


def random_inputs(weights: Weights) -> Inputs:
    """Returns the inputs of a comparison, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    ids = None
    if weights.text is not None:
        ids = torch.randint(weights.vocab_size, (COUNT, weights.context_length), generator=generator)
        ids[0, weights.context_length // 2 :] = 0
    side, (rows, columns), patch = weights.image_size, weights.grid, weights.patch_size
    if not weights.native:
        pixels = torch.randint(256, (COUNT, 3, side, side), generator=generator, dtype=torch.uint8)
        images = Patches(patchify(pixels, patch), grid_coords(rows, columns)[None], None, (rows, columns))
        return Inputs(images, ids, to_unit_range(pixels))
    # never one column: torch 2.9 resizes an antialiased table to width 1 wrongly, in the libraries that ask it to
    grids = [(rows, columns), (max(1, rows // 2), columns + 1), (rows + 1, max(2, columns // 3))]
    each = []
    for grid in grids:
        shape = (1, grid[0] * grid[1], patch * patch * 3)
        patches = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        each.append(Patches(patches, grid_coords(*grid)[None], sizes=torch.tensor([[grid]], dtype=torch.int16)))
    longest = max(p.patches.shape[1] for p in each) + 1  # so that each of them is padded
    filled = [padded(p, longest) for p in each]
    patches, coords = (torch.cat([getattr(p, name) for p in filled]) for name in ("patches", "coords"))
    valid, sizes = (torch.cat([getattr(p, name) for p in filled]) for name in ("valid", "sizes"))
    return Inputs(Patches(patches, coords, valid, sizes=sizes), ids, None)


@torch.no_grad()
def transformers_parity(weights: Weights, folder: Path) -> Parity | None:
    """Compares with the model that `AutoModel` loads from a folder; None if transformers is not installed."""
    if not _installed("transformers"):
        return None
    from transformers import AutoModel, AutoTokenizer

    inputs = random_inputs(weights)
    with _without_bars():
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    if inputs.pixels is not None:
        answer = model(input_ids=inputs.ids, pixel_values=inputs.pixels)
    else:
        assert inputs.images.valid is not None
        assert inputs.images.sizes is not None
        answer = model(
            input_ids=inputs.ids,
            pixel_values=to_unit_range(inputs.images.patches),
            pixel_attention_mask=inputs.images.valid.int(),
            spatial_shapes=inputs.images.sizes[:, 0].long(),
        )
    theirs = (answer.image_embeds, answer.text_embeds, answer.logits_per_image)
    found = _compared("transformers", weights, inputs, *theirs)
    if weights.tokenizer is None or not (folder / "tokenizer.json").is_file():
        return found
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(list(SAMPLES), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return replace(found, other_ids=_other_ids(weights.tokenizer, ids))


def open_clip_parity(weights: Weights, folder: Path) -> Parity | None:
    """Compares with the model that open_clip loads from a folder; None if it is not installed."""
    if not _installed("open_clip"):
        return None
    from open_clip import create_model, get_tokenizer

    found = _against_open_clip("open_clip", weights, create_model(f"local-dir:{folder}"))
    if weights.tokenizer is None or not (folder / "tokenizer.json").is_file():
        return found
    ids = get_tokenizer(f"local-dir:{folder}")(list(SAMPLES))
    return replace(found, other_ids=_other_ids(weights.tokenizer, ids))


def big_vision_parity(weights: Weights, folder: Path) -> Parity | None:
    """Compares with what open_clip's own reader makes of an npz file; None if it is not installed, or for NaFlex.

    big_vision itself is no package that could be installed.
    """
    if weights.native or not _installed("open_clip"):
        return None
    from open_clip import create_model
    from open_clip.convert import load_big_vision_weights

    text = replace(weights.text, gelu="tanh") if weights.text else None
    as_there = replace(weights, vision=replace(weights.vision, gelu="tanh"), text=text)  # big_vision has no other
    with tempfile.TemporaryDirectory() as empty, _silence():
        open_clip.write_config(as_there, Path(empty))
        model = create_model(f"local-dir:{empty}")
    load_big_vision_weights(model, str(folder / "model.npz"))
    return _against_open_clip("open_clip's reader of npz files", weights, model)


@torch.no_grad()
def timm_parity(weights: Weights, folder: Path) -> Parity:
    """Compares with the trunk that timm loads from a folder."""
    import timm

    inputs = random_inputs(weights)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return _compared("timm", weights, inputs, unit_norm(model.float().eval()(_timm_images(inputs))), None, None)


def _timm_images(inputs: Inputs) -> Any:
    images = inputs.images
    if inputs.pixels is not None:
        side = inputs.images.grid[0] * round((images.patches.shape[-1] / 3) ** 0.5)  # type: ignore[index]
        return inputs.pixels[..., :side, :side]  # as much as whole patches cover, which is all that any tower reads
    coords, valid = images.coords.long(), images.valid
    return {"patches": to_unit_range(images.patches), "patch_coord": coords, "patch_valid": valid}


@torch.no_grad()
def _against_open_clip(name: str, weights: Weights, model: Any) -> Parity:
    inputs = random_inputs(weights)
    model.float().eval()
    image, text = model.encode_image(_timm_images(inputs)), model.encode_text(inputs.ids)
    image, text = (torch.nn.functional.normalize(z, dim=-1) for z in (image, text))
    logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    return _compared(name, weights, inputs, image, text, logits)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without open_clip's warning that a model without weights is a random one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _compared(
    name: str, weights: Weights, inputs: Inputs, image: Tensor, text: Tensor | None, logits: Tensor | None
) -> Parity:
    version = importlib.metadata.version("open_clip_torch" if name.startswith("open_clip") else name)
    library = f"{name} {version}" if " " not in name else f"{name} (open_clip {version})"
    z_image = unit_norm(weights.vision_tower()(inputs.images).pooled)
    if inputs.ids is None or text is None or logits is None:
        return Parity(library, _apart(image, z_image))
    towers = weights.towers()
    z_text = towers.encode_text(inputs.ids).embedding
    ours = pair_logits(z_image, z_text, scale=towers.logit_scale, bias=towers.logit_bias)
    return Parity(library, _apart(image, z_image), _apart(text, z_text), _apart(logits, ours))


def _other_ids(tokenizer: Tokenizer, ids: Tensor) -> int:
    return int((tokenizer.encode(SAMPLES) != ids).any(dim=-1).sum())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


CHECKS: dict[str, Callable[[Weights, Path], Parity | None]] = {
    "hf": transformers_parity,
    "open_clip": open_clip_parity,
    "timm": timm_parity,
    "big_vision": big_vision_parity,
}
