"""Our parameters under the names and in the shapes of other libraries; linear, so that gradients convert as well."""

from siglip2.core.interop import huggingface, timm_trunk
from siglip2.core.interop.names import depth_of, expanded, write_names


def to_transformers(ours, *, convolution):
    """Returns parameters or gradients of `TwoTowers` as those of `SiglipModel` (convolution) or `Siglip2Model`."""
    depths = {tower: depth_of(ours, f"{tower}.blocks.{{i}}.") for tower in ("vision", "text")}
    return write_names(ours, expanded(huggingface.table(native=not convolution), depths), {})


def to_timm(ours):
    """Returns parameters or gradients of `VisionTower` as those of timm's `VisionTransformer`."""
    depths = {"vision": depth_of(ours, "blocks.{i}.")}
    named = {f"vision.{name}": tensor for name, tensor in ours.items()}
    return write_names(named, expanded(timm_trunk.table(native=False), depths), {})
