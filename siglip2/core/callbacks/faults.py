"""Counts the samples that had to be skipped, names them in the log, and stops a run that skips too many."""

import logging
from collections import Counter
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

    Args:
        max_bad: share of unusable samples from which the run stops.
        patience: samples to see before judging the share.
    """

    def __init__(self, max_bad: float = 0.05, patience: int = 1000):
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the samples, in [0, 1], found {max_bad}")
        self.max_bad, self.patience = max_bad, patience
        self.seen, self.reasons, self.examples = 0, Counter[str](), list[str]()
        self.notes = Counter[str]()
        self._left_out: set[tuple[str, str]] = set()

    @property
    def bad(self) -> int:
        """Samples skipped so far on this rank."""
        return sum(self.reasons.values())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.seen += batch.size + len(batch.faults)
        for fault in batch.faults:
            line = f"{fault.where}: {fault.key}: {fault.reason}"
            if self.bad < NAMED:
                log.warning("skipped a sample: %s", line)
            self.examples = [*self.examples, line][-EXAMPLES:]
            self.reasons[_kind(fault)] += 1
        for note in batch.notes:
            kind = _kind(note)
            if self.notes[kind] < NAMED_NOTES:
                log.warning("left a part of a sample out: %s: %s: %s", note.where, note.key, note.reason)
            self.notes[kind] += 1
        if self.seen >= self.patience and self.bad > self.max_bad * self.seen:
            raise RuntimeError(self.summary())

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for fault in batch.faults:
            if (fault.where, fault.key) not in self._left_out:
                self._left_out.add((fault.where, fault.key))
                log.warning("left out of the evaluation: %s: %s: %s", fault.where, fault.key, fault.reason)

    on_test_batch_start = on_validation_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bad:
            log.warning("%s", self.summary(stopped=False))
        if self.notes:
            kinds = ", ".join(f"{count} x {reason}" for reason, count in self.notes.most_common(5))
            log.warning("parts of samples that were left out, in %d samples seen: %s", self.seen, kinds)

    def summary(self, stopped: bool = True) -> str:
        """Returns what was skipped and why, and what to do."""
        kinds = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
        text = f"{self.bad} of {self.seen} samples could not be used ({kinds}). The last: {'; '.join(self.examples)}."
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


def _kind(fault: Fault) -> str:
    """What went wrong without the particulars, which follow a colon."""
    return fault.reason.split(":")[0]
