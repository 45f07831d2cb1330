"""`siglip2 fit | validate | test | predict`: LightningCLI over recipes."""

import logging
import re
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO

from siglip2.cli.console import print_scores, set_up_logging
from siglip2.cli.from_checkpoint import option, recipe_of_checkpoint, with_checkpoint
from siglip2.cli.messages import essence
from siglip2.core.callbacks.faults import FaultCounter
from siglip2.core.callbacks.progress import StepProgressBar
from siglip2.core.callbacks.referring import Referring
from siglip2.core.callbacks.retrieval import Retrieval
from siglip2.core.callbacks.run_record import RunRecord
from siglip2.core.callbacks.save_on_signal import SaveOnSignal
from siglip2.core.callbacks.save_the_end import SaveTheEnd
from siglip2.core.callbacks.source_counts import SourceCounts
from siglip2.core.callbacks.throughput import Throughput
from siglip2.core.callbacks.watchdog import Watchdog
from siglip2.core.callbacks.zero_shot import ZeroShot
from siglip2.core.checkpoint import AtomicCheckpointIO, newest_checkpoint
from siglip2.core.data.datamodule import SigLIP2Data
from siglip2.core.data.fields import Fields
from siglip2.core.data.settings import ReferringSet, RetrievalSet, SourceSet, ZeroShotSet
from siglip2.core.module import SigLIP2Module
from siglip2.core.optim import PUBLISHED
from siglip2.recipes import expand_arguments
from siglip2.registry import catalogue, in_order, plugins_class, suggestion
from siglip2.xla import register

log = logging.getLogger(__name__)
LAST = "last"
NAMED_SETS = (SourceSet, ZeroShotSet, RetrievalSet, ReferringSet, Fields)  # behind names that a recipe gives
CKPT_HELP = (
    "Checkpoint to resume or to use. `fit` takes `last` for the newest of the run's folder, or none if there is none."
)
MISSING = re.compile(r'[Kk]ey "([\w.]+)".*arguments are required: ([\w, ]+)', re.DOTALL)
UNKNOWN = re.compile(r"(?:Option '|unrecognized arguments: --|does not accept option '|[Kk]ey '|Key \")([\w.]+)")


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser, with the nearest known word for what it does not know."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Ends the program with status 2, the message, and a suggestion if a name is misspelt."""
        if not self.exit_on_error:  # a parser inside the parser, for the options of one class
            super().error(message, ex)
        message = essence(message)
        if missing := MISSING.search(message):
            message = f"{missing[1]} needs the option '{missing[2]}'"
        unknown = UNKNOWN.search(message)
        if unknown and ("not accept" in message or "unrecognized" in message or "not expected" in message):
            known = {word for dest in self._all_keys() for word in (dest, dest.rsplit(".", 1)[-1])}
            known |= {field.name for settings in NAMED_SETS for field in fields(settings)}
            hint = suggestion(unknown[1], known) if unknown[1] not in known else "."
            message += "" if hint == "." else f"\n  '{unknown[1]}' is not known{hint}"
        print(f"{self.prog}: error: {message}\n`{self.prog} --help` lists every option.", file=sys.stderr)
        sys.exit(2)

    def _all_keys(self) -> list[str]:
        return [action.dest for action in self._actions]


