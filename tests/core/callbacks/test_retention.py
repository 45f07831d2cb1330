"""The retention table: scores that were measured twice, what was to be learned before what was to be kept."""

from types import SimpleNamespace

import pytest

from siglip2.core.callbacks.retention import Retention, compare, scores_of
from siglip2.core.callbacks.retrieval import Retrieval
from siglip2.core.callbacks.zero_shot import ZeroShot
from siglip2.core.report.data import RetrievalRow, ZeroShotRow

TOP1, R1 = "top-1", "text to image R@1"
BEFORE = {("kept_old", "en", TOP1): 0.9, ("new", "en", R1): 0.2, ("gone", "en", TOP1): 0.5}
AFTER = {("kept_old", "en", TOP1): 0.8, ("new", "en", R1): 0.6, ("late", "en", TOP1): 0.5}


@pytest.mark.parametrize(("retained", "kinds"), [(None, ["gain", "retained"]), (["new"], ["gain", "retained"])])
def test_rows_are_what_was_measured_twice_gains_first(retained, kinds):
    rows = compare(BEFORE, AFTER, retained)
    assert [row.kind for row in rows] == kinds
    assert rows[0].dataset == ("new" if retained is None else "kept_old")
    assert {row.dataset: round(row.change, 6) for row in rows} == {"new": 0.4, "kept_old": -0.1}


def test_scores_are_taken_from_the_evaluation_callbacks():
    zero_shot, retrieval = ZeroShot(), Retrieval()
    zero_shot.rows = [ZeroShotRow("a", "en", 10, 4, 0.5, 0.9, 0.25)]
    retrieval.rows = [RetrievalRow("b", "", 7, 7, {1: 0.1, 5: 0.2, 10: 0.3}, {1: 0.4, 5: 0.5, 10: 0.6})]
    expected = {("a", "en", TOP1): 0.5, ("b", "", R1): 0.1, ("b", "", "image to text R@1"): 0.4}
    assert scores_of([zero_shot, retrieval, object()]) == expected


def test_run_that_is_resumed_keeps_the_scores_of_its_beginning():
    first, resumed = Retention(), Retention()
    first.scores.before = BEFORE
    resumed.load_state_dict(first.state_dict())
    resumed.on_sanity_check_end(SimpleNamespace(callbacks=[]), None)
    assert resumed.scores.before == BEFORE


@pytest.mark.parametrize(
    ("retained", "sanity", "message"), [(["nwe"], float("inf"), "no evaluation set 'nwe'"), (["new"], 2, "to -1")]
)
def test_table_that_could_not_be_filled_is_refused_before_training(retained, sanity, message):
    data = SimpleNamespace(eval_sets={"new": None})
    trainer = SimpleNamespace(datamodule=data, limit_val_batches=1.0, num_sanity_val_steps=sanity)
    with pytest.raises(ValueError, match=message):
        Retention(retained).setup(trainer, None, "fit")
