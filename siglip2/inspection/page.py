"""An inspection as one HTML page in the style of the run report: no script, no network, captions are only ever text."""

from collections.abc import Iterable, Mapping, Sequence

from siglip2.core.report.charts import Interval, bar, histogram, intervals
from siglip2.core.report.headline import card
from siglip2.core.report.markup import Html, Section, count, el, join, language_name, number, percent, said
from siglip2.core.report.render import written
from siglip2.core.report.tables import table
from siglip2.core.report.theme import CSS
from siglip2.inspection.duplicates import Duplicates
from siglip2.inspection.fractal import LEVEL, MARGIN, NAMES, Comparison, Estimate
from siglip2.inspection.groups import NOBODY
from siglip2.inspection.spread import Spread
from siglip2.inspection.summary import Captions, Inspection, Pictures, Reason

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = (
    "td.text{text-align:start;white-space:normal;min-width:220px}td.text span{display:block}"
    ".reasons thead th:nth-child(n+3),.languages thead th:last-child{text-align:start}"
)
TITLES = {
    "hurst": "Hurst exponent H",
    "joseph": "Joseph exponent J",
    "self_similarity": "Self-similarity S",
    "mean_bits": "Mean bits of a token",
}
HINT = (
    "A hint about where a group of captions comes from, never a verdict, and never about one caption. Exponents are "
    "biased for texts this short: numbers of groups compare only where lengths were made equal, under one scorer."
)


def render(inspection: Inspection) -> str:
    """Returns the page, from `<!doctype html>` on."""
    found = [
        overview(inspection),
        languages(inspection.captions),
        lengths(inspection.captions),
        pictures(inspection.pictures),
        boxes(inspection),
        copies(inspection),
        faults(inspection),
        groups(inspection),
    ]
    sections = [section for section in found if section is not None]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", "Inspection of a data set"),
        el("style", Html(CSS + STYLE)),
    )
    main = el("main", header(inspection, sections), *(written(section) for section in sections))
    return f"<!doctype html>\n{el('html', head, el('body', main), lang='en')}\n"


def header(inspection: Inspection, sections: Sequence[Section]) -> Html:
    """What was read, the key figures, and links to the sections."""
    names = ", ".join(f"{name} ({count(size, 'sample')})" for name, size in inspection.data.items())
    links = [el("a", section.heading, href=f"#{section.anchor}") for section in sections]
    captions, images = inspection.captions, inspection.pictures
    bad = inspection.unusable / inspection.samples if inspection.samples else 0.0
    cards = [
        card("Samples read", f"{inspection.samples:,}", f"of {sum(inspection.data.values()):,}"),
        card("With a fault", percent(bad, digits=2), count(inspection.unusable, "sample")),
        card("Captions", f"{captions.count:,}", count(len(captions.languages), "language code")),
    ]
    if captions.tokens is not None:
        note = f"do not fit into {captions.length} ids; median {number(captions.tokens.median)}"
        cards.append(card("Captions cut", percent(captions.cut), note))
    cards.append(card("Copied captions", percent(captions.near.share), "to spare, near copies included"))
    copied = images.near or images.exact
    cards.append(
        card("Copied pictures", percent(copied.share), "to spare" + (", near ones included" if images.near else ""))
    )
    return el(
        "header",
        el("h1", "Inspection of a data set"),
        el("p", said(names), cls="subtitle"),
        *(el("p", el("strong", "Warning: "), said(warning), cls="lost-note") for warning in inspection.warnings),
        el("div", *cards, cls="figures"),
        el("nav", *links, aria_label="sections"),
    )


def overview(inspection: Inspection) -> Section:
    """Presence of each field."""
    rows = [
        el(
            "tr",
            el("th", row.name, scope="row"),
            el("td", percent(row.share)),
            el("td", bar(row.share), cls="wide"),
            el("td", f"{row.present:,}"),
            el("td", f"{row.unusable:,}"),
        )
        for row in inspection.fields
    ]
    head = ["Field", "Present", "Share of the readable samples", "Samples", "Unusable"]
    lead = "Unusable: the field cannot be read, or its content is not what it should be."
    return Section("fields", "Fields", lead, table(head, [el("tbody", *rows)], cls="ranked"))


