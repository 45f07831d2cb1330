"""`siglip2 doctor`: what transformers, open_clip and big_vision do otherwise with the same weights, and the cost."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from siglip2.api import load
from siglip2.cli.console import set_up_logging
from siglip2.cli.embedding import positive
from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.parity import SAMPLES
from siglip2.libraries import (
    CONTRACT_OF,
    Cost,
    Habit,
    Way,
    altogether,
    cost,
    embed_images,
    embed_texts,
    habits,
    our_way,
)
from siglip2.prediction.inputs import Picture
from siglip2.prediction.model import Model
from siglip2.prediction.pictures import open_pictures

EVERYTHING = "all of it"
ODD_SIZES = ((64, 64), (900, 600), (300, 1200), (37, 511))  # height, width


@dataclass(frozen=True)
class Sample:
    """What costs are measured on.

    Args:
        name: where it comes from.
        pictures: of any sizes.
        texts: as somebody wrote them.
    """

    name: str
    pictures: Sequence[Picture]
    texts: Sequence[str]


@dataclass(frozen=True)
class Finding:
    """A difference and its cost; None where it cannot be measured here."""

    habit: Habit
    cost: Cost | None

    def plain(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        kept = ("library", "part", "tower", "ours", "theirs", "note", "usual")
        named = {name: getattr(self.habit, name) for name in kept}
        return {**named, "cosine": asdict(self.cost) if self.cost else None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Compare the contracts of a model with what transformers, open_clip and big_vision do with released weights of "
        "its kind, and measure each difference: the cosine between embeddings made our way and theirs."
    )
    parser.add_argument("weights", help="A checkpoint of ours, or released weights: a folder, a file, a hub id.")
    parser.add_argument("--sample", nargs="+", default=[], help="Pictures, folders, shards or a table to measure on.")
    parser.add_argument("--samples", type=positive, default=32, help="How many of them (default: 32).")
    parser.add_argument("--caption-field", default=Fields().caption, help="Where captions are in shards or a table.")
    parser.add_argument("--image-field", default=Fields().image, help="Where pictures are in shards or a table.")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one).")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def run(args: argparse.Namespace) -> None:
    """Prints every difference and its cost.

    Raises:
        ValueError: if the weights cannot be read, or nothing of the sample.
    """
    set_up_logging()
    weights = read_weights(args.weights)
    model = load(args.weights, args.device, packed=False)  # its GELU is exchanged
    sample = odd_inputs()
    if args.sample:
        fields = Fields(image=args.image_field, caption=args.caption_field)
        sample = read_sample(args.sample, fields, count=args.samples)
    found = habits(model, weights)
    findings = diagnose(model, our_way(model, weights), found, sample)
    if args.json:
        same = [{"library": h.library, "part": h.part, "both": h.ours} for h in found if not h.differs]
        about = {"weights": args.weights, "sample": sample.name, "notes": list(weights.notes)}
        lines = [finding.plain() for finding in findings]
        print(json.dumps({**about, "differences": lines, "same": same}, indent=1, ensure_ascii=False))
        return
    _print(args.weights, found, findings, sample)
    for note in weights.notes:
        print(f"note: {note}")


def odd_inputs() -> Sample:
    """Returns built-in pictures of odd sizes, from smooth to noise, and odd texts: worse than most data."""
    pictures = []
    for height, width in ODD_SIZES:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        smooth = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1) * 255
        lines = np.stack([(x // 2 % 2), (y // 3 % 2), ((x + y) // 5 % 2)], axis=-1) * 255
        noise = np.random.default_rng(height).uniform(0, 255, (height, width, 3))
        pictures += [picture.astype(np.uint8) for picture in (smooth, lines, noise)]
    return Sample("built-in odd inputs", pictures, SAMPLES)


def read_sample(specs: Sequence[str], fields: Fields, *, count: int) -> Sample:
    """Returns pictures and captions, evenly spaced over a data set; the odd texts where there are no captions.

    Args:
        specs: as `open_pictures` takes them.
        fields: where both are.
        count: of the pictures, at most.

    Raises:
        ValueError: if none of them can be read.
    """
    source = open_pictures(specs, fields=fields)
    pictures: list[Picture] = []
    texts: list[str] = []
    for i in np.linspace(0, len(source) - 1, min(count, len(source)), dtype=int).tolist():
        try:
            sample = source.read(i)
            pictures.append(sample.image())
        except BadSample:
            continue
        texts += [text for each in sample.captions_if_any("caption").values() for text in each[:1]]
    if not pictures:
        raise ValueError(f"no picture of {' '.join(specs)} could be read")
    return Sample(source.name, pictures, texts or SAMPLES)


def diagnose(model: Model, ours: Way, found: Sequence[Habit], sample: Sample) -> list[Finding]:
    """Returns each difference with its cost, and for each library and tower all of its differences at once.

    Args:
        model: the towers.
        ours: the way of the weights.
        found: what `habits` returned.
        sample: to measure on.
    """
    rows = [habit for habit in found if habit.differs]
    for library in CONTRACT_OF:
        for tower in ("image", "text"):
            way = altogether(library, tower, found, ours)
            counted = [h for h in rows if h.usual and h.way and (h.library, h.tower) == (library, tower)]
            if len(counted) > 1:
                rows.append(Habit(library, f"{EVERYTHING}, {tower}", tower, "as trained", "as it is", way))
    embed: dict[str, Any] = {"image": (embed_images, sample.pictures), "text": (embed_texts, sample.texts)}
    needed = {habit.tower for habit in rows if habit.way}
    reference = {tower: embed[tower][0](model, ours, embed[tower][1]) for tower in needed}
    findings = []
    for habit in rows:
        function, inputs = embed[habit.tower]
        there = None if habit.way is None else function(model, habit.way, inputs)
        findings.append(Finding(habit, None if there is None else cost(reference[habit.tower], there)))
    return findings


def _print(path: str, found: Sequence[Habit], findings: Sequence[Finding], sample: Sample) -> None:
    table = Table(title=escape(f"{path}, on {sample.name}"), title_justify="left")
    for name in ("library", "what", "trained with", "does", "cosine, mean", "worst", "changed"):
        justify: Any = "right" if name in ("cosine, mean", "worst", "changed") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for library in CONTRACT_OF:
        for finding in [f for f in findings if f.habit.library == library]:
            habit, numbers = finding.habit, ("not measured", "", "")
            if finding.cost is not None:
                numbers = (_said(finding.cost.mean), _said(finding.cost.worst), f"{finding.cost.changed:.0%}")
            what = habit.part + ("" if habit.usual else " (some calls)")
            table.add_row(library, what, habit.ours, habit.theirs, *numbers)
    console = Console()
    console.print(table)
    for finding in findings:
        if finding.habit.note:
            console.print(escape(f"{finding.habit.library}, {finding.habit.part}: {finding.habit.note}"))
    for library in CONTRACT_OF:
        same = [habit.part for habit in found if habit.library == library and not habit.differs]
        console.print(escape(f"{library}, the same: {', '.join(same) or 'nothing'}"))


def _said(cosine: float) -> str:
    """A cosine in six places; near 1, how near."""
    return f"{cosine:.6f}" if 1 - cosine > 1e-5 or cosine == 1 else f"1 - {1 - cosine:.0e}"
