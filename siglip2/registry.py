"""The catalogue of installed plugins, and the plugin part of recipes: names, overlays, helpful errors."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Optional, final

import pluggy
from torch.nn import ModuleDict

import siglip2.plugins
from siglip2.core.hooks import PROJECT, CatalogueSpecs
from siglip2.core.plugin import Objective, Plugin

BUILT_IN = "built-in"
OFF = (None, False, "off", "null")


@dataclass(frozen=True)
class Entry:
    """One installed plugin.

    Args:
        cls: its class.
        origin: `built-in`, or the name and version of the distribution it comes from.
    """

    cls: type[Plugin]
    origin: str

    @property
    def kind(self) -> str:
        """objective, patchifier, curator, encoder or plugin, by what it offers."""
        if issubclass(self.cls, Objective):
            return "objective"
        offers = {"patchifier": "patchifier", "curate": "curator", "encoders": "encoder"}
        return next((kind for hook, kind in offers.items() if hasattr(self.cls, hook)), "plugin")

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Its options by name, as its constructor takes them."""
        return dict(inspect.signature(self.cls).parameters)


@cache
def catalogue(*, third_party: bool = True) -> dict[str, Entry]:
    """Returns every installed plugin by name: the built-in ones, then those of the entry-point group `siglip2`.

    Raises:
        ValueError: if two plugins share a name, a plugin has none, or an installed one cannot be imported.
    """
    found: dict[str, Entry] = {}
    for origin, module in _modules(third_party):
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(CatalogueSpecs)
        manager.register(module)
        for cls in [c for classes in manager.hook.register_plugins() for c in classes]:
            name = getattr(cls, "name", None)
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"{origin}: {cls.__qualname__}.name is {name!r}, expected a word such as 'sigmoid'")
            if hasattr(ModuleDict, name):
                raise ValueError(f"{origin}: no plugin can be called '{name}', which torch's modules use: rename it")
            if name in found:
                raise ValueError(f"two plugins are called '{name}': {found[name].origin} and {origin}; uninstall one")
            found[name] = Entry(final(cls), origin)
    return found


def _modules(third_party: bool) -> Iterable[tuple[str, Any]]:
    yield BUILT_IN, siglip2.plugins
    for point in sorted(entry_points(group=PROJECT), key=lambda p: p.name) if third_party else ():
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            yield origin, point.load()
        except Exception as error:
            raise ValueError(f"the plugin package {origin} cannot be loaded from '{point.value}': {error}") from error


def lookup(name: str) -> Entry:
    """Returns the plugin called `name`; raises ValueError with the nearest name if there is none."""
    known = catalogue()
    if name in known:
        return known[name]
    raise ValueError(f"no plugin called '{name}'{suggestion(name, known)} Installed: {', '.join(known)}.")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns `, did you mean 'x'?` for the nearest known word, or a full stop."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else "."


def check_option(name: str, option: str) -> None:
    """Raises ValueError if the plugin `name` has no such option, listing those it has."""
    options = lookup(name).options
    if option not in options:
        raise ValueError(
            f"plugin '{name}' has no option '{option}'{suggestion(option, options)} Its options: {', '.join(options)}."
        )


def read_plugins(plugins: Any) -> dict[str, dict[str, Any] | None]:
    """Returns the `plugins` part of one recipe file as name -> options; None stands for `off`.

    Args:
        plugins: a list of names, each bare or with options, or a mapping of name to options; `off` disables one, and so
            does null in a mapping.

    Raises:
        ValueError: if it is neither, or a name or option does not exist.
    """
    # `koleo: null` in a mapping is what a printed recipe says of a plugin that is off, installed here or not;
    # `- koleo:` is a bare name
    items: list[tuple[Any, Any]] = []
    if isinstance(plugins, Mapping):
        items = [(n, "off" if o is None else o) for n, o in plugins.items() if o is not None or n in catalogue()]
    for entry in plugins if isinstance(plugins, list) else []:
        items += list(entry.items()) if isinstance(entry, Mapping) else [(entry, {})]
    if not isinstance(plugins, Mapping | list):
        raise ValueError(f"plugins should be a list of names, each bare or with options, found {plugins!r}")
    read: dict[str, dict[str, Any] | None] = {}
    for name, options in items:
        if name in read:
            raise ValueError(f"plugin '{name}' is listed twice: put its options into one entry")
        read[name] = _read_options(name, options)
    return read


def _read_options(name: Any, options: Any) -> dict[str, Any] | None:
    lookup(str(name))
    if options is None or options is True or options == {}:
        return {}
    if options in OFF:
        return None
    if not isinstance(options, Mapping):
        raise ValueError(f"plugin '{name}': expected options as a mapping, or `off`, found {options!r}")
    for option in options:
        check_option(name, option)
    return dict(options)


def overlay(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with a later recipe's plugins over it by name: options merge, new names append, None removes."""
    merged = dict(base)
    for name, options in later.items():
        if options is None:
            merged.pop(name, None)
        else:
            merged[name] = {**(merged.get(name) or {}), **options}
    return merged


def plugins_class(order: Iterable[str]) -> type:
    """Returns a dataclass with one optional field per installed plugin, those in `order` first.

    jsonargparse reads from it what can be set, by name and with types; its fields are in recipe order.
    """
    order = list(order)
    known = catalogue()
    names = [*order, *(n for n in known if n not in order)]
    typed = [(n, Optional[known[n].cls], field(default=None)) for n in names]  # noqa: UP045
    return make_dataclass("Plugins", typed, namespace={"__reduce__": _reduce_plugins})


def _reduce_plugins(plugins: Any) -> tuple[Any, ...]:
    """How instances travel to other processes, where their class has to be made first."""
    return _plugins_of, ({f.name: getattr(plugins, f.name) for f in fields(plugins)},)


def _plugins_of(values: dict[str, Any]) -> Any:
    return plugins_class(values)(**values)


def in_order(plugins: Any) -> list[Plugin]:
    """Returns the instances that an instance of `plugins_class` holds, in recipe order; checks what they need."""
    chosen = [p for f in fields(plugins) if (p := getattr(plugins, f.name)) is not None]
    check_needs(chosen)
    return chosen


def check_needs(plugins: Iterable[Plugin]) -> None:
    """Raises ValueError if a plugin needs an encoder that no other one offers for as long, and says what to add.

    Args:
        plugins: the plugins of one recipe.
    """
    plugins = list(plugins)
    for plugin, encoder in [(p, e) for p in plugins for e in p.needs]:
        offering = [p for p in plugins if encoder in p.offers]
        if not offering:
            known = [name for name, entry in catalogue().items() if encoder in entry.cls.offers]
            cure = f"add `{known[0]}` to the recipe's plugins" if known else "no installed plugin offers it"
            raise ValueError(f"plugin '{plugin.name}' needs the encoder '{encoder}': {cure}, or drop '{plugin.name}'")
        if not any(p.start <= plugin.start and plugin.stop <= p.stop for p in offering):
            found = " and ".join(f"'{p.name}' is awake from {p.start:g} to {p.stop:g}" for p in offering)
            raise ValueError(
                f"plugin '{plugin.name}' needs the encoder '{encoder}' from {plugin.start:g} to {plugin.stop:g} of the "
                f"run, but {found}: give both the same `start` and `stop`"
            )
