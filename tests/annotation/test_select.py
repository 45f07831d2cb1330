"""Boxes are kept or dropped for the reason that is counted, and stored as the reader of regions takes them."""

import json
import math

import pytest
import torch

from siglip2.annotation.detector import Detections, Question
from siglip2.annotation.queries import Query
from siglip2.annotation.select import select
from siglip2.annotation.settings import Settings
from siglip2.core.data.fields import Sample
from siglip2.core.regions import Region, regions

WIDTH, HEIGHT = 200, 100
QUERIES = (Query("red apple", "en"), Query("dog", "", "category", 0.5))


def chosen(*boxes, settings=None):
    """What becomes of boxes (xmin, ymin, xmax, ymax, score, number of the query)."""
    rows = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 6)
    found = Detections(rows[:, :4].float(), rows[:, 4].float(), rows[:, 5].long())
    question = Question(torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), QUERIES, Sample("0", "toy", {}))
    entries, counts = select(found, question, settings or Settings())
    reasons = ("degenerate", "below_threshold", "below_image_threshold", "suppressed", "kept")
    assert counts["boxes"] == len(boxes) == sum(counts[reason] for reason in reasons)
    return entries, {name: count for name, count in counts.items() if count and name != "boxes"}


def test_what_is_stored_is_read_back_as_regions_best_first():
    entries, counts = chosen((20, 10, 100, 50, 0.4, 1), (0, 0, 50, 100, 0.75, 0))
    sample = Sample("0", "toy", {"json": json.dumps({"regions": entries}).encode()})
    assert regions(sample) == [
        Region((0.0, 0.0, 0.25, 1.0), {"en": ["red apple"]}, 0.75),
        Region((0.1, 0.1, 0.5, 0.5), {"": ["dog"]}, 0.4),
    ]
    assert sample.notes == []
    assert [entry["query"] for entry in entries] == ["ngram", "category"]
    assert counts == {"kept": 2, "kept_ngram": 1, "kept_category": 1}


def test_a_score_at_the_threshold_is_enough_and_one_below_is_not():
    box = (20, 10, 100, 50)
    entries, counts = chosen((*box, 0.5, 0), (*box, 0.4999, 0), settings=Settings(threshold=0.5))
    assert [entry["score"] for entry in entries] == [0.5]
    assert counts["below_threshold"] == 1


def test_the_pictures_threshold_asks_for_one_good_box():
    weak, strong = (20, 10, 100, 50, 0.15, 0), (0, 0, 50, 100, 0.31, 0)
    settings = Settings(threshold=0.1, image_threshold=0.3)
    assert chosen(weak, weak, settings=settings) == ([], {"below_image_threshold": 2})
    entries, _ = chosen(weak, strong, weak, settings=settings)
    assert [entry["score"] for entry in entries] == [0.31, 0.15, 0.15]


def test_a_box_without_area_does_not_lift_its_picture_over_the_threshold():
    settings = Settings(threshold=0.1, image_threshold=0.3)
    found = chosen((20, 10, 100, 50, 0.15, 0), (50, 120, 80, 160, 0.9, 0), settings=settings)
    assert found == ([], {"below_image_threshold": 1, "degenerate": 1})


def test_boxes_are_cut_at_the_edges_of_the_picture():
    entries, _ = chosen((-10, -20, 250, 50, 0.5, 0))
    assert entries[0]["box"] == [0.0, 0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "box",
    [
        (20, 10, 20, 50),
        (50, 40, 30, 60),
        (0, 110, 50, 150),  # in the padding below the picture
        (10, 10, 10.0001, 50),  # of no width as it is rounded
        (math.nan, 0, 50, 50),
    ],
)
def test_a_box_without_area_in_the_picture_is_dropped(box):
    assert chosen((*box, 0.9, 0)) == ([], {"degenerate": 1})


def test_a_score_that_is_no_number_is_below_every_threshold():
    assert chosen((20, 10, 100, 50, math.nan, 0), settings=Settings(threshold=0.0)) == ([], {"below_threshold": 1})


def test_no_box_is_no_region():
    assert chosen() == ([], {})


def test_suppression_keeps_the_better_of_two_that_overlap_whatever_their_texts():
    boxes = ((0, 0, 100, 100, 0.5, 0), (5, 0, 105, 100, 0.8, 1), (120, 0, 200, 100, 0.4, 0))
    assert len(chosen(*boxes)[0]) == 3
    entries, counts = chosen(*boxes, settings=Settings(nms=0.5))  # their overlap is 95 / 105
    assert [entry["score"] for entry in entries] == [0.8, 0.4]
    assert counts["suppressed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5, expected a number in"),
        ({"image_threshold": -0.1}, "image_threshold is -0.1"),
        ({"nms": math.nan}, "nms is nan"),
        ({"category_factor": 0.0}, "category_factor is 0.0"),
        ({"max_queries": -1}, "max_queries is -1, expected at least 0"),
        ({"detector": "owlv2:"}, "owlv2 needs a folder"),
        ({"detector": "yolo"}, "no detector called 'yolo'; expected owlv2:PATH or truth"),
        ({"languages": ()}, "nothing would be asked for"),
        ({"categories": ("cat",), "category_factor": 0.25}, "no category can pass"),
        ({"categories": ("cat",), "detector": "owlv2:x"}, "no category can pass"),
        ({"categories": ("cat",), "threshold": 0.1, "image_threshold": 0.4}, "no category can pass"),
    ],
)
def test_settings_that_cannot_work_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)
