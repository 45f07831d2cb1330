"""What a fine-tune gained and what it lost: every score before the first step beside the last one."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from siglip2.core.callbacks.retrieval import Retrieval
from siglip2.core.callbacks.zero_shot import ZeroShot
from siglip2.core.report.data import GAIN, RETAINED, RetentionRow

log = logging.getLogger(__name__)
KEPT = "kept"  # what the name of a set begins with that shows what is to be retained

Score = dict[tuple[str, str, str], float]


def scores_of(callbacks: Iterable[Any]) -> Score:
    """Returns (set, language, measure) -> score, as the evaluation callbacks found them last."""
    scores: Score = {}
    for callback in callbacks:
        if isinstance(callback, ZeroShot):
            scores.update({(r.dataset, r.language, "top-1"): r.top1 for r in callback.rows})
        if isinstance(callback, Retrieval):
            for row in callback.rows:
                scores[row.dataset, row.language, "text to image R@1"] = row.text_to_image[1]
                scores[row.dataset, row.language, "image to text R@1"] = row.image_to_text[1]
    return scores


def compare(before: Score, after: Score, retained: Sequence[str] | None = None) -> list[RetentionRow]:
    """Returns a row for every score that was measured both times: what is to be learned, then what is to be kept."""
    kept = {d for d, *_ in after if (d.startswith(KEPT) if retained is None else d in retained)}
    rows = [
        RetentionRow(*key, RETAINED if key[0] in kept else GAIN, before[key], score)
        for key, score in after.items()
        if key in before
    ]
    return sorted(rows, key=lambda row: row.kind == RETAINED)


def table_of(rows: Iterable[RetentionRow]) -> Table:
    """Returns the rows as a table for the terminal."""
    table = Table(title="Gained and retained", title_justify="left")
    for name in ("", "set", "language", "measure"):
        table.add_column(name)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (f"{row.before:.1%}", f"{row.after:.1%}", f"{100 * row.change:+.1f}")
        table.add_row(row.kind, row.dataset, row.language, row.measure, *numbers)
    return table


@dataclass
class _Both:
    before: Score = field(default_factory=dict)
    after: Score = field(default_factory=dict)


class Retention(Callback):
    """Scores every evaluation set before the first step and at every validation, and shows both when training ends.

    The scores before come from Lightning's sanity check, which runs over the whole sets with
    `trainer.num_sanity_val_steps: -1`. The table goes to the terminal and, as `retention.json`, into
    `trainer.default_root_dir`, where it is brought up to date with every validation; the report has it, too.

    Args:
        retained: names of the zero-shot and retrieval sets that show what the model could do before and is to keep;
            all others show what it is to learn. Null takes those whose names begin with `kept`.

    Raises:
        ValueError: if there is no such set, or nothing would be measured before the first step.
    """

    def __init__(self, retained: list[str] | None = None):
        self.retained, self.scores = retained, _Both()

    @property
    def rows(self) -> list[RetentionRow]:
        """One for every score that was measured before and after."""
        return compare(self.scores.before, self.scores.after, self.retained)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING or not trainer.limit_val_batches:
            return
        known = list(trainer.datamodule.eval_sets)  # type: ignore[attr-defined]
        if unknown := [name for name in self.retained or () if name not in known]:
            raise ValueError(
                f"Retention: there is no evaluation set '{unknown[0]}', the run has {', '.join(known) or 'none'}: name "
                f"those of data.zero_shot and data.retrieval"
            )
        if known and trainer.num_sanity_val_steps != float("inf"):
            raise ValueError("Retention: set trainer.num_sanity_val_steps to -1, so that all sets are scored first")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.scores.before:  # a run that is resumed has them from its beginning
            self.scores.before = scores_of(trainer.callbacks)  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.scores.after = scores_of(trainer.callbacks)  # type: ignore[attr-defined]
        self._write(trainer)
        if trainer.state.fn == TrainerFn.VALIDATING:  # of the last weights, behind the end of training
            self._show(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scored = [c.step for c in trainer.callbacks if isinstance(c, ZeroShot)]  # type: ignore[attr-defined]
        if trainer.global_step in scored:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            Console().print(table_of(self.rows))

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        path = Path(trainer.default_root_dir) / "retention.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(row), "change": row.change} for row in self.rows]
        path.write_text(json.dumps({"step": trainer.global_step, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {"before": [[*key, score] for key, score in self.scores.before.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores.before = {(a, b, c): score for a, b, c, score in state_dict["before"]}