class SigLIP2CLI(LightningCLI):
    """Builds trainer, model and data out of recipes and overrides.

    Args:
        arguments: what follows the subcommand.
        command: fit, validate, test or predict.
    """

    def __init__(self, arguments: Sequence[str], *, command: str):
        self.command = command
        set_up_logging()
        base, pinned = recipe_of_checkpoint(arguments, command)
        if command != "fit":  # a curator only chooses what is trained on, and may need what is not here any more
            curators = [name for name, entry in catalogue().items() if entry.kind == "curator"]
            arguments = [*arguments, *(word for name in curators for word in (f"--plugins.{name}", "off"))]
        expanded, self.order = expand_arguments(arguments, base)
        register()
        super().__init__(
            SigLIP2Module,
            SigLIP2Data,
            trainer_class=Trainer,
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": f"siglip2 {command}"},
            auto_configure_optimizers=False,
            run=False,
            args=[*expanded, *pinned],
        )
        self.model.recipe = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True))

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Returns the parser that knows what to suggest."""
        kwargs.setdefault("dump_header", ["siglip2 recipe"])
        parser = RecipeParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="A recipe: a path, or the name of a shipped one.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the expanded arguments (LightningCLI would warn that they are not those of the shell)."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is ours: plugins by name, the checkpoint, the report, and what `predict` takes."""
        adamw = {"class_path": "torch.optim.AdamW", "init_args": PUBLISHED}
        # a run is one pass of max_steps batches, and each rank already takes its own share of every batch
        once = {"trainer.max_epochs": 1, "trainer.use_distributed_sampler": False}
        parser.set_defaults({"model.optimizer": adamw, **once})
        parser.add_class_arguments(plugins_class(self.order), "plugins")
        parser.link_arguments("plugins", "model.plugins", compute_fn=in_order, apply_on="instantiate")
        parser.link_arguments("plugins", "data.plugins", compute_fn=in_order, apply_on="instantiate")
        parser.link_arguments("data", "model.tokenizer", compute_fn=_tokenizer_of, apply_on="instantiate")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=CKPT_HELP)
        text = "Write report.html when training ends." if self.command == "fit" else SUPPRESS
        parser.add_argument("--report", type=bool, default=True, help=text)  # else a recipe that fit wrote would not do
        if self.command == "predict":
            parser.add_argument("--images", nargs="+", help="Pictures: files, globs, folders.")
            parser.add_argument("--texts", nargs="+", help="Free texts to rank for every picture.")
            parser.add_argument("--json", action="store_true", help="Print one JSON object per picture.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns the trainer with the callbacks that every run has."""
        self.zero_shot, self.retrieval, self.referring = ZeroShot(), Retrieval(), Referring()
        train = self.datamodule.train
        always: list[Callback] = [self.zero_shot, self.retrieval, self.referring]
        always.append(FaultCounter(train.max_bad if train else 1.0))
        self.report = RunRecord(self.zero_shot, self.retrieval, self.referring)
        if self.command == "fit":
            always += [Throughput(), SourceCounts(), SaveTheEnd(), self.report]
            # behind the others, so that what is saved holds what they learned of the step
            always += [kind() for kind in (Watchdog, SaveOnSignal) if not self._has_callback(kind)]
            kwargs.update(self._validation_within_the_run())
        if self._wants_progress_bar():
            always.append(StepProgressBar())
        self.trainer_defaults = {"callbacks": always}
        chosen = self.config_init.trainer.plugins or []
        chosen = [*chosen] if isinstance(chosen, list) else [chosen]
        if not any(isinstance(plugin, CheckpointIO) for plugin in chosen):
            chosen.append(AtomicCheckpointIO())
        for plugin in chosen:
            if isinstance(plugin, AsyncCheckpointIO) and plugin.checkpoint_io is None:
                plugin.checkpoint_io = AtomicCheckpointIO()
        return super().instantiate_trainer(plugins=chosen, **kwargs)

    def _wants_progress_bar(self) -> bool:
        settings = self.config_init.trainer
        shown = settings.enable_progress_bar is not False and not settings.barebones
        return shown and not self._has_callback(ProgressBar)

    def _has_callback(self, kind: type[Callback]) -> bool:
        """Whether the recipe has a callback of a kind, with options of its own."""
        chosen = self.config_init.trainer.callbacks
        return any(isinstance(callback, kind) for callback in (chosen if isinstance(chosen, list) else [chosen]))

    def _validation_within_the_run(self) -> dict[str, Any]:
        """Returns a validation interval that Lightning accepts when a recipe is cut short: once, at the end."""
        settings = self.config_init.trainer
        every = settings.val_check_interval
        cut_short = isinstance(every, int) and every > settings.max_steps * settings.accumulate_grad_batches > 0
        return {"val_check_interval": 1.0} if cut_short else {}

    def resume_from(self) -> str | None:
        """Returns the checkpoint to resume from; `last` is the newest whole one in the run's folders, if any."""
        path: str | None = self.config.ckpt_path
        if path != LAST:
            return path
        own = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folders = list(dict.fromkeys([self.trainer.default_root_dir, *map(str, own)]))
        newest = newest_checkpoint(folders)
        if newest is None:
            log.info("no checkpoint in %s yet: starting from the beginning", " or ".join(folders))
        else:
            log.info("resuming from %s", newest)
        return newest

    def finish(self) -> None:
        """Scores the final weights if validation has not, writes the report, and prints the scores."""
        if self.datamodule.eval_sets and self.zero_shot.step != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if self.config.report:
            self.report.write(self.trainer, self.model)
        self.print_scores()

    def print_scores(self) -> None:
        """Prints what the evaluation callbacks found, on the first rank."""
        if self.trainer.is_global_zero:
            print_scores(self.zero_shot.rows, self.retrieval.rows, self.referring.rows)


def _tokenizer_of(data: SigLIP2Data) -> Any:
    return data.tokenizer


def fit(arguments: Sequence[str]) -> None:
    """Trains; resumes from `--ckpt_path` if it is given."""
    if option(arguments, "--ckpt_path") == LAST and not {"--config", "-c"} & {a.partition("=")[0] for a in arguments}:
        raise ValueError("--ckpt_path last is looked for in the folder of a recipe: give its --config, too")
    cli = SigLIP2CLI(arguments, command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from())
    cli.finish()


def validate(arguments: Sequence[str]) -> None:
    """Evaluates a checkpoint on the recipe's zero-shot, retrieval and referring sets."""
    cli = SigLIP2CLI(with_checkpoint(arguments, "validate"), command="validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False)
    cli.print_scores()


def test(arguments: Sequence[str]) -> None:
    """As `validate`, through Lightning's test loop."""
    cli = SigLIP2CLI(with_checkpoint(arguments, "test"), command="test")
    cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False)
    cli.print_scores()
