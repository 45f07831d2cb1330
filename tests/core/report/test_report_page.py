"""The page parses, stands alone, shows what the data holds and nothing else, and survives bad data."""

import dataclasses
import math
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from siglip2.core.report import (
    Curve,
    Heatmap,
    ImageExample,
    RetrievalExample,
    RetrievalRow,
    RunReport,
    ZeroShotRow,
    render,
    write_report,
)
from siglip2.core.report.data import BoxExample, CaptionExample, ReferringRow, RetentionRow
from siglip2.core.report.markup import VOID

GREY = np.full((16, 24, 3), 128, np.uint8)
ANCHORS = {
    "curves": "curves",
    "retention": "retention",
    "zero_shot": "zero-shot",
    "retrieval": "retrieval",
    "referring": "referring",
    "text_to_image": "text-to-image",
    "image_to_text": "image-to-text",
    "heatmaps": "heatmaps",
    "boxes": "boxes",
    "captions": "captions",
    "recipe": "recipe",
    "notes": "notes",
}


class Page(HTMLParser):
    """The page taken apart: section anchors, tags, attribute names and text; checks that tags close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.sections: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data + "\n"


@pytest.fixture(scope="module")
def full(sample_report: RunReport) -> str:
    """The page of a rich run."""
    return render(sample_report)


def test_full_page_has_balanced_tags_and_every_section(full: str) -> None:
    assert Page(full).sections == list(ANCHORS.values())


def test_page_names_no_address(full: str) -> None:
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", full.replace("\n// ", "")))
    assert not re.search(r"@import|url\(|<link|<iframe", full)


def test_page_stays_small(full: str) -> None:
    assert len(full.encode()) < 1_000_000


@pytest.mark.parametrize("part", ANCHORS)
def test_empty_part_leaves_no_section_and_no_link(sample_report: RunReport, part: str) -> None:
    empty = {part: type(getattr(sample_report, part))()}
    page = render(dataclasses.replace(sample_report, **empty))
    assert Page(page).sections == [anchor for name, anchor in ANCHORS.items() if name != part]
    assert f'href="#{ANCHORS[part]}"' not in page


def test_bare_title_is_a_page() -> None:
    page = Page(render(RunReport("only a title")))
    assert page.sections == []
    assert not {"nav", "dl", "div"} & set(page.tags)


EVIL = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\ud800"


def test_every_text_is_escaped() -> None:
    report = RunReport(
        EVIL,
        subtitle=EVIL,
        facts={EVIL: EVIL},
        curves=[Curve(f"{prefix}{EVIL}", [1, 2], [1.0, math.nan], EVIL) for prefix in ("train/", "val/", "")],
        retention=[RetentionRow(EVIL, EVIL, EVIL, "gain", 0.5, 1.0)],
        zero_shot=[ZeroShotRow(EVIL, EVIL, 10, 2, 0.5, 1.0, 0.5)],
        retrieval=[RetrievalRow(EVIL, EVIL, 10, 10, {1: 0.5}, {1: 0.5})],
        text_to_image=[RetrievalExample(EVIL, EVIL, [GREY], [0.5], [True])],
        image_to_text=[ImageExample(GREY, [EVIL], [0.5], [True])],
        heatmaps=[Heatmap(GREY, EVIL, EVIL, np.eye(2))],
        referring=[ReferringRow(EVIL, EVIL, 10, 0.5, 0.5)],
        boxes=[BoxExample(GREY, EVIL, EVIL, None, (0.0, 0.0, 1.0, 1.0))],
        captions=[CaptionExample(GREY, EVIL, EVIL, EVIL)],
        recipe=EVIL,
        notes=[EVIL],
    )
    page = Page(render(report))
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert page.tags.count("img") == 6
    assert "onerror" not in page.attributes
    assert page.text.count(EVIL.replace("\ud800", "?")) >= 20


def test_right_to_left_text_finds_its_direction() -> None:
    page = render(RunReport("t", text_to_image=[RetrievalExample("חתול", "he", [GREY], [0.5], [True])]))
    assert '<span dir="auto" lang="he">חתול</span>' in page
    assert "Hebrew" in page


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, 1.0, math.inf, 2.0],
        [math.nan] * 4,
        [-math.inf, math.inf, math.nan, 1e308],
        [1e308, -1e308, 0.0, 1.0],
        [0.0] * 4,
        [5e-324, 1e-320, 0.0, 0.0],
        [1e15, 1e15 + 1, 1e15, 1e15],
    ],
)
def test_broken_curve_writes_no_broken_number(values: list[float]) -> None:
    page = render(RunReport("t", curves=[Curve("train/loss", [1, 2, 3, 4], values)]))
    assert "loss" in Page(page).text
    assert not re.search(r"[\"\s,\[-](nan|inf)\b", page, re.IGNORECASE)


@pytest.mark.parametrize("steps", [[], [7], [0], [7, 7, 7]])
def test_curve_of_one_step_or_none_is_drawn(steps: list[int]) -> None:
    Page(render(RunReport("t", curves=[Curve("train/loss", steps, [float(step) for step in steps])])))


def test_loss_that_ends_in_nan_shows_no_figure() -> None:
    page = Page(render(RunReport("t", curves=[Curve("train/sigmoid", [1, 2], [3.25, math.nan])])))
    assert "not finite at the end" in page.text
    assert "1 value not finite, the last one too" in page.text


@pytest.mark.parametrize(("name", "label"), [("train/loss", "Loss, last"), ("train/sigmoid", "Sigmoid loss, last")])
def test_loss_is_named_once(name: str, label: str) -> None:
    assert f"{label}\n2.5\n" in Page(render(RunReport("t", curves=[Curve(name, [1, 2], [3.0, 2.5])]))).text


def test_mean_row_and_headline_average_the_languages() -> None:
    rows = [ZeroShotRow("set", code, 100, 10, top1, 1.0, 0.1) for code, top1 in [("de", 0.2), ("en-GB", 0.65)]]
    text = Page(render(RunReport("t", zero_shot=rows))).text
    assert "Zero-shot top-1, English (GB)\n65.0%" in text
    assert "Zero-shot top-1, mean\n42.5%" in text
    assert "Mean of 2 languages\n42.5%" in text


def test_unmeasured_recall_is_a_dash() -> None:
    rows = [RetrievalRow("set", "en", 10, 10, {1: 0.5, 5: math.nan}, {})]
    text = Page(render(RunReport("t", retrieval=rows))).text
    assert "English\n50.0%\n–" in text


@pytest.mark.parametrize("similarity", [np.full((2, 3), np.nan), np.zeros((1, 1)), np.array([[1.0, np.inf]])])
def test_degenerate_heatmap_is_drawn(similarity: np.ndarray) -> None:
    assert render(RunReport("t", heatmaps=[Heatmap(GREY, "text", "en", similarity)])).count("<img") == 2


def test_wrong_picture_or_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], found float64 \[3, 8, 8\]"):
        ImageExample(np.zeros((3, 8, 8)), ["a"], [0.5], [True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found steps 2, values 1"):
        Curve("loss", [1, 2], [1.0])
    with pytest.raises(ValueError, match="images 1, scores 2, correct 1"):
        RetrievalExample("query", "en", [GREY], [0.5, 0.2], [True])


def rects(page: str, cls: str) -> list[tuple[int, ...]]:
    """x, y, width and height of the drawn boxes of one kind, the legend's left out."""
    numbers = rf'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" class="{cls}">'
    return [tuple(map(int, found)) for found in re.findall(numbers, page)][1:]


