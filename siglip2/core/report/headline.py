"""The key figures at the top of the page."""

import math

from siglip2.core.report.charts import bar
from siglip2.core.report.data import ReferringRow, RetrievalRow, RunReport, ZeroShotRow
from siglip2.core.report.markup import Html, count, el, language_name, number, percent
from siglip2.core.report.series import series
from siglip2.core.report.tables import mean


def headline(report: RunReport) -> Html:
    """Up to six cards; nothing for a run of which nothing was measured."""
    cards = [
        *zero_shot_cards(report.zero_shot),
        *retrieval_cards(report.retrieval),
        *referring_cards(report.referring),
        *loss_cards(report),
    ]
    return el("div", *cards, cls="figures") if cards else Html()


def card(label: str, value: str, note: str, *extra: str) -> Html:
    """One key figure."""
    return el("div", el("p", label, cls="label"), el("p", value, cls="value"), *extra, el("p", note, cls="note"))


def is_english(row: ZeroShotRow | RetrievalRow | ReferringRow) -> bool:
    """Whether the texts of a row are English, whatever the region."""
    return row.language.lower().replace("_", "-").partition("-")[0] == "en"


def zero_shot_cards(rows: list[ZeroShotRow]) -> list[Html]:
    """English (or else the first language) on the first data set, and the mean over its languages."""
    if not rows:
        return []
    rows = [row for row in rows if row.dataset == rows[0].dataset]
    chosen = next(filter(is_english, rows), rows[0])
    note = f"{chosen.dataset}; chance {percent(chosen.chance)}"
    name = f"Zero-shot top-1, {language_name(chosen.language)}"
    cards = [card(name, percent(chosen.top1), note, bar(chosen.top1, chance=chosen.chance))]
    if len(rows) > 1:
        top1, chance = mean(row.top1 for row in rows), mean(row.chance for row in rows)
        measured = [row.top1 for row in rows if math.isfinite(row.top1)]
        spread = f"; {percent(min(measured))} to {percent(max(measured))}" if measured else ""
        note = f"{count(len(measured), 'language')}{spread}"
        cards.append(card("Zero-shot top-1, mean", percent(top1), note, bar(top1, chance=chance)))
    return cards


def retrieval_cards(rows: list[RetrievalRow]) -> list[Html]:
    """Recall at 1 both ways, in English or else the first language."""
    if not rows:
        return []
    chosen = next(filter(is_english, rows), rows[0])
    chance = 1 / chosen.num_images if chosen.num_images > 0 else math.nan
    note = f"{language_name(chosen.language)}, {chosen.dataset}; {count(chosen.num_images, 'image')}"
    both = {"Text → image R@1": chosen.text_to_image, "Image → text R@1": chosen.image_to_text}
    return [
        card(name, percent(recalls[1]), note, bar(recalls[1], chance=chance))
        for name, recalls in both.items()
        if 1 in recalls
    ]


def referring_cards(rows: list[ReferringRow]) -> list[Html]:
    """The share of texts that were located, in English or else the first language."""
    if not rows:
        return []
    chosen = next(filter(is_english, rows), rows[0])
    name = f"Referring accuracy, {language_name(chosen.language)}" if chosen.language else "Referring accuracy"
    note = f"{chosen.dataset}; boxes at IoU 0.5, {count(chosen.num_texts, 'text')}"
    return [card(name, percent(chosen.accuracy), note, bar(chosen.accuracy))]


def loss_cards(report: RunReport) -> list[Html]:
    """The first loss, where it ended and where it began."""
    curve = next((curve for curve in report.curves if curve.name.startswith("train/")), None)
    if curve is None or not curve.steps:
        return []
    data = series(curve)
    name = f"{curve.name.removeprefix('train/').removesuffix('loss')} loss, last".lstrip()
    name = name[0].upper() + name[1:]
    if data.broken:
        # The last finite value would make a run that blew up look well.
        return [card(name, "–", "not finite at the end")]
    unit = f" {curve.unit}" if curve.unit else ""
    begun = f"from {number(float(data.values[0]))}{unit} at step {data.steps[0]:,.0f}"
    return [card(name, number(float(data.trend[-1])), begun)]
