"""Scores of our evaluation sets as files that CLIP_benchmark writes, so that they land in one table with others'."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.callbacks.retrieval import Retrieval
from siglip2.core.callbacks.zero_shot import ZeroShot
from siglip2.core.report.data import RetrievalRow, ZeroShotRow


def as_clip_benchmark(row: ZeroShotRow | RetrievalRow, *, model: str, pretrained: str) -> dict[str, Any]:
    """Returns a row in the schema of CLIP_benchmark's result files; what we do not measure is left out.

    Source: LAION-AI/CLIP_benchmark 1.6.2, clip_benchmark/cli.py; image retrieval is from texts to images.

    Args:
        row: scores of one data set in one language.
        model: name of the model.
        pretrained: name of its weights.
    """
    if isinstance(row, ZeroShotRow):
        task, recall = "zeroshot_classification", row.mean_per_class_recall
        metrics = {"acc1": row.top1, "acc5": row.top5, "mean_per_class_recall": recall}
    else:
        task = "zeroshot_retrieval"
        ways = {"image": row.text_to_image, "text": row.image_to_text}
        metrics = {f"{way}_retrieval_recall@{k}": share for way, found in ways.items() for k, share in found.items()}
    about = {"dataset": row.dataset, "model": model, "pretrained": pretrained, "task": task}
    return {**about, "metrics": metrics, "language": row.language}


class ClipBenchmarkJSON(Callback):
    """Writes zero-shot and retrieval scores as CLIP_benchmark does, one file for each data set and language.

    `clip_benchmark build FOLDER/*.json` makes one table of them. Files of an earlier validation are replaced.

    Args:
        folder: where they are written, made if it does not exist.
        model: name of the model in them.
        pretrained: name of its weights in them; the checkpoint or the step if it is left out.
    """

    def __init__(self, folder: str, model: str = "siglip2", pretrained: str | None = None):
        self.folder, self.model, self.pretrained = Path(folder), model, pretrained

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        pretrained = self.pretrained or str(trainer.ckpt_path or f"step={trainer.global_step}")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for row in [row for c in callbacks if isinstance(c, ZeroShot | Retrieval) for row in c.rows]:
            content = as_clip_benchmark(row, model=self.model, pretrained=pretrained)
            named = "_".join(filter(None, (row.dataset, row.language, content["task"]))).replace("/", "-")
            (self.folder / f"{named}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    on_test_end = on_validation_end
