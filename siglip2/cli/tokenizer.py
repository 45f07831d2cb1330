"""`siglip2 tokenizer train`: a tokenizer of Gemma's shape, from the captions of a data set."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.data.source import Source, open_source
from siglip2.core.data.train_tokenizer import train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("data", help="Shards, a CSV/TSV table or a folder, as in data.train.path.")
    parser.add_argument("--out", type=Path, required=True, help="The tokenizer.json to write.")
    parser.add_argument("--vocab-size", type=int, default=32000, help="Pieces, the five special ones included.")
    parser.add_argument("--caption", default=Fields().caption, help="Where captions are found, e.g. json.captions.")
    parser.add_argument("--limit", type=int, default=None, help="Read only so many samples.")
    parser.add_argument("--keep-case", action="store_true", help="Do not lower-case the captions.")


def run(args: argparse.Namespace) -> None:
    """Trains and writes the tokenizer."""
    source = open_source(args.data, fields=Fields(caption=args.caption))
    path = train_tokenizer(
        captions(source, limit=args.limit), vocab_size=args.vocab_size, out=args.out, lowercase=not args.keep_case
    )
    print(f"wrote {path}")


def captions(source: Source, *, limit: int | None = None) -> Iterator[str]:
    """Yields every caption of every language; samples that cannot be read are left out."""
    total = len(source) if limit is None else min(limit, len(source))
    for number in track(range(total), description="reading captions"):
        try:
            by_language = source.read(number).captions()
        except BadSample:
            continue
        for texts in by_language.values():
            yield from texts