def languages(captions: Captions) -> Section | None:
    """A row for each language code, with the scripts its captions are written in."""
    if not captions.count:
        return None
    rows = [
        el(
            "tr",
            el("th", language_name(row.language) if row.language else "no code", scope="row"),
            el("td", percent(row.share)),
            el("td", bar(row.share), cls="wide"),
            el("td", f"{row.captions:,}"),
            el("td", number(row.median_characters)),
            el("td", number(row.median_tokens)),
            el("td", percent(row.cut)),
            el("td", _mix(row.scripts, row.captions), cls="text"),
        )
        for row in captions.languages
    ]
    head = [
        "Language",
        "Share",
        "Share of the captions",
        "Captions",
        "Median characters",
        "Median tokens",
        "Cut",
        "Scripts",
    ]
    lead = (
        "Languages are the codes stored with the captions; nothing was guessed. Scripts are those of the letters, and "
        "say little about the language: Latin letters write hundreds."
    )
    return Section(
        "languages", "Languages and scripts", lead, table(head, [el("tbody", *rows)], cls="ranked languages")
    )


def _mix(counts: Mapping[str, int], total: int) -> str:
    return ", ".join(f"{name} {percent(num / total)}" for name, num in list(counts.items())[:6])


def lengths(captions: Captions) -> Section | None:
    """Histograms of caption lengths."""
    if not captions.count:
        return None
    panels = [] if captions.tokens is None else [_panel("Tokens", captions.tokens)]
    panels += [
        _panel("Words", captions.words),
        _panel("Characters", captions.characters),
        _panel("Captions of a sample", captions.per_sample),
    ]
    lead = f"Beside each name the median. What lies beyond the 99th percentile is in the last column. {_cut(captions)}"
    return Section("lengths", "Caption lengths", lead, el("div", *panels, cls="panels"))


def _cut(captions: Captions) -> str:
    if captions.tokens is None:
        return "Without a tokenizer there are no token lengths."
    return f"{percent(captions.cut)} do not fit into {captions.length} ids with their end token."


def pictures(found: Pictures) -> Section | None:
    """Histograms of picture sizes, and the formats."""
    if not found.count:
        return None
    panels = [
        _panel("Short side", found.short_side, "px"),
        _panel("Width", found.width, "px"),
        _panel("Height", found.height, "px"),
        _panel("Width over height", found.ratio),
        _panel("File size", found.num_bytes, "bytes"),
    ]
    seen = "Every picture was decoded." if found.decoded else "Only headers were read: damage behind them was not seen."
    lead = f"{count(found.count, 'picture')}: {_mix(found.formats, found.count)}. {seen}"
    return Section("pictures", "Pictures", lead, el("div", *panels, cls="panels"))


def boxes(inspection: Inspection) -> Section | None:
    """Histograms of boxes."""
    if inspection.boxes is None:
        return None
    found = inspection.boxes
    panels = [
        _panel("Boxes of an image", found.per_image),
        _panel("Share of the image", found.area),
        _panel("Width over height, as shares", found.ratio),
    ]
    return Section("boxes", "Boxes", f"{count(found.count, 'box')} can be used.", el("div", *panels, cls="panels"))


def _panel(title: str, found: Spread, unit: str = "") -> Html:
    return histogram(title, found.edges, found.counts, reading=number(found.median), unit=unit)


def copies(inspection: Inspection) -> Section:
    """Clusters of copies and the largest of them."""
    captions, images = inspection.captions, inspection.pictures
    kinds: dict[str, Duplicates | None] = {
        "Captions, to the letter": captions.exact,
        "Captions, but for capitals and punctuation": captions.normalised,
        "Captions, nearly": captions.near,
        "Pictures, to the byte": images.exact,
        "Pictures, by their looks": images.near,
    }
    rows = [
        el(
            "tr",
            el("th", name, scope="row"),
            el("td", percent(kind.share)),
            el("td", bar(kind.share), cls="wide"),
            el("td", f"{kind.extra:,}"),
            el("td", f"{kind.samples:,}"),
            el("td", f"{kind.clusters:,}"),
        )
        for name, kind in kinds.items()
        if kind is not None
    ]
    head = ["Equal", "To spare", "Share to spare", "Samples to spare", "Samples", "Clusters"]
    parts = [table(head, [el("tbody", *rows)], cls="ranked")]
    for name, kind in kinds.items():
        if kind is not None and kind.clusters:
            parts += [el("h3", f"Largest clusters: {name[0].lower()}{name[1:]}"), _clusters(kind)]
    lead = "To spare: what would go if one sample of each cluster stayed. A sample counts once in each of its clusters."
    return Section("copies", "Copies", lead, join(parts))


