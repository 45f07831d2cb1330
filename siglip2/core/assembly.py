"""What a run is put together from: its one patchifier, and what plugins offer under names of their own."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from siglip2.core.layout import Patchifier
from siglip2.core.plugin import Plugin


class Heads(dict[str, nn.Module]):
    """Heads by name; a second one under a taken name is an error, since the first would be lost silently."""

    def __setitem__(self, name: str, head: nn.Module) -> None:
        if name in self:
            raise ValueError(f"two plugins give a head called '{name}': rename one of them")
        super().__setitem__(name, head)

    def update(self, *heads: Any, **more: nn.Module) -> None:
        """Adds heads one by one, each under a name of its own."""
        for name, head in dict(*heads, **more).items():
            self[name] = head


def the_patchifier(hook: Any, plugins: Iterable[Plugin]) -> Patchifier:
    """Returns the one patchifier of a recipe.

    Raises:
        ValueError: if no plugin or more than one offers a patchifier.
    """
    offering = [p.name for p in plugins if hasattr(p, "patchifier")]
    if len(offering) != 1:
        found = "none" if not offering else " and ".join(offering)
        cure = f"remove one (--plugins.{offering[0]} off)" if offering else "`siglip2 plugins` lists what there is"
        raise ValueError(f"a recipe needs exactly one patchifier, found {found}: {cure}")
    patchifier: Patchifier = hook()
    return patchifier


def merge_unique(into: dict[str, Any], more: Mapping[str, Any], what: str) -> None:
    """Adds the entries of `more`; raises ValueError if a name is there already, since one would be lost silently."""
    for name, value in more.items():
        if name in into:
            raise ValueError(f"two plugins give a {what} called '{name}': rename one of them")
        into[name] = value
