"""`siglip2 inspect`: what a data set holds, as a table, as JSON and as a page."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text as Line

from siglip2.core.data.fields import Fields
from siglip2.core.data.source import FORMATS, Source, open_source
from siglip2.core.data.storage import write_file
from siglip2.core.data.text import Tokenizer
from siglip2.inspection.collect import GROUP, Facts, Reader, chosen, collect, with_group
from siglip2.inspection.duplicates import Duplicates
from siglip2.inspection.fractal import MARGIN, MIN_CAPTIONS, NAMES, Estimate
from siglip2.inspection.groups import GROUPINGS, GroupReport, grouped, report_groups
from siglip2.inspection.page import HINT, render
from siglip2.inspection.scoring import CausalScorer, words
from siglip2.inspection.spread import Spread
from siglip2.inspection.summary import Inspection, Stage, as_json, summarise

SHORT = {"hurst": "H", "joseph": "J", "self_similarity": "S", "mean_bits": "bits"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("data", nargs="+", help="Shards, CSV/TSV tables or folders, each as in data.train.path.")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="What DATA is; auto goes by the name.")
    parser.add_argument(
        "--fields",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SPEC",
        help="Where image, caption, label and regions are found, as in data.train.fields, e.g. caption=json.captions. "
        "Any other NAME is one more field of captions, e.g. synthetic=json.synthetic.",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, SentencePiece model or hub id, for lengths in tokens."
    )
    parser.add_argument("--length", type=int, default=64, help="Ids of the text tower, the end token included.")
    parser.add_argument("--limit", type=int, metavar="N", help="Read the first N samples of each DATA.")
    parser.add_argument("--sample", type=int, metavar="SEED", help="Draw the N samples of --limit with this seed.")
    parser.add_argument("--workers", type=int, default=1, help="Processes that read; the result is the same.")
    parser.add_argument(
        "--headers-only",
        action="store_true",
        help="Do not decode pictures: much faster, blind to damage behind the header and to near copies.",
    )
    parser.add_argument(
        "--group-by",
        default="field",
        metavar="WHAT",
        help=f"Groups of captions whose fractal statistics are estimated: {', '.join(GROUPINGS)}, or where a value is "
        "found in the sample, e.g. json.source.",
    )
    parser.add_argument(
        "--human",
        action="append",
        default=[],
        metavar="GROUP",
        help="A group written by people, with which the others are compared at equal lengths; may be repeated.",
    )
    parser.add_argument(
        "--scorer",
        type=Path,
        metavar="PATH",
        help="Folder with a causal language model of transformers; without it, n-grams of one half of the captions "
        "score the other.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write everything as JSON.")
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write a page with plots.")


def run(args: argparse.Namespace) -> Inspection:
    """Inspects, prints and writes; returns what was found.

    Raises:
        ValueError: if an option does not fit, or a reference group is not among the groups.
        FileNotFoundError: if there are no such data, tokenizer or scorer.
    """
    _check(args)
    fields = read_fields(args.fields)
    # a value to group by is one more field, so that sources read it
    asked = fields if args.group_by in GROUPINGS else with_group(fields, args.group_by)
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer, length=args.length)
    scorer = None if args.scorer is None else CausalScorer(args.scorer)
    sources = {path: open_source(path, format=args.format, fields=asked) for path in args.data}
    console = Console()
    with _bar(console) as bar:
        facts = _read(sources, Reader(tokenizer, not args.headers_only), args, bar)
        groups = grouped(facts, args.group_by)
        stage = _stages(bar)
        report = report_groups(
            groups,
            by=args.group_by,
            human=args.human,
            scorer=scorer,
            tokenize=words if tokenizer is None else tokenizer.ids,
            seed=args.sample or 0,
            progress=stage("scoring captions", None),
        )
        found = summarise(
            facts,
            data={path: len(source) for path, source in sources.items()},
            fields=fields.names(),
            length=args.length,
            room=args.length - 1 if tokenizer is None else tokenizer.contract.room,
            decoded=not args.headers_only,
            groups=report,
            asked={name: fields.spec(name) for name in (word.partition("=")[0] for word in args.fields)},
            group_by=None if args.group_by in GROUPINGS else args.group_by,
            stage=stage,
        )
    for part in tables(found):
        console.print(part)
    _write(found, args)
    return found


def _check(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}, expected at least 1 sample")
    if args.sample is not None and args.limit is None:
        raise ValueError("--sample draws as many samples as --limit says; give --limit too")
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}, expected at least 1")
    if len(set(args.data)) < len(args.data):
        raise ValueError("one DATA is named twice")
    for option in ("json", "html"):
        path = getattr(args, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"--{option} {path}: no folder {path.absolute().parent}")


def read_fields(words_: Sequence[str]) -> Fields:
    """Returns the fields that `NAME=SPEC` words describe.

    Raises:
        ValueError: if a word is not of that form, or names a field that no sample can have.
    """
    own = {"image", "caption", "label", "regions"}
    given: dict[str, Any] = {}
    extra: dict[str, str] = {}
    for word in words_:
        name, equals, spec = word.partition("=")
        if not equals or not name:
            raise ValueError(f"--fields {word!r}: expected NAME=SPEC, for example caption=json.captions")
        if name == GROUP or (name not in own and name in {f.name for f in dataclass_fields(Fields)}):
            raise ValueError(f"--fields {word!r}: {name!r} cannot be the name of a field")
        (given if name in own else extra)[name] = spec
    return replace(Fields(extra=extra), **given)


def _read(sources: dict[str, Source], reader: Reader, args: argparse.Namespace, bar: Progress) -> list[Facts]:
    numbers = {path: chosen(len(source), limit=args.limit, seed=args.sample) for path, source in sources.items()}
    advance = _stages(bar)("reading samples", sum(map(len, numbers.values())))
    return [
        replace(facts, source=path)
        for path, source in sources.items()
        for facts in collect(source, numbers[path], reader, workers=args.workers, progress=advance)
    ]


def _write(found: Inspection, args: argparse.Namespace) -> None:
    if args.json is not None:
        text = json.dumps(as_json(found), ensure_ascii=False, indent=1, allow_nan=False)
        write_file(str(args.json), (text + "\n").encode())
        print(f"wrote {args.json}")
    if args.html is not None:
        write_file(str(args.html), render(found).encode())
        print(f"wrote {args.html}")


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _stages(bar: Progress) -> Stage:
    """Adds a task to the bar for each stage; returns what advances it, not more often than can be seen."""

    def stage(text: str, total: int | None) -> Callable[[int], None]:
        task = bar.add_task(text, total=total)
        waiting = 0

        def advance(done: int) -> None:
            nonlocal waiting
            waiting += done
            if waiting >= 32 or total is None or bar.tasks[task].completed + waiting >= total:
                bar.advance(task, waiting)
                waiting = 0

        return advance

    return stage


def tables(found: Inspection) -> Iterable[Table | Line]:
    """Yields what is printed, the most general first."""
    yield _samples(found)
    if found.captions.count:
        yield _languages(found)
        yield _lengths(found)
    yield _copies(found)
    if found.reasons or found.notes:
        yield _faults(found)
    if found.groups is not None:
        yield from _judged(found.groups)
    for warning in found.warnings:  # last, where they are not scrolled away
        yield Line.assemble(("warning: ", "bold red"), _line(warning))


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns are text and the others numbers."""
    table = Table(title=_line(title), title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < words else "right", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(_line, cells))


