"""What was skipped is remembered over a resume, and named once in an evaluation."""

import io
import logging
from dataclasses import replace

import pytest
import torch

from siglip2.core.batch import Batch, Fault
from siglip2.core.callbacks.faults import EXAMPLES, NAMED_NOTES, FaultCounter

KEYS = ("a", "b", "c", "d")


def bad_batch(number, reason="no caption"):
    return Batch({}, 4, number, KEYS, faults=(Fault("a.tar", f"k{number}", f"{reason}: more"),))


def noted_batch(*notes):
    """A batch with notes on samples: (key, reason)."""
    return Batch({}, 4, 0, KEYS, notes=tuple(Fault("a.tar", key, reason) for key, reason in notes))


def through_a_checkpoint(state):
    """As Lightning stores it, read back with nothing but plain values allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_round_trips_through_a_checkpoint():
    before, after = FaultCounter(max_bad=1.0), FaultCounter(max_bad=1.0)
    for number in range(7):
        before.on_train_batch_start(None, None, bad_batch(number, ("no caption", "broken")[number % 2]), number)
    after.load_state_dict(through_a_checkpoint(before.state_dict()))
    assert after.summary() == before.summary()
    assert (after.bad, after.seen) == (7, 7 * 5)
    assert after.reasons.most_common() == [("no caption", 4), ("broken", 3)]


def test_resumed_counter_goes_on_counting_towards_the_limit():
    before, after = FaultCounter(max_bad=0.1, patience=20), FaultCounter(max_bad=0.1, patience=20)
    for number in range(3):
        before.on_train_batch_start(None, None, bad_batch(number), number)
    after.load_state_dict(through_a_checkpoint(before.state_dict()))
    with pytest.raises(RuntimeError, match="4 of 20 samples could not be used"):
        after.on_train_batch_start(None, None, bad_batch(3), 3)


def test_rows_of_other_hosts_are_theirs_to_count():
    """With several hosts, the size of a batch on XLA devices is that of all; keys and faults are this host's."""
    counter = FaultCounter(max_bad=1.0)
    counter.on_train_batch_start(None, None, replace(bad_batch(0), size=4 * len(KEYS)), 0)
    assert (counter.seen, counter.bad) == (len(KEYS) + 1, 1)


def test_only_the_last_examples_are_kept():
    counter = FaultCounter(max_bad=1.0)
    for number in range(EXAMPLES + 3):
        counter.on_train_batch_start(None, None, bad_batch(number), number)
    assert counter.examples == [f"a.tar: k{number}: no caption: more" for number in range(3, EXAMPLES + 3)]


def test_sample_left_out_of_an_evaluation_is_named_once_and_not_held_against_training(caplog):
    counter = FaultCounter(max_bad=0.0, patience=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            counter.on_validation_batch_start(None, None, bad_batch(1), 0)
            counter.on_test_batch_start(None, None, bad_batch(2), 0)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"left out of the evaluation: a.tar: k{n}: no caption: more" for n in (1, 2)]
    assert counter.bad == 0


def test_part_left_out_of_an_evaluation_is_named_once_and_counted_apart_from_training(caplog):
    counter = FaultCounter()
    batch = noted_batch(("k1", "caption cut: 70 tokens"), ("k1", "bad box: region 2"), ("k1", "bad box: region 2"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            counter.on_validation_batch_start(None, None, batch, 0)
            counter.on_test_batch_start(None, None, noted_batch(("k1", "bad box: region 3")), 0)
    start = "left a part of a sample out of the evaluation: a.tar: k1"
    reasons = ["caption cut: 70 tokens", "bad box: region 2", "bad box: region 3"]
    assert [record.getMessage() for record in caplog.records] == [f"{start}: {reason}" for reason in reasons]
    assert counter.eval_notes == {"caption cut": 1, "bad box": 2}
    assert counter.notes == {}


def test_only_a_few_notes_of_each_kind_are_named_and_all_are_counted(caplog):
    for during in ("on_train_batch_start", "on_validation_batch_start"):
        counter = FaultCounter()
        caplog.clear()
        for number in range(NAMED_NOTES + 3):
            batch = noted_batch((f"k{number}", "caption cut: 70 tokens"), (f"k{number}", "bad box: region 2"))
            getattr(counter, during)(None, None, batch, 0)
        assert len(caplog.records) == 2 * NAMED_NOTES
        assert counter.notes + counter.eval_notes == {"caption cut": NAMED_NOTES + 3, "bad box": NAMED_NOTES + 3}


def test_remarks_name_what_was_skipped_and_what_was_left_out_and_where():
    counter = FaultCounter(max_bad=1.0)
    assert counter.remarks() == []
    for number in range(2):
        counter.on_train_batch_start(None, None, noted_batch((f"k{number}", "bad box: region 2")), 0)
    left_out = "Parts of samples were left out: in 8 samples seen in training 2 x bad box"
    assert counter.remarks() == [f"{left_out}."]
    counter.on_validation_batch_start(None, None, noted_batch(("k1", "caption cut: 70 tokens")), 0)
    assert counter.remarks() == [f"{left_out}; in the evaluation 1 x caption cut."]
    counter.on_train_batch_start(None, None, bad_batch(3), 0)
    skipped, parts = counter.remarks()
    assert skipped.startswith("1 of 13 samples could not be used (1 x no caption)")
    assert parts.startswith("Parts of samples were left out: in 13 samples")


def test_share_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"max_bad is a share of the samples, in \[0, 1\], found 5"):
        FaultCounter(max_bad=5)
