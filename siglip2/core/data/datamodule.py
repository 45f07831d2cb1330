"""The Lightning datamodule: sources, tokenizer and views of a recipe, as loaders."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from siglip2.core.batch import Batch
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.check import check_source
from siglip2.core.data.loader import EvalBatches, FromIndex, Maker, Noticeboard, ResumableLoader, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.data.predicting import PicturesToRank
from siglip2.core.data.settings import PredictSet, ReferringSet, RetrievalSet, TextOptions, TrainSet, ZeroShotSet
from siglip2.core.data.source import Source, open_source
from siglip2.core.data.text import Tokenizer
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Patchifier, Phase, phases
from siglip2.core.plugin import Plugin
from siglip2.core.regions import RegionBox, RegionText
from siglip2.core.timeline import Timeline
from siglip2.core.views import IMAGE, LabelView, TextView, View

log = logging.getLogger(__name__)
EvalSet = ZeroShotSet | RetrievalSet | ReferringSet
FIELDS_NEEDED = {
    ZeroShotSet: ("image", "label"),
    RetrievalSet: ("image", "caption"),
    ReferringSet: ("image", "regions"),
}


class SigLIP2Data(LightningDataModule):
    """Training, evaluation and prediction data of a recipe.

    Args:
        plugins: the plugins of the recipe: they decide which views are made.
        tokenizer: a tokenizer.json, a SentencePiece model, a folder that holds one, or a checkpoint to take it from.
        text: how captions become ids.
        train: what is trained on.
        zero_shot: labelled sets, by name, evaluated by the zero-shot callback.
        retrieval: captioned sets, by name, evaluated by the retrieval callback.
        referring: sets with boxes and their texts, by name, evaluated by the referring callback.
        predict: pictures and texts for `siglip2 predict`.
        num_workers: loader processes on each rank; results do not depend on it.
        eval_batch_size: rows per evaluation batch on each rank.
        seed: decides order, crops and caption choice; null takes seed_everything's.
    """

    def __init__(
        self,
        plugins: list[Plugin],
        tokenizer: str,
        text: TextOptions = TextOptions(),  # noqa: B008 - frozen
        train: TrainSet | None = None,
        zero_shot: dict[str, ZeroShotSet] | None = None,
        retrieval: dict[str, RetrievalSet] | None = None,
        referring: dict[str, ReferringSet] | None = None,
        predict: PredictSet = PredictSet(),  # noqa: B008 - frozen
        num_workers: int = 2,
        eval_batch_size: int = 64,
        seed: int | None = None,
    ):
        super().__init__()
        self.recipe_plugins = plugins
        self.tokenizer = read_tokenizer(tokenizer, text)
        self.train, self.predict = train, predict
        self.zero_shot, self.retrieval = dict(zero_shot or {}), dict(retrieval or {})
        self.referring = dict(referring or {})
        self.num_workers, self.eval_batch_size = num_workers, eval_batch_size
        self.boards: dict[str, Noticeboard] = {}
        self._eval_sources: dict[str, Source] = {}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        kinds = {"zero-shot": set(self.zero_shot), "retrieval": set(self.retrieval), "referring": set(self.referring)}
        for (a, some), (b, others) in combinations(kinds.items(), 2):
            if clash := sorted(some & others):
                raise ValueError(f"'{clash[0]}' names a {a} set and a {b} set: rename one of them")

    @cached_property
    def _hooks(self) -> Any:
        return build_manager(self.recipe_plugins)

    @cached_property
    def patchifier(self) -> Patchifier:
        """The recipe's patchifier."""
        patchifier: Patchifier = self._hooks.hook.patchifier()
        return patchifier

    @property
    def _train_set(self) -> TrainSet:
        if self.train is None:
            raise ValueError("data.train is not set: give at least data.train.path")
        return self.train

    @cached_property
    def train_source(self) -> Source:
        """The samples that are trained on, opened and checked."""
        train = self._train_set
        source = open_source(
            train.path, format=train.format, fields=train.fields, cache_dir=train.cache_dir, max_bytes=train.max_bytes
        )
        check_source(source)
        return source

    @property
    def _train_maker(self) -> Maker:
        return Maker(
            self.train_source,
            self.patchifier,
            self.tokenizer,
            self.seed,
            self._train_set.languages,
            self._board("train"),
        )

    def _board(self, name: str) -> Noticeboard:
        """Where the workers of a loader note what they read; the watchdog looks at `boards`."""
        return self.boards.setdefault(name, Noticeboard(self.num_workers))

    def setup(self, stage: str) -> None:
        """Before `fit`: makes every view of two samples of the first and the last shard of every set.

        Raises:
            ValueError: if a field is missing or no sample can be used; names source, shard, key and field.
        """
        if stage != "fit" or self.train is None:
            return
        begin = time.monotonic()
        maker, layout = self._train_maker, replace(self.patchifier.layout(0), batch_size=1)
        for phase in phases(self.recipe_plugins):
            views = self.views_of(phase)
            check_source(self.train_source, (), use=partial(maker.row, position=0, views=views, layout=layout))
        evaluated = self.eval_sets if self.trainer is None or self.trainer.limit_val_batches else {}
        sizes = [f"{name} {self.eval_batches(name).num_samples}" for name in evaluated]
        if self.trainer is None or self.trainer.is_global_zero:
            beside = f"; evaluation: {', '.join(sizes)}" if sizes else ""
            log.info("data: %s%s (checked in %.1f s)", self._train_size(), beside, time.monotonic() - begin)

    def _train_size(self) -> str:
        """How much there is to train on, for how many readers."""
        shards = len(self.train_source.shard_sizes())
        ranks, workers = self.trainer.world_size if self.trainer else 1, max(1, self.num_workers)
        text = f"{len(self.train_source)} samples in {shards} shard{'s' * (shards > 1)}"
        text += f" for {ranks} rank{'s' * (ranks > 1)} x {workers} worker{'s' * (workers > 1)}"
        if 1 < shards < ranks * workers:
            text += (
                ", which share shards: samples are read at random, so that each is used all the same. From remote or "
                "spinning disks, more shards than readers are faster"
            )
        return text

    @property
    def eval_sets(self) -> dict[str, EvalSet]:
        """All evaluation sets by name, in the order of their loaders."""
        return {**self.zero_shot, **self.retrieval, **self.referring}

    def views_of(self, phase: Phase) -> tuple[View, ...]:
        """Returns the views that the awake plugins of a phase read, each once.

        Raises:
            ValueError: if one name has two descriptions.
        """
        asleep = [p for p in self.recipe_plugins if p.name not in phase.awake]
        merged: dict[str, View] = {}
        for views in self._hooks.subset_hook_caller("views", asleep)():
            for view in views:
                if merged.setdefault(view.name, view) != view:
                    raise ValueError(f"view '{view.name}' is described twice: as {merged[view.name]} and as {view}")
        return tuple(merged.values())

    def train_batches(
        self,
        *,
        max_batches: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        timeline: Timeline | None = None,
    ) -> TrainBatches:
        """Returns the map from batch number to batch, for one rank.

        Args:
            max_batches: micro-batches of the run.
            accumulate: micro-batches per optimizer step.
            rank: this process among `world_size`.
            world_size: processes that share each batch.
            timeline: where the run stands in the whole; None for a whole one.
        """
        order = Order(self.train_source.shard_sizes(), self.seed, window=self._train_set.window)
        views = [(phase.start, self.views_of(phase)) for phase in phases(self.recipe_plugins)]
        return TrainBatches(
            self._train_maker,
            order,
            views,
            max_batches=max_batches,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            timeline=timeline,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        total = trainer.max_steps * accumulate
        batches = self.train_batches(
            max_batches=total,
            accumulate=accumulate,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            timeline=cast(Any, trainer.lightning_module).timeline,
        )
        return self._loader(batches, FromIndex(trainer.global_step * accumulate, total))

    def rehearsal_batch(self, phase: Phase) -> Batch:
        """Returns two samples with the views of a phase, in the longest layout."""
        longest = max(self.patchifier.layouts, key=lambda layout: layout.seq_len)
        layout = replace(longest, batch_size=min(2, longest.batch_size))
        views = self.views_of(phase)
        return EvalBatches(self._train_maker, views, batch_size=layout.batch_size, layout=layout)[0]

    def eval_views(self, dataset: EvalSet) -> tuple[View, ...]:
        """Returns the views of an evaluation set: the image, and its label, or per language a caption or a region."""
        if isinstance(dataset, ZeroShotSet):
            return (IMAGE, LabelView())
        languages: Sequence[str | None] = dataset.languages or [None]
        if isinstance(dataset, RetrievalSet):
            return (IMAGE, *(TextView(caption_name(x), language=x) for x in languages))
        named = [(x, *region_names(x)) for x in languages]
        return (IMAGE, *(view for x, text, box in named for view in (RegionText(text, x), RegionBox(box, x))))

    def eval_batches(self, name: str, *, rank: int = 0, world_size: int = 1) -> EvalBatches:
        """Returns the batches of the evaluation set called `name`, for one rank."""
        dataset = self.eval_sets[name]
        maker = Maker(self._eval_source(name), self.patchifier, self.tokenizer, self.seed, board=self._board(name))
        return EvalBatches(
            maker,
            self.eval_views(dataset),
            batch_size=self.eval_batch_size,
            rank=rank,
            world_size=world_size,
            limit=dataset.limit,
        )

    def _eval_source(self, name: str) -> Source:
        """The samples of an evaluation set, opened and checked once."""
        if name not in self._eval_sources:
            dataset, layout = self.eval_sets[name], self.patchifier.eval_layout(1)
            source = open_source(dataset.path, format=dataset.format, fields=dataset.fields)
            maker = Maker(source, self.patchifier, self.tokenizer, self.seed)
            use = partial(maker.row, position=0, views=self.eval_views(dataset), layout=layout)
            check_source(source, FIELDS_NEEDED[type(dataset)], use=use)
            self._eval_sources[name] = source
        return self._eval_sources[name]

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return [self._loader(self.eval_batches(n, rank=rank, world_size=world_size)) for n in self.eval_sets]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(PicturesToRank(self.predict.images, self.patchifier, self.patchifier.eval_layout(1)))

    def _loader(self, batches: Any, sampler: Any = None) -> DataLoader[Batch]:
        workers = self.num_workers if len(batches) > 1 else 0
        return ResumableLoader(
            batches,
            batch_size=None,  # the dataset's items are whole batches
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            prefetch_factor=4 if workers else None,
        )


def caption_name(language: str | None) -> str:
    """Returns the name of the caption view of a language in evaluation, for example `caption:de`."""
    return "caption" if language is None else f"caption:{language}"


def region_names(language: str | None) -> tuple[str, str]:
    """Returns the names of the text and the box view of a language in evaluation, for example `region_text:de`."""
    suffix = "" if language is None else f":{language}"
    return f"region_text{suffix}", f"region_box{suffix}"


def read_tokenizer(path: str, text: TextOptions) -> Tokenizer:
    """Returns the tokenizer of a file or folder, or the one that a checkpoint (*.ckpt) carries with its contract."""
    if path.endswith(".ckpt"):
        return Tokenizer.from_state(read_checkpoint(path)["siglip2"]["text"])
    return Tokenizer.load(path, **asdict(text))
