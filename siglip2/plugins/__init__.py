"""The built-in plugins, one file or package each; they enter the catalogue by the door that everybody uses."""

import importlib
import pkgutil

from siglip2.core.hooks import hookimpl
from siglip2.core.plugin import Plugin


@hookimpl
def register_plugins() -> list[type[Plugin]]:
    """Returns every plugin class that a module or package beside this file defines and has in its namespace."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            value
            for value in vars(module).values()
            # not what it only imports, such as Objective; a package may define its plugin in one of its files
            if isinstance(value, type)
            and issubclass(value, Plugin)
            and f"{value.__module__}.".startswith(f"{module.__name__}.")
        ]
    return found
