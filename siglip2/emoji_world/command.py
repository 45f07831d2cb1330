"""The command line of the emoji world, mounted by the project's CLI as `siglip2 data emoji-world`."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from siglip2.emoji_world.plan import WorldOptions
from siglip2.emoji_world.write import write_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--out`, `--overwrite` and one option per field of `WorldOptions`, whose docstring is the help text."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace another world in that folder")
    described = _descriptions(WorldOptions.__doc__ or "")
    for field in fields(WorldOptions):
        flag = {"num_emoji": "emoji"}.get(field.name, field.name).replace("_", "-")
        kind = _codes if field.name == "languages" else type(field.default)
        shown = ",".join(WorldOptions.languages) if field.name == "languages" else field.default
        metavar = {int: "N", float: "SHARE"}.get(type(field.default), "CODES")
        metavar = "RATIO" if field.name.endswith("_aspect") else metavar
        text = f"{described[field.name]} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{flag}", dest=field.name, type=kind, default=field.default, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> dict:
    """Write the world that `args` describes, with a progress bar and a short summary; returns the summary.

    Raises:
        ValueError: if an option is out of range or the folder holds something else.
    """
    options = WorldOptions(**{field.name: getattr(args, field.name) for field in fields(WorldOptions)})
    console = Console()
    columns = (TextColumn("emoji world"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("samples", total=None)

        def advance(done: int, total: int) -> None:
            if done % 50 == 0 or done == total:  # redrawing at every sample would cost more than the sample
                bar.update(task, completed=done, total=total)

        summary = write_world(args.out, options, overwrite=args.overwrite, progress=advance)
    console.print(_report(args.out, summary), highlight=False, soft_wrap=True)
    return summary


def _report(out: Path, summary: dict) -> str:
    counts = ", ".join(f"{split} {count}" for split, count in summary["counts"].items())
    lines = [
        f"{out}: {'up to date' if summary['up_to_date'] else 'written'}, {summary['bytes'] / 2**20:.1f} MiB",
        f"samples: {counts}",
        f"{summary['options']['num_emoji']} trained and {summary['options']['unseen']} held-out emoji in"
        f" {len(summary['options']['languages'])} languages",
    ]
    if summary["wrong_captions"] or summary["duplicates"]:
        lines.append(f"planted: {summary['wrong_captions']} wrong captions, {summary['duplicates']} duplicates")
    return "\n".join(lines)


def _codes(text: str) -> tuple[str, ...]:
    return tuple(code.strip() for code in text.split(",") if code.strip())


def _descriptions(docstring: str) -> dict[str, str]:
    """The Args section of a docstring, by name."""
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", docstring, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
