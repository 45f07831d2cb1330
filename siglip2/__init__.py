"""Train image-text encoders by the complete SigLIP 2 recipe. What a plugin author needs is importable from here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from siglip2.api import load as load
    from siglip2.core.batch import Batch, Patches
    from siglip2.core.crops import GLOBAL, LOCAL, CropView
    from siglip2.core.data.fields import BadSample, Sample
    from siglip2.core.distributed import gather, rank, world_size
    from siglip2.core.hooks import hookimpl
    from siglip2.core.layout import Layout, Patchifier
    from siglip2.core.masks import MaskView
    from siglip2.core.model.two_towers import ImageFeatures, TextFeatures, TwoTowers
    from siglip2.core.pairs import pair_loss, sigmoid_term
    from siglip2.core.plugin import Objective, Plugin
    from siglip2.core.schedules import Schedule
    from siglip2.core.step import Step
    from siglip2.core.views import CAPTION, IMAGE, Context, ImageView, TextView, View

_HOMES = {
    "siglip2.api": ("load",),
    "siglip2.core.batch": ("Batch", "Patches"),
    "siglip2.core.crops": ("GLOBAL", "LOCAL", "CropView"),
    "siglip2.core.distributed": ("gather", "rank", "world_size"),
    "siglip2.core.hooks": ("hookimpl",),
    "siglip2.core.data.fields": ("BadSample", "Sample"),
    "siglip2.core.layout": ("Layout", "Patchifier"),
    "siglip2.core.masks": ("MaskView",),
    "siglip2.core.model.two_towers": ("ImageFeatures", "TextFeatures", "TwoTowers"),
    "siglip2.core.pairs": ("pair_loss", "sigmoid_term"),
    "siglip2.core.plugin": ("Objective", "Plugin"),
    "siglip2.core.schedules": ("Schedule",),
    "siglip2.core.step": ("Step",),
    "siglip2.core.views": ("CAPTION", "IMAGE", "Context", "ImageView", "TextView", "View"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "CAPTION",
    "GLOBAL",
    "IMAGE",
    "LOCAL",
    "BadSample",
    "Batch",
    "Context",
    "CropView",
    "ImageFeatures",
    "ImageView",
    "Layout",
    "MaskView",
    "Objective",
    "Patches",
    "Patchifier",
    "Plugin",
    "Sample",
    "Schedule",
    "Step",
    "TextFeatures",
    "TextView",
    "TwoTowers",
    "View",
    "gather",
    "hookimpl",
    "pair_loss",
    "rank",
    "sigmoid_term",
    "world_size",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import siglip2` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'siglip2' has no attribute '{name}'; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)
