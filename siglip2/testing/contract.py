"""The contract that every plugin keeps: `check_plugin` runs the checks that apply to a class."""

import inspect
from collections.abc import Callable
from typing import Any

from docstring_parser import parse

from siglip2.core.plugin import Objective, Plugin
from siglip2.registry import catalogue
from siglip2.testing.case import Case, require
from siglip2.testing.data_checks import check_patchifier_is_pure, check_views_are_descriptions
from siglip2.testing.ranks import check_over_ranks
from siglip2.testing.training_checks import (
    check_asleep_costs_nothing,
    check_curator_keeps_rows,
    check_device_never_waits,
    check_encoders_are_frozen,
    check_loss_reaches_parameters,
    check_state_round_trips,
)


def check_registered(case: Case) -> None:
    """It is found in the catalogue, under its own name."""
    cls, found = case.cls, catalogue().get(getattr(case.cls, "name", ""))
    require(
        found is not None,
        f"{cls.__name__} is not in the catalogue: give it a `name`, return it from a @hookimpl function "
        f'`register_plugins`, declare [project.entry-points.siglip2] NAME = "your_package", and install the package',
    )
    require(found is not None and found.cls is cls, f"the name '{cls.name}' belongs to {found}: choose another name")


def check_documented(case: Case) -> None:
    """Its docstring has a summary and explains every option: that is its --help."""
    text = parse(inspect.getdoc(case.cls) or "")
    require(
        bool(text.short_description), f"{case.cls.__name__} has no docstring: `siglip2 plugins` shows its first line"
    )
    told = {p.arg_name for p in text.params if (p.description or "").strip()}
    parameters = inspect.signature(case.cls).parameters
    if missing := [name for name in parameters if name not in told]:
        raise AssertionError(
            f"option {', '.join(missing)} of '{case.name}' is not under `Args:` in its class docstring: write what it "
            f"does, its unit and its range; that text is the command line's help"
        )
    if untyped := [name for name, p in parameters.items() if p.annotation is inspect.Parameter.empty]:
        raise AssertionError(f"option {', '.join(untyped)} of '{case.name}' needs a type: recipes are checked by it")


def offers(hook: str) -> Callable[[type[Plugin]], bool]:
    """Returns a test for plugin classes that implement a hook."""
    return lambda cls: hasattr(cls, hook)


def is_objective(cls: type[Plugin]) -> bool:
    """Says whether the class returns a loss term."""
    return issubclass(cls, Objective)


def is_no_patchifier(cls: type[Plugin]) -> bool:
    """Says whether the class may sleep: a recipe always needs its patchifier."""
    return not hasattr(cls, "patchifier")


CHECKS: dict[Callable[[Case], None], Callable[[type[Plugin]], bool]] = {
    check_registered: lambda cls: True,
    check_documented: lambda cls: True,
    check_loss_reaches_parameters: is_objective,
    check_state_round_trips: lambda cls: True,
    check_asleep_costs_nothing: is_no_patchifier,
    check_device_never_waits: is_no_patchifier,
    check_views_are_descriptions: offers("views"),
    check_patchifier_is_pure: offers("patchifier"),
    check_encoders_are_frozen: offers("encoders"),
    check_curator_keeps_rows: offers("curate"),
}


def checks_for(cls: type[Plugin]) -> list[Callable[[Case], None]]:
    """Returns the checks that apply to a plugin class, those over several processes excepted."""
    return [check for check, applies in CHECKS.items() if applies(cls)]


def check_plugin(plugin_class: type[Plugin], **options: Any) -> None:
    """Checks that a plugin keeps the contract, on tiny real objects; takes about fifteen seconds.

    It is registered and documented; its loss is a finite scalar with gradients; its state round-trips under
    `plugins.<name>.`; asleep it costs nothing; a step has static shapes and no host sync; its views are descriptions;
    and two processes have the gradients of one. An encoder that another plugin would offer is stood in for.

    Args:
        plugin_class: the class, as `register_plugins` returns it.
        options: options to construct it with; its defaults if none are given.

    Raises:
        AssertionError: at the first broken promise, saying what to do.
    """
    case = Case(plugin_class, options)
    for check in checks_for(plugin_class):
        check(case)
    check_over_ranks([case])
