"""Commands on a checkpoint without a recipe file: the checkpoint carries its own."""

import logging
from collections.abc import Sequence
from typing import Any

from siglip2.core.checkpoint import read_checkpoint
from siglip2.registry import catalogue

log = logging.getLogger(__name__)


def option(arguments: Sequence[str], flag: str) -> str | None:
    """Returns the value of `--flag VALUE` or `--flag=VALUE`, or None if it is not given."""
    for number, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name == flag:
            return value if has_value else next(iter(arguments[number + 1 : number + 2]), "")
    return None


def with_checkpoint(arguments: Sequence[str], command: str) -> Sequence[str]:
    """Returns the arguments; raises ValueError without `--ckpt_path`, since fresh weights say nothing."""
    asks_for_words = {"--help", "-h"} & set(arguments) or any(a.startswith("--print_config") for a in arguments)
    if not option(arguments, "--ckpt_path") and not asks_for_words:
        raise ValueError(
            f"`siglip2 {command}` needs trained weights: give --ckpt_path, a file that `siglip2 fit` wrote"
        )
    return arguments


def recipe_of_checkpoint(arguments: Sequence[str], command: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the recipe stored in `--ckpt_path` if no `--config` is given, and the arguments that go with it.

    `fit` takes it whole. The other commands keep of the trainer's options only the precision, take the tokenizer out
    of the checkpoint, and do without plugins that are not installed here: they are scaffolding.
    """
    path = option(arguments, "--ckpt_path")
    if not path or option(arguments, "--config") is not None or option(arguments, "-c") is not None:
        return None, []
    recipe: dict[str, Any] = dict(read_checkpoint(path)["siglip2"]["recipe"])
    recipe.pop("ckpt_path", None)
    if command == "fit":
        return recipe, []
    recipe.pop("report", None)
    missing = [name for name in recipe["plugins"] if name not in catalogue()]
    for name in missing:
        log.warning("the checkpoint was trained with the plugin '%s', which is not installed: doing without", name)
    plugins = {name: options for name, options in recipe["plugins"].items() if name not in missing}
    precision = recipe["trainer"].get("precision")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "precision": precision}
    return {**recipe, "plugins": plugins, "trainer": quiet}, ["--data.tokenizer", path]
