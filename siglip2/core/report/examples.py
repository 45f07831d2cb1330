"""Pictures: what a text found, what a picture found, where in a picture a text is, and what was written of it."""

import math
from collections.abc import Iterable

from siglip2.core.report.charts import bar
from siglip2.core.report.data import CaptionExample, Heatmap, ImageExample, Picture, RetrievalExample, RunReport
from siglip2.core.report.markup import Html, Section, el, language_name, probability, said
from siglip2.core.report.pictures import data_uri, overlay, similarity_range


def picture(image: Picture, alt: str) -> Html:
    """A picture inside the page."""
    return el("img", src=data_uri(image), alt=alt, decoding="async")


def tag(language: str) -> Html:
    """The language of a text, small and quiet; nothing for no language."""
    return el("span", language_name(language), cls="tag") if language else Html()


def text_to_image(report: RunReport) -> Section | None:
    """Queries, each with its pictures in rank order."""
    cards = [query_card(example) for example in report.text_to_image if example.images]
    lead = "Each text with the pictures it ranked first and the probability of each pair. Framed ✓: right."
    return Section("text-to-image", "Texts and the pictures they found", lead, grid(cards)) if cards else None


def query_card(example: RetrievalExample) -> Html:
    """One query and its pictures; seven or more stand in two rows."""
    ranked = zip(example.images, example.scores, example.correct, strict=True)
    tiles = [
        el(
            "li",
            el("span", picture(image, f"rank {rank}{', correct' if right else ''}"), cls="frame"),
            el("span", el("span", probability(score)), el("b", "✓") if right else "", cls="score"),
            bar(score),
            cls="right" if right else None,
        )
        for rank, (image, score, right) in enumerate(ranked, start=1)
    ]
    columns = len(tiles) if len(tiles) <= 6 else math.ceil(len(tiles) / 2)
    caption = el("p", said(example.query, example.language), tag(example.language), cls="query")
    return el("article", caption, el("ol", *tiles, cls="tiles", style=f"--n:{columns}"), cls="card")


def grid(cards: Iterable[Html]) -> Html:
    """Cards side by side where there is room."""
    return el("div", *cards, cls="cards")


def image_to_text(report: RunReport) -> Section | None:
    """Pictures, each with its texts in rank order."""
    cards = [image_card(example) for example in report.image_to_text if example.texts]
    lead = "Each picture with the texts it ranked first and the probability of each pair. Bold ✓: right."
    return Section("image-to-text", "Pictures and the texts they found", lead, grid(cards)) if cards else None


def image_card(example: ImageExample) -> Html:
    """One picture and its ranked texts."""
    ranked = zip(example.texts, example.scores, example.correct, strict=True)
    lines = [
        el(
            "li",
            el(
                "span",
                said(text, cls="text"),
                el("span", probability(score), " ✓" if right else ""),
                cls="pair",
            ),
            bar(score),
            cls="right" if right else None,
        )
        for text, score, right in ranked
    ]
    frame = el("span", picture(example.image, "query picture"), cls="frame")
    return el("article", frame, el("ol", *lines, cls="texts"), cls="card beside")


def heatmaps(report: RunReport) -> Section | None:
    """Pictures beside themselves under the similarity of a text with every patch."""
    cards = [heatmap_card(heatmap) for heatmap in report.heatmaps]
    lead = "Similarity of a text with every patch: bright where the text matches. Each map has its own scale."
    return Section("heatmaps", "Where the text is", lead, el("div", *cards, cls="maps")) if cards else None


def heatmap_card(heatmap: Heatmap) -> Html:
    """The plain picture, the overlaid one, and the scale of the map."""
    low, high = similarity_range(heatmap.similarity)
    digits = max(0, 2 - math.floor(math.log10(high - low))) if high > low else 3
    shown = overlay(heatmap.image, heatmap.similarity)
    pair = el(
        "div",
        el("span", picture(heatmap.image, "picture"), cls="frame"),
        el(
            "span",
            el("img", src=data_uri(shown), alt="similarity over the picture"),
            cls="frame",
        ),
        cls="pair",
    )
    scale = el(
        "p",
        el("span", f"{low:.{digits}f}"),
        el("i", cls="ramp"),
        el("span", f"{high:.{digits}f}"),
        cls="scale",
    )
    caption = el("figcaption", said(heatmap.text, heatmap.language), tag(heatmap.language))
    return el("figure", pair, caption, scale, cls="card map")


def captions(report: RunReport) -> Section | None:
    """Pictures, each with the caption that was generated beside a true one."""
    cards = [caption_card(example) for example in report.captions]
    lead = "Bold: what the decoder wrote. Below it: a caption that came with the picture."
    return Section("captions", "Generated captions beside the truth", lead, grid(cards)) if cards else None


def caption_card(example: CaptionExample) -> Html:
    """One picture and both captions."""
    written = said(example.generated, example.language) if example.generated else el("span", "(nothing)")
    generated = el("p", written, tag(example.language), cls="query")
    truth = el("p", el("span", "Truth", cls="label"), said(example.truth, example.language), cls="truth")
    frame = el("span", picture(example.image, "captioned picture"), cls="frame")
    return el("article", frame, el("div", generated, truth), cls="card beside")
