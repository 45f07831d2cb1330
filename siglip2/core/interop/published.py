"""The shapes of all released SigLIP and SigLIP 2 checkpoints, and what three libraries call them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from siglip2.core.model.sizes import SIZES, Shape

GEMMA, C4, MC4 = 256_000, 32_000, 250_000  # ids of the three vocabularies


@dataclass(frozen=True)
class Published:
    """A released checkpoint.

    Args:
        size: name of the size, in `SIZES`.
        side: rows and columns of its position table.
        image_size: side of its pictures in pixels; None where they keep their aspect ratio.
        huggingface: repository at the Hugging Face hub.
        open_clip: architecture in open_clip.
        timm: architecture of its vision tower in timm.
        vocab_size: ids.
        context_length: ids per text.
    """

    size: str
    side: int
    image_size: int | None
    huggingface: str
    open_clip: str
    timm: str
    vocab_size: int = GEMMA
    context_length: int = 64

    @property
    def vision(self) -> Shape:
        return SIZES[self.size].vision

    @property
    def text(self) -> Shape:
        return SIZES[self.size].text

    @property
    def patch_size(self) -> int:
        return SIZES[self.size].patch_size


def _fixed(size: str, image_size: int, hf: str, open_clip: str, timm: str, **text: int) -> Published:
    side = image_size // SIZES[size].patch_size
    return Published(size, side, image_size, f"google/{hf}", f"ViT-{open_clip}", f"vit_{timm}", **text)


def _native(size: str, hf: str, open_clip: str, timm: str) -> Published:
    return Published(size, 16, None, f"google/{hf}", f"ViT-{open_clip}", f"naflexvit_{timm}")


SIGLIP2 = (
    _fixed("B/32", 256, "siglip2-base-patch32-256", "B-32-SigLIP2-256", "base_patch32_siglip_256"),
    _fixed("B/16", 224, "siglip2-base-patch16-224", "B-16-SigLIP2", "base_patch16_siglip_224"),
    _fixed("B/16", 256, "siglip2-base-patch16-256", "B-16-SigLIP2-256", "base_patch16_siglip_256"),
    _fixed("B/16", 384, "siglip2-base-patch16-384", "B-16-SigLIP2-384", "base_patch16_siglip_384"),
    _fixed("B/16", 512, "siglip2-base-patch16-512", "B-16-SigLIP2-512", "base_patch16_siglip_512"),
    _fixed("L/16", 256, "siglip2-large-patch16-256", "L-16-SigLIP2-256", "large_patch16_siglip_256"),
    _fixed("L/16", 384, "siglip2-large-patch16-384", "L-16-SigLIP2-384", "large_patch16_siglip_384"),
    _fixed("L/16", 512, "siglip2-large-patch16-512", "L-16-SigLIP2-512", "large_patch16_siglip_512"),
    _fixed("So400m/14", 224, "siglip2-so400m-patch14-224", "SO400M-14-SigLIP2", "so400m_patch14_siglip_224"),
    # 27 x 27 patches of 14 px: six of the 384 px are dropped, and two libraries call it 378
    _fixed("So400m/14", 384, "siglip2-so400m-patch14-384", "SO400M-14-SigLIP2-378", "so400m_patch14_siglip_378"),
    _fixed("So400m/16", 256, "siglip2-so400m-patch16-256", "SO400M-16-SigLIP2-256", "so400m_patch16_siglip_256"),
    _fixed("So400m/16", 384, "siglip2-so400m-patch16-384", "SO400M-16-SigLIP2-384", "so400m_patch16_siglip_384"),
    _fixed("So400m/16", 512, "siglip2-so400m-patch16-512", "SO400M-16-SigLIP2-512", "so400m_patch16_siglip_512"),
    _fixed("g-opt/16", 256, "siglip2-giant-opt-patch16-256", "gopt-16-SigLIP2-256", "giantopt_patch16_siglip_256"),
    _fixed("g-opt/16", 384, "siglip2-giant-opt-patch16-384", "gopt-16-SigLIP2-384", "giantopt_patch16_siglip_384"),
    _native("B/16", "siglip2-base-patch16-naflex", "B-16-SigLIP2-naflex", "base_patch16_siglip"),
    _native("So400m/16", "siglip2-so400m-patch16-naflex", "SO400M-16-SigLIP2-naflex", "so400m_patch16_siglip"),
)
_C4: dict[str, int] = {"vocab_size": C4}
_C4_SHORT: dict[str, int] = {"vocab_size": C4, "context_length": 16}
_MC4: dict[str, int] = {"vocab_size": MC4}
SIGLIP1 = (
    _fixed("B/16", 224, "siglip-base-patch16-224", "B-16-SigLIP", "base_patch16_siglip_224", **_C4),
    _fixed("B/16", 256, "siglip-base-patch16-256", "B-16-SigLIP-256", "base_patch16_siglip_256", **_C4),
    _fixed("B/16", 384, "siglip-base-patch16-384", "B-16-SigLIP-384", "base_patch16_siglip_384", **_C4),
    _fixed("B/16", 512, "siglip-base-patch16-512", "B-16-SigLIP-512", "base_patch16_siglip_512", **_C4),
    _fixed("L/16", 256, "siglip-large-patch16-256", "L-16-SigLIP-256", "large_patch16_siglip_256", **_C4),
    _fixed("L/16", 384, "siglip-large-patch16-384", "L-16-SigLIP-384", "large_patch16_siglip_384", **_C4),
    _fixed("So400m/14", 224, "siglip-so400m-patch14-224", "SO400M-14-SigLIP", "so400m_patch14_siglip_224", **_C4_SHORT),
    _fixed("So400m/14", 384, "siglip-so400m-patch14-384", "SO400M-14-SigLIP-384", "so400m_patch14_siglip_384", **_C4),
    _fixed(
        "B/16", 256, "siglip-base-patch16-256-multilingual", "B-16-SigLIP-i18n-256", "base_patch16_siglip_256", **_MC4
    ),
    _fixed(
        "So400m/16",
        256,
        "siglip-so400m-patch16-256-i18n",
        "SO400M-16-SigLIP-i18n-256",
        "so400m_patch16_siglip_256",
        **_MC4,
    ),
)
PUBLISHED = SIGLIP2 + SIGLIP1


def known_trunk(vision: Shape, *, patch_size: int, grid: tuple[int, int], native: bool) -> Published | None:
    """Returns the released checkpoint with such a vision tower, SigLIP 2 before SigLIP 1; None if there is none.

    Args:
        vision: its shape; the GELU does not count.
        patch_size: in pixels.
        grid: of its position table.
        native: whether it reads pictures of any aspect ratio.
    """
    shape = replace(vision, gelu="tanh")  # as all of them were trained
    for known in PUBLISHED:
        same = known.vision == shape and known.patch_size == patch_size and (known.side, known.side) == grid
        if same and (known.image_size is None) == native:
            return known
    return None


def heads_of(width: int, depth: int) -> int | None:
    """Returns the attention heads of the released towers of that width and depth; None if there are none."""
    shapes = [shape for known in PUBLISHED for shape in (known.vision, known.text)]
    return next((shape.num_heads for shape in shapes if (shape.width, shape.depth) == (width, depth)), None)


def undescribed(tower: str, width: int, depth: int) -> list[str]:
    """Returns a note on a tower of which no configuration tells the depth, unless a released one has that depth.

    Args:
        tower: vision or text.
        width: that was found.
        depth: that was found.
    """
    if heads_of(width, depth) is not None:
        return []
    return [
        f"the {tower} tower has {depth} layers, nothing says how many it should have, and no released tower of width "
        f"{width} has as many: if the file is not whole, layers are missing at the end"
    ]


def nearest(width: int, depth: int | None, patch_size: int | None = None) -> str:
    """Says which released checkpoint has the vision tower that is nearest, for a message.

    Args:
        width: that was found.
        depth: that was found; None if nothing tells it.
        patch_size: that was found, in pixels.
    """

    def distance(known: Published) -> float:
        off = abs(known.vision.width - width) / max(width, 1)
        off += 0 if depth is None else abs(known.vision.depth - depth) / max(depth, 1)
        return off + (patch_size is not None and known.patch_size != patch_size) * 0.01

    found = min(PUBLISHED, key=distance)
    patch = "" if patch_size is None else f", patches of {patch_size} px"
    deep = "" if depth is None else f" and depth {depth}"
    return (
        f"Found a vision tower of width {width}{deep}{patch}; the nearest known shape is that of "
        f"{found.huggingface} ({found.size}: width {found.vision.width}, depth {found.vision.depth})"
    )


def nearest_to(tensors: Mapping[str, Tensor]) -> str:
    """Says which released checkpoint is nearest to tensors of any names, by their patch embedding, for a message."""
    for tensor in tensors.values():
        if tensor.ndim == 4 and tensor.shape[1] == 3 and tensor.shape[2] == tensor.shape[3] > 1:
            blocks = [t for t in tensors.values() if t.ndim == 2 and t.shape[0] in (3 * tensor.shape[0],)]
            return nearest(tensor.shape[0], len(blocks) or None, tensor.shape[2])
    return f"Known shapes are those of {PUBLISHED[0].huggingface} and {len(PUBLISHED) - 1} more"
