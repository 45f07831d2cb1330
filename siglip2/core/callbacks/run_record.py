"""Remembers what a run logged and writes report.html: curves, scores per language, examples, heatmaps, boxes."""

import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.callbacks.examples import box_examples, caption_examples, picture_examples, text_examples
from siglip2.core.callbacks.faults import FaultCounter
from siglip2.core.callbacks.referring import Referring, grounder_of
from siglip2.core.callbacks.retention import Retention
from siglip2.core.callbacks.retrieval import Retrieval
from siglip2.core.callbacks.zero_shot import ENGLISH, ZeroShot
from siglip2.core.data.datamodule import caption_name
from siglip2.core.report.data import Curve, RunReport
from siglip2.core.report.render import write_report

log = logging.getLogger(__name__)
SCORES = ("zero_shot/", "retrieval/", "referring/")
SHOWN_SCORES = (
    f"{ENGLISH}/top1",
    f"{ENGLISH}/text_to_image@1",
    *(f"{language}/{score}" for language in (ENGLISH, "all") for score in ("acc@0.5", "iou")),
)
UNITS = {"images_per_s": "images/s", "train/": "nats", "waiting": "of the time"}


class RunRecord(Callback):
    """Collects what is logged during `fit`, across resumes, and writes `report.html` out of it.

    Args:
        zero_shot: the callback whose last scores are shown.
        retrieval: likewise.
        referring: likewise.
    """

    def __init__(self, zero_shot: ZeroShot, retrieval: Retrieval, referring: Referring):
        self.zero_shot, self.retrieval, self.referring = zero_shot, retrieval, referring
        self.history: dict[str, dict[int, float]] = {}
        self._trained_s, self._since, self._images = 0.0, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch.keys) * trainer.world_size  # a batch on XLA devices has the rows of all hosts
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            names = [n for n in trainer.callback_metrics if not n.startswith(SCORES)]
            self._note(trainer, names)
            groups = trainer.optimizers[0].param_groups
            plain = next((g for g in groups if g.get("lr_factor", 1.0) == 1.0), groups[0])  # without a rule's factor
            self._keep("lr", trainer.global_step, plain["lr"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            wanted = [n for n in trainer.callback_metrics if n.startswith("zero_shot/") and n.endswith("mean/top1")]
            wanted += [n for n in trainer.callback_metrics if n.endswith(SHOWN_SCORES)]
            self._note(trainer, wanted, prefix="val/")

    def _note(self, trainer: Trainer, names: list[str], prefix: str = "") -> None:
        for name in names:
            self._keep(prefix + name, trainer.global_step, float(trainer.callback_metrics[name]))

    def _keep(self, name: str, step: int, value: float) -> None:
        self.history.setdefault(name, {})[step] = value

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained_s, self._since = self._time_trained(), 0.0

    def write(self, trainer: Trainer, module: Any) -> None:
        """Writes `report.html` into `trainer.default_root_dir`; a report that fails costs nothing but itself."""
        if not trainer.is_global_zero:
            return
        try:
            path = write_report(self.collect(trainer, module), Path(trainer.default_root_dir) / "report.html")
        except Exception:
            log.exception("the report could not be written; the run itself is complete and saved")
        else:
            print(f"report: {path}")

    def collect(self, trainer: Trainer, module: Any) -> RunReport:
        """Returns all that is known of the run."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        report = RunReport(
            title=f"siglip2: {', '.join(module.plugins)}",
            subtitle="What this run learned, on pictures and captions it was not trained on.",
            facts=self._facts(trainer, module),
            curves=self._curves(),
            retention=[
                row
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, Retention)
                for row in callback.rows
            ],
            zero_shot=list(self.zero_shot.rows),
            retrieval=list(self.retrieval.rows),
            referring=list(self.referring.rows),
            recipe=yaml.safe_dump(module.recipe, sort_keys=False, allow_unicode=True),
            notes=[
                remark
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, FaultCounter)
                for remark in callback.remarks()
            ],
        )
        was_training = module.training
        module.eval()
        self._add_examples(report, module, data)
        module.train(was_training)
        return report

    def _add_examples(self, report: RunReport, module: Any, data: Any) -> None:
        grounder = grounder_of(module)
        for number, (name, settings) in enumerate(data.retrieval.items()):
            batches, languages = data.eval_batches(name), settings.languages or [None]
            if number == 0:
                language = ENGLISH if ENGLISH in languages else languages[0]
                report.text_to_image = text_examples(module, batches, language, caption_name(language))
            if grounder:
                report.captions += caption_examples(module, grounder, batches, languages)
        for name, settings in list(data.zero_shot.items())[:1]:
            report.image_to_text, report.heatmaps = picture_examples(module, data.eval_batches(name), settings)
        for name, settings in data.referring.items():
            if grounder:
                report.boxes += box_examples(module, grounder, data.eval_batches(name), settings.languages or [None])

    def _curves(self) -> list[Curve]:
        first = ["train/loss"]  # the headline card shows the first loss
        names = [n for n in first if n in self.history] + [n for n in self.history if n not in first]
        return [Curve(n, list(self.history[n]), list(self.history[n].values()), _unit(n)) for n in names]

    def _facts(self, trainer: Trainer, module: Any) -> dict[str, str]:
        model = sum(p.numel() for p in module.model.parameters())
        return {
            "Steps": f"{trainer.global_step:,}",
            "Images seen": f"{self._images:,}",
            "Training time": f"{self._trained_s / 60:.1f} min",
            "Parameters": f"{model / 1e6:.1f} M",
            "Hardware": _hardware(trainer),
            "Precision": str(trainer.precision),
            "Versions": f"siglip2 {version('siglip2')}, torch {torch.__version__}",
        }

    def _time_trained(self) -> float:
        return self._trained_s + (time.monotonic() - self._since if self._since else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "images": self._images, "trained_s": self._time_trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._images = state_dict["history"], state_dict["images"]
        self._trained_s = state_dict["trained_s"]


def _hardware(trainer: Trainer) -> str:
    if trainer.strategy.root_device.type == "xla":
        devices = trainer.strategy.parallel_devices  # type: ignore[attr-defined]
        return f"{trainer.world_size} x {len(devices)} XLA devices"  # of each host
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {device}"


def _unit(name: str) -> str:
    return next((unit for start, unit in UNITS.items() if name.startswith(start)), "")
