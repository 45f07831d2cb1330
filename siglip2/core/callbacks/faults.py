"""Counts the samples that had to be skipped, names them in the log, and stops a run that skips too many."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.batch import Batch, Fault

log = logging.getLogger(__name__)
NAMED = 100  # faults named one by one; later ones only count
NAMED_NOTES = 5  # the same for each kind of note: long captions are common
EXAMPLES = 5


class FaultCounter(Callback):
    """Watches `Batch.faults`: training batches are held to a share, evaluation batches are reported.

    What was left out of samples that are used otherwise (`Batch.notes`) is counted and logged, and never stops a run.
    In training it counts each time, in evaluation once, however often the same samples are evaluated.

    Args:
        max_bad: share of unusable samples from which the run stops.
        patience: samples to see before judging the share.
    """

    def __init__(self, max_bad: float = 0.05, patience: int = 1000):
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the samples, in [0, 1], found {max_bad}")
        self.max_bad, self.patience = max_bad, patience
        self.seen, self.reasons, self.examples = 0, Counter[str](), list[str]()
        self.notes, self.eval_notes = Counter[str](), Counter[str]()
        self._left_out: set[tuple[str, str]] = set()
        self._noted: set[Fault] = set()

    @property
    def bad(self) -> int:
        """Samples skipped so far on this rank."""
        return sum(self.reasons.values())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.seen += len(batch.keys) + len(batch.faults)  # of this process; `size` may count the rows of all hosts
        for fault in batch.faults:
            line = f"{fault.where}: {fault.key}: {fault.reason}"
            if self.bad < NAMED:
                log.warning("skipped a sample: %s", line)
            self.examples = [*self.examples, line][-EXAMPLES:]
            self.reasons[_kind(fault)] += 1
        _count("left a part of a sample out", batch.notes, self.notes)
        if self.seen >= self.patience and self.bad > self.max_bad * self.seen:
            raise RuntimeError(self.summary())

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for fault in batch.faults:
            if (fault.where, fault.key) not in self._left_out:
                self._left_out.add((fault.where, fault.key))
                log.warning("left out of the evaluation: %s: %s: %s", fault.where, fault.key, fault.reason)
        new = [note for note in dict.fromkeys(batch.notes) if note not in self._noted]
        self._noted.update(new)
        _count("left a part of a sample out of the evaluation", new, self.eval_notes)

    on_test_batch_start = on_validation_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for remark in self.remarks():
            log.warning("%s", remark)

    def remarks(self) -> list[str]:
        """Returns a sentence on the samples that were skipped and one on the parts that were left out, if there are."""
        found = [self.summary(stopped=False)] if self.bad else []
        counts = {f"{self.seen} samples seen in training": self.notes, "the evaluation": self.eval_notes}
        parts = "; ".join(f"in {where} {_most_common(kinds)}" for where, kinds in counts.items() if kinds)
        return [*found, f"Parts of samples were left out: {parts}."] if parts else found

    def summary(self, stopped: bool = True) -> str:
        """Returns what was skipped and why, and what to do."""
        kinds, last = _most_common(self.reasons), "; ".join(self.examples)
        text = f"{self.bad} of {self.seen} samples could not be used ({kinds}). The last: {last}."
        if not stopped:
            return text
        return (
            f"{text} That is more than data.train.max_bad = {self.max_bad:g}: mend the data, or raise the limit and "
            f"resume from the last checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "reasons": dict(self.reasons),
            "examples": list(self.examples),
            "notes": dict(self.notes),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.reasons = state_dict["seen"], Counter(state_dict["reasons"])
        self.examples = list(state_dict["examples"])
        self.notes = Counter(state_dict.get("notes", {}))


def _count(what: str, notes: Iterable[Fault], kinds: Counter[str]) -> None:
    """Counts notes by their kind, and names the first few of each in the log."""
    for note in notes:
        kind = _kind(note)
        if kinds[kind] < NAMED_NOTES:
            log.warning("%s: %s: %s: %s", what, note.where, note.key, note.reason)
        kinds[kind] += 1


def _most_common(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))


def _kind(fault: Fault) -> str:
    """What went wrong without the particulars, which follow a colon."""
    return fault.reason.split(":")[0]