def _line(text: str) -> Line:
    """Text as it is: a caption may look like markup, or hold codes that a terminal obeys."""
    return Line("".join(letter if letter.isprintable() else "\ufffd" for letter in text))


def _samples(found: Inspection) -> Table:
    total = sum(found.data.values())
    table = _table(
        f"{found.samples:,} of {total:,} samples read, {found.unusable:,} with a fault",
        "field",
        "samples",
        "share",
        "unusable",
    )
    for row in found.fields:
        _row(table, row.name, f"{row.present:,}", f"{row.share:.1%}", f"{row.unusable:,}")
    return table


def _languages(found: Inspection) -> Table:
    captions = found.captions
    table = _table(
        f"{captions.count:,} captions by language code", "code", "scripts of the letters", "captions", "share",
        "characters", "tokens", f"cut at {captions.length}", words=2,
    )  # fmt: skip
    for row in captions.languages:
        scripts = ", ".join(f"{name} {num / row.captions:.0%}" for name, num in list(row.scripts.items())[:3])
        numbers = (f"{row.captions:,}", f"{row.share:.1%}", _short(row.median_characters), _short(row.median_tokens))
        _row(table, row.language or "no code", scripts, *numbers, _percent(row.cut))
    return table


def _lengths(found: Inspection) -> Table:
    table = _table("Spread", "of", "mean", "5 %", "median", "95 %", "99 %", "largest")
    captions, pictures, boxes = found.captions, found.pictures, found.boxes
    spreads: dict[str, Spread | None] = {
        "tokens of a caption": captions.tokens,
        "words of a caption": captions.words,
        "characters of a caption": captions.characters,
        "captions of a sample": captions.per_sample,
        "short side of a picture": pictures.short_side,
        "width over height": pictures.ratio,
        "bytes of a picture": pictures.num_bytes,
        "boxes of an image": None if boxes is None else boxes.per_image,
        "share of the image of a box": None if boxes is None else boxes.area,
    }
    for name, one in spreads.items():
        if one is not None and one.count:
            _row(table, name, *map(_short, (one.mean, one.p5, one.median, one.p95, one.p99, one.max)))
    if captions.tokens is not None:
        table.caption = _line(f"{captions.cut:.2%} of the captions do not fit into {captions.length} ids")
    return table


