"""Zero-shot, retrieval and referring results, and what a fine-tune changed in them, as tables with bars."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from siglip2.core.report.charts import bar
from siglip2.core.report.data import GAIN, RETAINED, ReferringRow, RetentionRow, RetrievalRow, RunReport, ZeroShotRow
from siglip2.core.report.markup import Html, Section, count, el, language_name, percent

Row = TypeVar("Row", ZeroShotRow, RetrievalRow, ReferringRow)


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def mean_name(values: Sequence[float]) -> str:
    """Name of a mean row, which counts only what was measured."""
    return f"Mean of {count(sum(map(math.isfinite, values)), 'language')}"


def by_dataset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by data set, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.dataset, []).append(row)
    return groups


def table(head: Sequence[str], bodies: Iterable[Html], *, cls: str) -> Html:
    """A table that scrolls within itself where the page is narrow."""
    cells = [el("th", text, scope="col") for text in head]
    inner = el("table", el("thead", el("tr", *cells)), *bodies, cls=cls)
    return el("div", inner, cls="scroll", tabindex=0, role="region", aria_label="table")


def size_line(dataset: str, **amounts: Iterable[int]) -> str:
    """Name and sizes of a data set; a range where its languages differ."""
    parts = [dataset]
    for noun, numbers in amounts.items():
        low, *_, high = sorted([*numbers] * 2)
        parts.append(count(high, noun) if low == high else f"{low:,} to {count(high, noun)}")
    return " · ".join(parts)


def dataset_line(text: str, columns: int) -> Html:
    """The row that opens the results of one data set."""
    return el("tr", el("th", text, colspan=columns, scope="rowgroup"), cls="dataset")


def standard_error(share: float, num: int) -> float:
    """Binomial standard error of a share of `num`; NaN where there is none."""
    return math.sqrt(share * (1 - share) / num) if num and 0 <= share <= 1 else math.nan


def retention(report: RunReport) -> Section | None:
    """A row per score from before and after a fine-tune: what is to be learned, then what is to be kept."""
    if not report.retention:
        return None
    head = ["Set", "Before", "Both", "After", "Change"]
    bodies = []
    for kind, line in {GAIN: "To be learned", RETAINED: "To be kept"}.items():
        if rows := [retention_line(row) for row in report.retention if row.kind == kind]:
            bodies.append(el("tbody", dataset_line(line, len(head)), *rows))
    lead = "Solid bar: the lower of the two scores. Pale bar: up to the higher one. Change: in percentage points."
    return Section("retention", "Gained and retained", lead, table(head, bodies, cls="ranked"))


def retention_line(row: RetentionRow) -> Html:
    """One row of the retention table."""
    name = " · ".join(filter(None, (row.dataset, language_name(row.language), row.measure)))
    low, high = sorted((row.before, row.after))
    return el(
        "tr",
        el("th", name, scope="row"),
        el("td", percent(row.before), cls="muted"),
        el("td", bar(low, behind=high), cls="wide"),
        el("td", el("b", percent(row.after))),
        el("td", f"{100 * row.change:+.1f}" if math.isfinite(row.change) else "–"),
    )


def zero_shot(report: RunReport) -> Section | None:
    """A row per language, best first, with its bar; a mean row where there is more than one."""
    if not report.zero_shot:
        return None
    head = ["Language", "Top-1", "Top-1 and top-5", "± s.e.", "Top-5", "Chance", "× chance"]
    bodies = []
    for dataset, rows in by_dataset(report.zero_shot).items():
        images, classes = (row.num_images for row in rows), (row.num_classes for row in rows)
        line = size_line(dataset, image=images, **{"class": classes})
        ranked = sorted(rows, key=lambda row: row.top1 if math.isfinite(row.top1) else -1, reverse=True)
        lines = [
            zero_shot_line(language_name(row.language), row.top1, row.top5, row.chance, row.num_images)
            for row in ranked
        ]
        if len(rows) > 1:
            top1, top5 = mean(row.top1 for row in rows), mean(row.top5 for row in rows)
            chance = mean(row.chance for row in rows)
            name = mean_name([row.top1 for row in rows])
            lines.append(zero_shot_line(name, top1, top5, chance, cls="mean"))
        bodies.append(el("tbody", dataset_line(line, len(head)), *lines))
    lead = (
        "Solid bar: the right class came first. Pale bar: it was among the first five. "
        "Stroke: chance of top-1. s.e.: binomial standard error of top-1."
    )
    return Section("zero-shot", "Zero-shot classification", lead, table(head, bodies, cls="ranked"))


def zero_shot_line(
    name: str, top1: float, top5: float, chance: float, num_images: int = 0, *, cls: str | None = None
) -> Html:
    """One row of the zero-shot table."""
    spread = standard_error(top1, num_images)
    lift = f"{top1 / chance:.1f}" if chance > 0 and math.isfinite(top1 / chance) else "–"
    return el(
        "tr",
        el("th", name, scope="row"),
        el("td", el("b", percent(top1))),
        el("td", bar(top1, behind=top5, chance=chance), cls="wide"),
        el("td", percent(spread) if math.isfinite(spread) else "", cls="muted"),
        el("td", percent(top5)),
        el("td", percent(chance), cls="muted"),
        el("td", lift),
        cls=cls,
    )


def retrieval(report: RunReport) -> Section | None:
    """A row per language with recall at every K, both ways."""
    if not report.retrieval:
        return None
    there = sorted({k for row in report.retrieval for k in row.text_to_image})
    back = sorted({k for row in report.retrieval for k in row.image_to_text})
    head = ["Language", *(f"Text → image R@{k}" for k in there), *(f"Image → text R@{k}" for k in back)]
    bodies = []
    for dataset, rows in by_dataset(report.retrieval).items():
        images, texts = (row.num_images for row in rows), (row.num_texts for row in rows)
        line = size_line(dataset, image=images, text=texts)
        chance = mean(1 / row.num_images for row in rows if row.num_images > 0)
        lines = [
            recall_line(
                language_name(row.language),
                [row.text_to_image.get(k, math.nan) for k in there],
                [row.image_to_text.get(k, math.nan) for k in back],
                [*(k / max(row.num_images, 1) for k in (*there, *back))],
            )
            for row in rows
        ]
        if len(rows) > 1:
            means = [mean(row.text_to_image.get(k, math.nan) for row in rows) for k in there]
            means_back = [mean(row.image_to_text.get(k, math.nan) for row in rows) for k in back]
            chances = [k * chance for k in (*there, *back)]
            name = f"Mean of {count(len(rows), 'language')}"
            lines.append(recall_line(name, means, means_back, chances, cls="mean"))
        bodies.append(el("tbody", dataset_line(line, len(head)), *lines))
    lead = "Recall at K: how often a right answer is among the best K. Stroke: chance, K of the images."
    return Section("retrieval", "Retrieval", lead, table(head, bodies, cls="recall"))


def recall_line(
    name: str, there: list[float], back: list[float], chances: list[float], *, cls: str | None = None
) -> Html:
    """One row of the retrieval table, a small bar under every recall."""
    cells = [
        el("td", percent(value), bar(value, chance=chance if math.isfinite(value) else math.nan))
        for value, chance in zip([*there, *back], chances, strict=True)
    ]
    return el("tr", el("th", name, scope="row"), *cells, cls=cls)


def referring(report: RunReport) -> Section | None:
    """A row per language with its bar; a mean row where there is more than one."""
    if not report.referring:
        return None
    head = ["Language", "Accuracy", "Boxes at IoU 0.5 or more", "± s.e.", "Mean IoU"]
    bodies = []
    for dataset, rows in by_dataset(report.referring).items():
        lines = [
            referring_line(language_name(row.language) or "All", row.accuracy, row.iou, row.num_texts) for row in rows
        ]
        if len(rows) > 1:
            accuracy, iou = mean(row.accuracy for row in rows), mean(row.iou for row in rows)
            lines.append(referring_line(mean_name([row.accuracy for row in rows]), accuracy, iou, cls="mean"))
        line = size_line(dataset, text=(row.num_texts for row in rows))
        bodies.append(el("tbody", dataset_line(line, len(head)), *lines))
    lead = (
        "Accuracy: share of texts whose box overlaps the true one with an intersection over union (IoU) of at least "
        "0.5. A text without a readable box counts as wrong. s.e.: binomial standard error."
    )
    return Section("referring", "Referring expressions", lead, table(head, bodies, cls="ranked"))


def referring_line(name: str, accuracy: float, iou: float, num_texts: int = 0, *, cls: str | None = None) -> Html:
    """One row of the referring table."""
    spread = standard_error(accuracy, num_texts)
    return el(
        "tr",
        el("th", name, scope="row"),
        el("td", el("b", percent(accuracy))),
        el("td", bar(accuracy), cls="wide"),
        el("td", percent(spread) if math.isfinite(spread) else "", cls="muted"),
        el("td", f"{iou:.2f}" if math.isfinite(iou) else "–"),
        cls=cls,
    )
