"""The hooks of a run: their specifications and the plugin manager that calls them.

Specifications live in classes, grouped by when they are called. pluggy calls the last registered plugin first, so
`build_manager` registers a recipe in reverse: hooks then run in recipe order.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from siglip2.core.data.text import Tokenizer
    from siglip2.core.layout import Patchifier
    from siglip2.core.model.two_towers import TwoTowers
    from siglip2.core.plugin import Plugin
    from siglip2.core.step import Step
    from siglip2.core.views import View

PROJECT = "siglip2"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class CatalogueSpecs:
    """Called once per process, on modules: the built-in ones and those behind the entry-point group `siglip2`."""

    @hookspec
    def register_plugins(self) -> "list[type[Plugin]]":  # type: ignore[empty-body]
        """Returns the plugin classes that a module offers."""


class BuildSpecs:
    """Called while a run is built: `patchifier` and `setup` on all plugins, `views` and `encoders` on the awake."""

    @hookspec(firstresult=True)
    def patchifier(self) -> "Patchifier | None":
        """Returns the patchifier of the recipe; exactly one plugin may answer."""

    @hookspec
    def views(self) -> "list[View]":  # type: ignore[empty-body]
        """Returns the views this plugin reads; the same name with another description is an error."""

    @hookspec
    def setup(
        self, model: "TwoTowers", heads: "dict[str, nn.Module]", tokenizer: "Tokenizer", patchifier: "Patchifier"
    ) -> None:
        """Builds the plugin's own modules, sized from the model; adds to `heads` those that a teacher should follow.

        `tokenizer` and `patchifier` are the recipe's. A plugin takes the arguments that it needs.
        """

    @hookspec
    def encoders(self) -> "dict[str, nn.Module]":  # type: ignore[empty-body]
        """Returns image encoders by name for `step.encode_image(by=name)`; always run without gradient."""


class StepSpecs:
    """Called during training, on the plugins that are awake."""

    @hookspec
    def wake(self, model: "TwoTowers") -> None:
        """Called before the plugin's first step; on resume only if the checkpoint has not seen it awake.

        Once, unless RewindSpikes goes back to before that step.
        """

    @hookspec(firstresult=True)
    def curate(self, step: "Step") -> "Tensor | None":
        """Returns the local indices [b'] to train on, int64, the same b' on every rank; None keeps all."""

    @hookspec
    def losses(self, step: "Step") -> "dict[str, Tensor]":  # type: ignore[empty-body]
        """Returns weighted scalar loss terms by name; `Objective` implements it as weight * loss(step)."""

    @hookspec
    def after_step(self, model: "TwoTowers", progress: float) -> None:
        """Called after each optimizer step, not per micro-batch."""


RUN_SPECS = (BuildSpecs, StepSpecs)


def hook_names(*specs: type) -> list[str]:
    """Returns the names of the hooks that the given specification classes declare."""
    return [name for spec in specs for name in vars(spec) if not name.startswith("_")]


def build_manager(plugins: "Iterable[Plugin]") -> pluggy.PluginManager:
    """Returns a plugin manager whose hooks call `plugins` in the given order.

    Args:
        plugins: the instances of one recipe; their `name`s are unique.

    Raises:
        ValueError: if a method has the name of a hook but lacks `@hookimpl`, or has `@hookimpl` but no such hook
            exists, or it has no such argument.
    """
    manager = pluggy.PluginManager(PROJECT)
    for spec in RUN_SPECS:
        manager.add_hookspecs(spec)
    try:
        for plugin in reversed(list(plugins)):
            _check_marked(plugin)
            manager.register(plugin, name=plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(hook_names(*RUN_SPECS))
        raise ValueError(f"{error}. Hooks that exist: {known}.") from error
    return manager


def _check_marked(plugin: Any) -> None:
    for name in hook_names(*RUN_SPECS):
        method = getattr(type(plugin), name, None)
        if method is not None and not hasattr(method, f"{PROJECT}_impl"):
            raise ValueError(
                f"plugin '{plugin.name}' defines `{name}`, which is a hook, without @hookimpl: it would never be "
                f"called. Decorate it with siglip2.hookimpl or rename it."
            )
