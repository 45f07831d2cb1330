"""Recipes: YAML files by name or path, laid over one another, as arguments for the command line parser."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from siglip2.registry import check_option, lookup, overlay, read_plugins, suggestion

CONFIG_FLAGS = ("--config", "-c")


def recipes_folder() -> Path:
    """Returns the folder of the shipped recipes: inside the package, or beside it in a checkout."""
    inside = Path(str(files("siglip2"))) / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def shipped() -> dict[str, Path]:
    """Returns the shipped recipes and overlays by name, for example `siglip2-b16-256` and `size/l16`."""
    folder = recipes_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe given as a path or as the name of a shipped one.

    Raises:
        FileNotFoundError: if there is neither; suggests the nearest name.
    """
    known = shipped()
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    raise FileNotFoundError(f"no recipe '{name}'{suggestion(name, known)} Give a path or one of: {', '.join(known)}.")


def load_recipe(name: str) -> dict[str, Any]:
    """Returns a recipe as plain values, `${...}` untouched.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it is not YAML, or not a mapping.
    """
    path = find_recipe(name)
    try:
        recipe = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} should hold a mapping such as `plugins:` and `model:`, found {type(recipe).__name__}")
    return {str(k): v for k, v in recipe.items()}


def expand_arguments(arguments: Sequence[str], base: dict[str, Any] | None = None) -> tuple[list[str], list[str]]:
    """Rewrites command-line arguments so that recipes overlay one another by plugin name.

    Args:
        arguments: what follows the subcommand; `--config NAME_OR_PATH` may occur several times, left to right.
        base: a recipe below all of them, such as the one stored in a checkpoint.

    Returns:
        The arguments for the parser, with every recipe as JSON, and the plugin names in recipe order.

    Raises:
        ValueError, FileNotFoundError: for a recipe, plugin or option that does not exist.
    """
    plugins: dict[str, Any] = {}
    configs: list[str] = []
    rest: list[str] = []
    for recipe in [base] if base else []:
        plugins = _stack(recipe, "the base recipe", plugins, configs)
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        flag, has_value, value = argument.partition("=")
        if flag in CONFIG_FLAGS:
            name = value if has_value else (queue.pop(0) if queue else "")
            plugins = _stack(load_recipe(name), name, plugins, configs)
        elif flag.startswith("--plugins."):
            given = value if has_value else _next_value(queue)
            rest += _plugin_argument(flag, given, plugins)
        else:
            rest.append(argument)
    return [*configs, *rest], list(plugins)


def _stack(recipe: dict[str, Any], name: str, plugins: dict[str, Any], configs: list[str]) -> dict[str, Any]:
    if "plugins" in recipe:
        try:
            plugins = overlay(plugins, read_plugins(recipe["plugins"]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        off = {p: None for p in read_plugins(recipe["plugins"]) if p not in plugins}
        recipe = {**recipe, "plugins": {**plugins, **off}}
    configs += ["--config", json.dumps(recipe)]
    return plugins


def _next_value(queue: list[str]) -> str | None:
    return queue.pop(0) if queue and not queue[0].startswith("--") else None


def _plugin_argument(flag: str, value: str | None, plugins: dict[str, Any]) -> list[str]:
    name, _, option = flag.removeprefix("--plugins.").partition(".")
    lookup(name)
    if option == "help":
        return [flag]
    if option:
        check_option(name, option.split(".")[0])
        plugins.setdefault(name, {})
        return [flag, value or ""]
    if value in ("off", "null", "false"):
        plugins.pop(name, None)
        return [flag, "null"]
    plugins.setdefault(name, {})
    return [flag, "{}" if value in (None, "on", "true") else str(value)]
