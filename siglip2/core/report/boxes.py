"""Where a text was said to be in its picture, drawn over where it is."""

import math

from siglip2.core.report.data import Box, BoxExample, RunReport
from siglip2.core.report.examples import picture, tag
from siglip2.core.report.markup import Html, Section, el, said

SCALE = 1000  # SVG units per picture side
HIT = 0.5  # intersection over union from which a box counts as right


def boxes(report: RunReport) -> Section | None:
    """Pictures with the true and the predicted box of a text."""
    cards = [box_card(example) for example in report.boxes]
    lead = (
        "Each text with the box that the decoder wrote for it. IoU: intersection over union; from 0.5 on it is right ✓."
    )
    body = el("div", legend(), el("div", *cards, cls="maps pairs"))
    return Section("boxes", "Texts and the boxes predicted for them", lead, body) if cards else None


def legend() -> Html:
    """What the two kinds of boxes are."""
    whole = (0.1, 0.1, 0.9, 0.9)
    true, predicted = drawing(true=whole), drawing(predicted=whole)
    return el("p", el("span", true, "true box"), el("span", predicted, "predicted box"), cls="legend")


def box_card(example: BoxExample) -> Html:
    """One picture, its boxes, the text, and how well they agree."""
    height, width = example.image.shape[:2]
    drawn = drawing(true=example.true, predicted=example.predicted)
    overlap = None if example.predicted is None else iou(example.predicted, example.true)
    right = overlap is not None and overlap >= HIT
    reading = "no readable box"
    if overlap is not None:
        reading = f"IoU {math.floor(100 * overlap) / 100:.2f}{' ✓' if right else ''}"  # 0.498 is no 0.50
    return el(
        "figure",
        el("span", picture(example.image, "picture"), drawn, cls="boxed", style=f"--ratio:{width}/{height}"),
        el("figcaption", said(example.text, example.language), tag(example.language)),
        el("p", reading, cls="agreement"),
        cls=f"card map{' right' if right else ''}",
    )


def drawing(*, true: Box | None = None, predicted: Box | None = None) -> Html:
    """Outlines over pale ones, so that they show on any ground."""
    # dashes on top, so that both are seen where they agree
    given = {"predicted": predicted, "true": true}
    found = [(cls, place(box)) for cls, box in given.items() if box is not None]
    halos = [el("rect", **at, cls="halo") for _, at in found]
    lines = [el("rect", **at, cls=cls) for cls, at in found]
    view = f"0 0 {SCALE} {SCALE}"
    return el("svg", *halos, *lines, viewBox=view, preserveAspectRatio="none", aria_hidden="true")


def place(box: Box) -> dict[str, int]:
    """Position and size of a box in SVG units, what lies beyond the picture cut off."""
    xmin, ymin, xmax, ymax = (round(SCALE * min(max(side, 0.0), 1.0)) for side in box)
    return {"x": xmin, "y": ymin, "width": xmax - xmin, "height": ymax - ymin}


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
