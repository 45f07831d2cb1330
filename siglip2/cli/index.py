"""`siglip2 index`: counts and offsets of tar shards, written beside them."""

import argparse

from rich.progress import Progress

from siglip2.core.data.index_shards import index_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("shards", help="Brace notation, a glob, a folder of *.tar, `a::b`, or any fsspec URL.")
    parser.add_argument("--workers", type=int, default=1, help="Shards read at the same time.")


def run(args: argparse.Namespace) -> None:
    """Indexes the shards and prints what was found."""
    with Progress() as bar:
        task = bar.add_task("indexing", total=None)
        summary = index_shards(
            args.shards,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(summary)
