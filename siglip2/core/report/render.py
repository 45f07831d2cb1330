"""The page: header with key figures, the sections, and the file it is written to."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from siglip2.core.report.boxes import boxes
from siglip2.core.report.charts import panel
from siglip2.core.report.data import Curve, RunReport
from siglip2.core.report.examples import captions, heatmaps, image_to_text, text_to_image
from siglip2.core.report.headline import headline
from siglip2.core.report.markup import Html, Section, count, el, join, said
from siglip2.core.report.tables import referring, retention, retrieval, zero_shot
from siglip2.core.report.theme import CSS, SCRIPT


def curves(report: RunReport) -> Section | None:
    """Small multiples: losses, validation, the rest."""
    groups: dict[str, list[Curve]] = {"Losses": [], "Validation": [], "Optimisation and throughput": []}
    for curve in report.curves:
        prefix = curve.name.partition("/")[0]
        key = {"train": "Losses", "val": "Validation"}.get(prefix, "Optimisation and throughput")
        groups[key].append(curve)
    parts = []
    for heading, members in groups.items():
        if not members:
            continue
        cut = heading != "Optimisation and throughput"
        panels = [panel(curve, curve.name.partition("/")[2] if cut else curve.name) for curve in members]
        parts += [el("h3", heading), el("div", *panels, cls="panels")]
    lead = "Pale: every logged value. Strong: centred average. The number is the last value of the strong line."
    return Section("curves", "Training curves", lead, join(parts)) if parts else None


def recipe(report: RunReport) -> Section | None:
    """The recipe, folded."""
    if not report.recipe.strip():
        return None
    lines = count(report.recipe.strip().count("\n") + 1, "line")
    folded = el("details", el("summary", f"Show the recipe ({lines})"), el("pre", el("code", report.recipe)))
    return Section("recipe", "Recipe", "", folded)


def notes(report: RunReport) -> Section | None:
    """What a reader should know."""
    items = [said(note, tag="li") for note in report.notes]
    return Section("notes", "Notes", "", el("ul", *items, cls="notes")) if items else None


SECTIONS: tuple[Callable[[RunReport], Section | None], ...] = (
    curves, retention, zero_shot, retrieval, referring, text_to_image, image_to_text, heatmaps, boxes, captions, recipe,
    notes,
)  # fmt: skip

# The page needs nothing from anywhere, and the browser is told to hold it to that.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def header(report: RunReport, sections: list[Section]) -> Html:
    """Title, key figures, facts and links to the sections."""
    facts = [el("div", el("dt", name), el("dd", said(value))) for name, value in report.facts.items()]
    links = [el("a", section.heading, href=f"#{section.anchor}") for section in sections]
    return el(
        "header",
        el("h1", said(report.title)),
        el("p", said(report.subtitle), cls="subtitle") if report.subtitle else "",
        headline(report),
        el("dl", *facts, cls="facts") if facts else "",
        el("nav", *links, aria_label="sections") if len(links) > 1 else "",
    )


def written(section: Section) -> Html:
    """A section as HTML."""
    lead = el("p", section.lead, cls="lead") if section.lead else ""
    return el("section", el("h2", section.heading), lead, section.body, id=section.anchor)


def render(report: RunReport) -> str:
    """The report as one HTML page that needs no other file and no network.

    Args:
        report: what is known of the run; parts left empty are left out.

    Returns:
        The page, from `<!doctype html>` on.
    """
    sections = [section for build in SECTIONS if (section := build(report)) is not None]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", report.title),
        el("style", Html(CSS)),
    )
    main = el("main", header(report, sections), *(written(section) for section in sections))
    page = el("html", head, el("body", main, el("script", Html(SCRIPT))), lang="en")
    return f"<!doctype html>\n{page}\n"


def write_report(report: RunReport, path: str | Path) -> Path:
    """Writes the page at once or not at all: a reader never sees half of it.

    Args:
        report: what is known of the run.
        path: where to; missing folders are made, an older page is replaced.

    Returns:
        The path written.
    """
    page = render(report)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        os.chmod(draft, 0o644)  # mkstemp lets only the owner read
        os.replace(draft, target)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return target