def _clusters(kind: Duplicates) -> Html:
    rows = [
        el(
            "tr",
            el("th", f"{one.samples:,}", scope="row"),
            el("td", *(said(text[:200]) for text in one.examples[:3]), cls="text"),
            el("td", ", ".join(one.keys) + (" ..." if one.samples > len(one.keys) else ""), cls="text muted"),
        )
        for one in kind.largest
    ]
    return table(["Samples", "", ""], [el("tbody", *rows)], cls="clusters")


def faults(inspection: Inspection) -> Section | None:
    """Reasons why samples, and parts of samples, cannot be used."""
    if not inspection.reasons and not inspection.notes:
        return None
    parts: list[Html] = []
    for heading, reasons in {"Unusable": inspection.reasons, "Parts left out": inspection.notes}.items():
        if reasons:
            parts += [el("h3", heading), _reasons(reasons)]
    return Section("faults", "Faults", "The first few of each kind are named.", join(parts))


def _reasons(reasons: Iterable[Reason]) -> Html:
    rows = [
        el(
            "tr",
            el("th", row.field, scope="row"),
            el("td", f"{row.count:,}"),
            el("td", said(row.kind), cls="text"),
            el("td", *(said(line) for line in row.examples[:5]), cls="text muted"),
        )
        for row in reasons
    ]
    return table(["Field", "Count", "Reason", "Such as"], [el("tbody", *rows)], cls="reasons")


def groups(inspection: Inspection) -> Section | None:
    """Fractal statistics: groups as they are, and each beside the references at equal lengths."""
    found = inspection.groups
    if found is None:
        return None
    rows = [
        el(
            "tr",
            el("th", row.name, scope="row"),
            el("td", f"{row.captions:,}"),
            el("td", f"{row.scored:,}"),
            el("td", number(row.mean_tokens)),
            *(
                [el("td", row.reason, colspan=len(NAMES), cls="text muted")]
                if row.reason
                else [el("td", _estimate(row.estimates[name])) for name in NAMES]
            ),
        )
        for row in found.groups
    ]
    head = ["Group", "Distinct captions", "Measured", "Mean tokens", *TITLES.values()]
    parts = [table(head, [el("tbody", *rows)], cls="groups")]
    for one in found.comparisons:
        parts += [el("h3", f"{one.group} beside {one.reference}"), _comparison(one)]
    flagged = f" Outside of every reference: {', '.join(found.flagged)}." if found.flagged else ""
    nobody = f" {NOBODY}: captions without such a value." if any(row.name == NOBODY for row in found.groups) else ""
    lead = f"Grouped by {found.group_by}; scored by {found.scorer}. {HINT}{flagged}{nobody}"
    return Section("groups", "Fractal statistics of groups", lead, join(parts))


def _estimate(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _comparison(one: Comparison) -> Html:
    if one.reason:
        return el("p", f"Not compared: {one.reason}.", cls="lead")
    panels = []
    for name in NAMES:
        mine, theirs = one.group_estimates[name], one.reference_estimates[name]
        rows = [
            Interval(label, found.value, found.low, found.high)
            for label, found in ((one.group, mine), (one.reference, theirs))
            if found.low == found.low  # NaN where nothing was near enough for S
        ]
        band = (theirs.low - MARGIN, theirs.high + MARGIN) if theirs.low == theirs.low else None
        told = f"{TITLES[name]}{': outside' if name in one.outside else ''}"
        panels.append(intervals(told, rows, band=band))
    said_ = (
        f"{count(one.captions, 'caption')} on either side, equally long. Lines: {LEVEL:.0%} bootstrap intervals. "
        f"Strokes: the reference's, widened by {MARGIN:g}."
    )
    return join([el("p", said_, cls="lead"), el("div", *panels, cls="panels")])