def test_boxes_are_drawn_where_they_are_with_their_overlap() -> None:
    true, predicted = (0.1, 0.2, 0.5, 0.6), (0.1, 0.3, 0.5, 0.7)  # they share three of five tenths of height
    page = render(RunReport("t", boxes=[BoxExample(GREY, "a cat", "en", predicted, true)]))
    assert rects(page, "true") == [(100, 200, 400, 400)]
    assert rects(page, "predicted") == [(100, 300, 400, 400)]
    assert "IoU 0.60 ✓" in Page(page).text
    assert "--ratio:24/16" in page  # so that shares of the picture are shares of the drawing


def test_text_without_a_box_shows_the_true_one_alone() -> None:
    page = render(RunReport("t", boxes=[BoxExample(GREY, "a cat", "en", None, (0.1, 0.2, 0.5, 0.6))]))
    assert len(rects(page, "true")) == 1
    assert rects(page, "predicted") == []
    assert "no readable box" in Page(page).text


def test_overlap_just_below_one_half_is_neither_right_nor_shown_as_one_half() -> None:
    page = render(RunReport("t", boxes=[BoxExample(GREY, "a", "en", (0.0, 0.0, 0.498, 1.0), (0.0, 0.0, 1.0, 1.0))]))
    assert "IoU 0.49\n" in Page(page).text
    assert "card map right" not in page


