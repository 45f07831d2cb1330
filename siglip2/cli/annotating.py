"""`siglip2 annotate`: shards with pseudo-boxes for LocCa, found by a detector that is asked for the captions' words."""

import argparse
import logging
from collections import Counter
from dataclasses import fields
from typing import Any

from docstring_parser import parse
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from siglip2.annotation.queries import read_categories
from siglip2.annotation.settings import UNLABELLED, Settings
from siglip2.annotation.walk import SUMMARY, Progress, Summary, annotate

NONE = "none"  # how a user writes the language of captions that have none
SHOWN = 20  # faults that are printed; every shard's record names up to a hundred
ROWS = {
    "samples": "samples",
    "unreadable": "  copied as they are: unreadable",
    "without_caption": "  without a caption",
    "without_queries": "  without anything to ask for",
    "images": "  pictures searched",
    "images_with_boxes": "  pictures with boxes kept",
    "regions_replaced": "  earlier regions replaced",
    "queries_ngram": "queries: n-grams",
    "queries_category": "queries: categories",
    "boxes": "boxes found",
    "degenerate": "  dropped: no area in the picture",
    "below_threshold": "  dropped: below the threshold",
    "below_image_threshold": "  dropped: below the picture's threshold",
    "suppressed": "  dropped: a better one overlaps",
    "kept": "  kept",
    "kept_ngram": "    for an n-gram",
    "kept_category": "    for a category",
    "damaged_shards": "damaged shards",
}

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command: one for each setting, whose docstring is the help text."""
    parser.add_argument("shards", help="Brace notation, a glob, a folder of *.tar, `a::b`, or any fsspec URL.")
    parser.add_argument("--out", required=True, help="New folder or URL for the annotated shards, or one to go on in.")
    described = {p.arg_name: p.description for p in parse(Settings.__doc__ or "").params}
    special: dict[str, dict[str, Any]] = {
        "detector": {"required": True},
        "languages": {"nargs": "+", "type": _language, "metavar": "CODE"},
        "category_language": {"type": _language, "metavar": "CODE"},
        "categories": {"default": None, "metavar": "FILE"},
        "image_threshold": {"type": float},
        "nms": {"type": float, "metavar": "IOU"},
    }
    helps = {
        "languages": f"Captions in these are queried; {NONE} stands for captions without a language.",
        "category_language": f"Language of the categories, {NONE} for none.",
        "categories": "File of texts that every picture is asked for, one per line.",
    }
    for field in fields(Settings):
        text = " ".join((helps.get(field.name) or described[field.name] or "").split()).replace("%", "%%")
        text += "" if field.default in (None, ()) or field.name == "detector" else f" Default: {_shown(field.default)}."
        options: dict[str, Any] = {"type": type(field.default), "default": field.default, "help": text} | special.get(
            field.name, {}
        )
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    parser.add_argument("--workers", type=int, default=1, help="Processes, each with a detector of its own.")
    parser.add_argument(
        "--devices", nargs="+", default=[], help="What the workers take in turn, as cuda:0 cpu. Default: all GPUs."
    )


def run(args: argparse.Namespace) -> None:
    """Annotates the shards, with a progress bar, and prints what was kept and why the rest was not."""
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    given["languages"] = tuple(given["languages"])
    given["categories"] = () if args.categories is None else read_categories(args.categories)
    settings = Settings(**given)
    columns = (
        TextColumn("annotating shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[samples]} samples"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("annotating", total=None, samples=0)

        def show(at: Progress) -> None:
            bar.update(task, completed=at.shards, total=at.total, samples=at.samples)

        made = annotate(args.shards, args.out, settings, workers=args.workers, devices=args.devices, progress=show)
    console.print(_table(made))
    for fault in made.faults[:SHOWN]:
        console.print(escape(f"copied as it is: {fault}"), highlight=False, soft_wrap=True)
    if more := made.faults[SHOWN:]:
        console.print(f"and {len(more)} more, named in the records beside the shards", highlight=False)
    if made.counts["samples"] and not made.counts["images"]:
        log.warning("no picture was searched: check --caption %s, --image and --languages", settings.caption)
    console.print(f"wrote {escape(args.out)}/{SUMMARY}", highlight=False, soft_wrap=True)


def _table(made: Summary) -> Table:
    earlier = f", {made.num_done_before} before" if made.num_done_before else ""
    table = Table(title=f"{made.num_shards} shards{earlier}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in _rows(made.counts).items():
        table.add_row(label, f"{made.counts[name]}")
    return table


def _rows(counts: Counter[str]) -> dict[str, str]:
    """Count -> what it is called: those that every run has, and the languages that were skipped."""
    skipped = {
        name: f"captions skipped: {name.removeprefix('captions_skipped_')}"
        for name in sorted(counts)
        if name not in ROWS
    }
    always = {"samples", "images", "images_with_boxes", "boxes", "kept"}
    return {name: label for name, label in ROWS.items() if counts[name] or name in always} | skipped


def _language(code: str) -> str:
    return UNLABELLED if code == NONE else code


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(code or NONE for code in default)
    return str(default)
