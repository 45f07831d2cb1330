"""`locca`: a decoder that captions pictures and places, whose gradients teach the vision tower where things are."""

from siglip2.plugins.locca.objective import LocCa
from siglip2.plugins.locca.sequences import Prefixes

__all__ = ["LocCa", "Prefixes"]
