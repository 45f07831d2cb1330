"""`siglip2 plugins`: what is installed, where it comes from, and what it can be told."""

import argparse
import inspect
import json
from typing import Any

from docstring_parser import parse
from rich.console import Console

from siglip2.registry import Entry, catalogue, lookup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("name", nargs="*", help="Only these plugins.")
    parser.add_argument("--json", action="store_true", help="Print as JSON.")


def run(args: argparse.Namespace) -> None:
    """Prints every installed plugin, or the named ones."""
    chosen = {name: lookup(name) for name in args.name} or catalogue()
    if args.json:
        print(json.dumps({name: describe(entry) for name, entry in chosen.items()}, indent=2))
        return
    console = Console(highlight=False)
    for name, entry in chosen.items():
        _print(console, name, describe(entry))


def describe(entry: Entry) -> dict[str, Any]:
    """Returns kind, origin, summary and options of a plugin as plain values."""
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in parse(inspect.getdoc(entry.cls) or "").params}
    options = {
        name: {"type": _type(parameter), "default": repr(parameter.default), "help": texts.get(name, "")}
        for name, parameter in entry.options.items()
    }
    return {"kind": entry.kind, "origin": entry.origin, "summary": entry.summary, "options": options}


def _type(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return (
        annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("siglip2.core.schedules.", "")
    )


def _print(console: Console, name: str, about: dict[str, Any]) -> None:
    console.print(f"[bold]{name}[/bold]  [cyan]{about['kind']}[/cyan]  [dim]{about['origin']}[/dim]")
    console.print(f"  {about['summary']}", markup=False)
    for option, o in about["options"].items():
        console.print(f"  [green]{option}[/green] [dim]{o['type']} = {o['default']}[/dim]")
        if o["help"]:
            console.print(f"      {o['help']}", markup=False, soft_wrap=True)
    console.print()
