"""What a search found, as one HTML page in the style of the run report: pictures inside, no script, no network."""

from collections.abc import Sequence

from siglip2.core.report.charts import bar
from siglip2.core.report.data import Picture
from siglip2.core.report.examples import picture
from siglip2.core.report.markup import Html, Section, count, el, probability, said
from siglip2.core.report.render import written
from siglip2.core.report.theme import CSS
from siglip2.search.index import Hit

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = (
    ".found{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(150px,45%),1fr));gap:16px}"
    ".found .key{font-size:12px;line-height:1.35;color:var(--soft)}"
)
LEAD = "Best first. A text with the model's probability for each picture, a picture with the cosine."


def render(queries: Sequence[tuple[str, Sequence[tuple[Hit, Picture | None]]]], *, subtitle: str) -> str:
    """Returns the page, from `<!doctype html>` on.

    Args:
        queries: each with its hits, and their pictures uint8 [H, W, 3]; None where one could not be read.
        subtitle: a line about the index.
    """
    sections = [_section(number, query, hits) for number, (query, hits) in enumerate(queries)]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", "Search"),
        el("style", Html(CSS + STYLE)),
    )
    top = el("header", el("h1", "Search"), el("p", said(subtitle), cls="subtitle"))
    main = el("main", top, *(written(section) for section in sections))
    return f"<!doctype html>\n{el('html', head, el('body', main), lang='en')}\n"


def _section(number: int, query: str, hits: Sequence[tuple[Hit, Picture | None]]) -> Section:
    tiles = [_tile(hit, image) for hit, image in hits]
    body = el("ol", *tiles, cls="found")
    return Section(f"query-{number}", f"{query}: {count(len(hits), 'picture')}", LEAD if number == 0 else "", body)


def _tile(hit: Hit, image: Picture | None) -> Html:
    shown = picture(image, f"rank {hit.rank}") if image is not None else el("span", "not there any more", cls="empty")
    value = f"{hit.cosine:.3f}" if hit.match is None else probability(hit.match)
    score = el("span", el("span", f"{hit.rank}"), el("span", value), cls="score")
    key = el("span", said(hit.key), cls="key", title=f"{hit.where}: {hit.key}")
    return el(
        "li", el("span", shown, cls="frame"), score, bar(max(0.0, hit.cosine) if hit.match is None else hit.match), key
    )