def _copies(found: Inspection) -> Table:
    table = _table("Copies", "equal", "largest cluster", "clusters", "samples", "to spare", "share", words=2)
    captions, pictures = found.captions, found.pictures
    kinds: dict[str, Duplicates | None] = {
        "captions, to the letter": captions.exact,
        "captions, but for capitals and punctuation": captions.normalised,
        "captions, nearly": captions.near,
        "pictures, to the byte": pictures.exact,
        "pictures, by their looks": pictures.near,
    }
    for name, kind in kinds.items():
        if kind is not None:
            first = kind.largest[0] if kind.largest else None
            shown = "" if first is None else f"{first.samples} x {(first.examples or first.keys)[0]:.60}"
            numbers = (f"{kind.clusters:,}", f"{kind.samples:,}", f"{kind.extra:,}", f"{kind.share:.1%}")
            _row(table, name, shown, *numbers)
    return table


def _faults(found: Inspection) -> Table:
    table = _table("Faults", "field", "reason", "such as", "count", words=3)
    for row in (*found.reasons, *found.notes):
        _row(table, row.field, row.kind, row.examples[0], f"{row.count:,}")
    return table


def _judged(report: GroupReport) -> Iterable[Table | Line]:
    if all(row.reason for row in report.groups):
        yield _line(
            f"No fractal statistics: no group by {report.group_by} has {MIN_CAPTIONS} captions that are long enough."
        )
        return
    yield _groups(report)
    yield from _comparisons(report)
    yield _line(f"Scored by {report.scorer}. {HINT}")


def _groups(report: GroupReport) -> Table:
    table = _table(
        f"Groups by {report.group_by}, as they are", "group", "captions", "measured", "tokens", *SHORT.values()
    )
    for row in report.groups:
        numbers = [f"{row.estimates[name].value:.3f}" for name in NAMES] if row.estimates else ["too few"] * len(NAMES)
        _row(table, row.name, f"{row.captions:,}", f"{row.scored:,}", _short(row.mean_tokens), *numbers)
    return table


def _comparisons(report: GroupReport) -> Iterable[Table]:
    if not report.comparisons:
        return
    table = _table("Groups at equal lengths", "group", "of", "here", "reference", "", words=2)
    for one in report.comparisons:
        if one.reason:
            _row(table, one.group, "", one.reason, one.reference, "")
        for name, mine in one.group_estimates.items():
            outside = "outside" if name in one.outside else ""
            theirs = f"{one.reference}: {_interval(one.reference_estimates[name])}"
            _row(table, one.group, SHORT[name], _interval(mine), theirs, outside)
        table.add_section()
    flagged = f"; flagged: {', '.join(report.flagged)}" if report.flagged else "; none is flagged"
    table.caption = _line(f"95 % intervals; outside: beyond the reference's interval and {MARGIN:g}{flagged}")
    yield table


def _interval(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share == share else "-"


def _short(value: float) -> str:
    return f"{value:,.4g}" if value == value else "-"
