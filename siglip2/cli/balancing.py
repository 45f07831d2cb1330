"""`siglip2 balance`: example weights that take bias out of a data set, written beside its shards."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from siglip2.core.data.attributes import Attribute, fields_for, read_attributes
from siglip2.core.data.balance import Constraints, Gap, Solver, balance
from siglip2.core.data.source import FORMATS, Source, kind_of, open_source
from siglip2.core.data.weights import check_name, write_weights

QUESTION = "FIELD, which is 0 or 1, or FIELD=value, which looks for whole words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    solver, limits = Solver(), Constraints(("-",), (0.5,))
    parser.add_argument("data", help="Shards, a CSV/TSV table or a folder, as in data.train.path.")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="What the data is.")
    parser.add_argument(
        "--sensitive",
        nargs="+",
        required=True,
        metavar="FIELD=PREVALENCE",
        help=f"Sensitive attributes, each with the share of the samples that should have it: {QUESTION}.",
    )
    parser.add_argument("--label", nargs="+", default=[], metavar="FIELD", help=f"Labels: {QUESTION}.")
    parser.add_argument("--proxy", nargs="+", default=[], metavar="FIELD", help="What hints at a label; as labels.")
    parser.add_argument("--name", required=True, help="Of the weights, for data.train.weights.")
    parser.add_argument(
        "--keep", type=float, default=solver.keep, help="Mean weight; lower meets more constraints; %(default)s."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=limits.representation,
        help="How far a prevalence may be from the wanted one; %(default)s.",
    )
    parser.add_argument(
        "--association",
        type=float,
        default=limits.association,
        help="How large E[(s - prevalence) y] may be, for an attribute s and a label or proxy y; %(default)s.",
    )
    parser.add_argument(
        "--penalty", type=float, default=solver.penalty, help="Cost of a constraint's excess; %(default)s."
    )
    parser.add_argument("--largest", type=float, default=solver.largest, help="No weight is above it; %(default)s.")
    parser.add_argument("--steps", type=int, default=solver.steps, help="Mini-batches; %(default)s.")
    parser.add_argument("--batch", type=int, default=solver.batch, help="Samples of a mini-batch; %(default)s.")
    parser.add_argument("--rate", type=float, default=solver.rate, help="Step t is rate / sqrt(t); %(default)s.")
    parser.add_argument("--seed", type=int, default=solver.seed, help="Of the mini-batches; %(default)s.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run(args: argparse.Namespace) -> None:
    """Finds and writes the weights, and prints what became of each constraint."""
    check_name(args.name)  # now: reading and balancing take long
    sensitive, prevalence = zip(*map(sensitive_attribute, args.sensitive), strict=True)
    labels = [Attribute.parse(text) for text in [*args.label, *args.proxy]]
    questions = [*sensitive, *labels]
    if double := {str(a) for a in questions if questions.count(a) > 1}:
        raise ValueError(f"{min(double)} is there twice: give each attribute, label and proxy once")
    constraints = Constraints(
        tuple(map(str, sensitive)), prevalence, tuple(map(str, labels)), args.tolerance, args.association
    )
    solver = Solver(args.keep, args.largest, args.penalty, args.steps, args.batch, args.rate, args.seed)
    fields = fields_for(questions, pictures=kind_of([args.data], args.format) != "tar")
    source = open_source(args.data, format=args.format, fields=fields)
    with Progress(console=Console(stderr=True)) as bar:
        weights, gaps, unreadable = _solved(source, questions, constraints, solver, bar)
    paths = write_weights(source, args.name, weights)
    summary = {
        "samples": len(source),
        "unreadable": unreadable,
        "mean_weight": float(weights.mean()),
        "files": len(paths),
        "constraints": [{**asdict(gap), "met": gap.met} for gap in gaps],
    }
    if args.json:
        print(json.dumps(summary))
    else:
        _show(summary, gaps, args.name)


def sensitive_attribute(text: str) -> tuple[Attribute, float]:
    """Reads `FIELD=PREVALENCE` or `FIELD=value=PREVALENCE`.

    Raises:
        ValueError: if what follows the last `=` is no number.
    """
    attribute, _, share = text.rpartition("=")
    try:
        return Attribute.parse(attribute), float(share)
    except ValueError:
        raise ValueError(
            f"--sensitive: cannot read {text!r}, expected FIELD=PREVALENCE or FIELD=value=PREVALENCE, as json.woman=0.5"
        ) from None


def _solved(
    source: Source, questions: Sequence[Attribute], constraints: Constraints, solver: Solver, bar: Progress
) -> tuple[Any, list[Gap], int]:
    """The weight of each sample, what became of the constraints, and how many samples could not be read."""
    reading = bar.add_task("reading", total=len(source))
    answers, readable = read_attributes(source, questions, lambda done: bar.update(reading, completed=done))
    solving = bar.add_task("balancing", total=solver.steps)
    m = len(constraints.sensitive)
    found, gaps = balance(
        answers[readable, :m],
        answers[readable, m:],
        constraints,
        solver,
        progress=lambda done: bar.update(solving, completed=done),
    )
    weights = np.zeros(len(source))  # a sample that cannot be read need not be drawn
    weights[readable] = found
    return weights, gaps, int((~readable).sum())


def _show(summary: dict[str, Any], gaps: Sequence[Gap], name: str) -> None:
    table = Table(title="gap of each constraint")
    for column in ("constraint", "before", "after", "tolerance", "verdict"):
        table.add_column(column, justify="left" if column in ("constraint", "verdict") else "right", overflow="fold")
    for gap in gaps:
        numbers = (f"{gap.before:+.4f}", f"{gap.after:+.4f}", f"{gap.tolerance:.4f}")
        table.add_row(gap.name, *numbers, gap.verdict, style=None if gap.met else "bold")
    Console().print(table)
    unreadable = f", {summary['unreadable']} that cannot be read with weight 0" if summary["unreadable"] else ""
    print(
        f"wrote the weights {name!r} of {summary['samples']} samples beside {summary['files']} shards{unreadable}, "
        f"mean {summary['mean_weight']:.3f}; train with --data.train.weights {name}"
    )