def test_box_beyond_the_picture_is_drawn_up_to_its_edge() -> None:
    page = render(RunReport("t", boxes=[BoxExample(GREY, "a", "en", (-0.5, 0.25, 1.5, 0.75), (0.0, 0.0, 1.0, 1.0))]))
    assert rects(page, "predicted") == [(0, 250, 1000, 500)]


@pytest.mark.parametrize("box", [(0.5, 0.1, 0.2, 0.3), (0.1, 0.2, math.nan, 0.4), (0.1, 0.2, 0.3)])
def test_what_is_no_box_is_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"box example 'a cat': a box is \(xmin, ymin, xmax, ymax\) with min < max"):
        BoxExample(GREY, "a cat", "en", box, (0.0, 0.0, 1.0, 1.0))  # type: ignore[arg-type]


def test_generated_caption_stands_before_the_truth_and_an_empty_one_says_so() -> None:
    captions = [CaptionExample(GREY, "eine Katze", "ein Hund", "de"), CaptionExample(GREY, "", "a dog")]
    text = Page(render(RunReport("t", captions=captions))).text
    assert "eine Katze\nGerman\nTruth\nein Hund\n" in text
    assert "(nothing)\nTruth\na dog\n" in text


def test_referring_accuracy_is_a_key_figure_and_a_table_with_its_mean() -> None:
    rows = [ReferringRow("scenes", code, 100, accuracy, 0.4) for code, accuracy in [("de", 0.2), ("en", 0.5)]]
    text = Page(render(RunReport("t", referring=rows))).text
    assert "Referring accuracy, English\n50.0%\nscenes; boxes at IoU 0.5, 100 texts" in text
    assert "German\n20.0%\n4.0%\n0.40" in text  # sqrt(0.2 * 0.8 / 100)
    assert "Mean of 2 languages\n35.0%\n0.40" in text


def test_what_was_gained_stands_before_what_was_retained_with_the_difference() -> None:
    kept = RetentionRow("kept_old", "de", "top-1", "retained", 0.9, 0.8125)
    rows = [kept, RetentionRow("new", "", "text to image R@1", "gain", 0.2, math.nan)]
    rows.append(RetentionRow("new", "", "image to text R@1", "gain", 0.25, 0.5))
    page = render(RunReport("t", retention=rows))
    learned = "To be learned\nnew · text to image R@1\n20.0%\n–\n–\nnew · image to text R@1\n25.0%\n50.0%\n+25.0\n"
    assert learned + "To be kept\nkept_old · German · top-1\n90.0%\n81.2%\n-8.8\n" in Page(page).text
    bars = re.findall(r'class="behind" style="width:([\d.]+)%"></i><i class="front" style="width:([\d.]+)%', page)
    assert bars == [("50.00", "25.00"), ("90.00", "81.25")]  # of the first, nothing is known but the beginning


def test_referring_set_without_languages_is_called_all() -> None:
    text = Page(render(RunReport("t", referring=[ReferringRow("scenes", "", 0, math.nan, math.nan)]))).text
    assert "Referring accuracy\n–" in text
    assert "All\n–\n–" in text


def test_write_makes_folders_and_replaces_the_old_page(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "report.html"
    assert write_report(RunReport("first"), target) == target
    write_report(RunReport("second"), str(target))
    assert "second" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_report(RunReport("first"), tmp_path / "report.html")

    def full_disk(*paths: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(RunReport("second"), target)
    assert "first" in target.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [target]
