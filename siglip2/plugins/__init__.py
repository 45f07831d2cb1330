"""The built-in plugins, one file each; they enter the catalogue by the door that everybody uses."""

import importlib
import pkgutil

from siglip2.core.hooks import hookimpl
from siglip2.core.plugin import Plugin


@hookimpl
def register_plugins() -> list[type[Plugin]]:
    """Returns every plugin class that a module of this package defines."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
        ]
    return found
