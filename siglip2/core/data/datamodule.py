"""The Lightning datamodule: sources, tokenizer and views of a recipe, as loaders."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from siglip2.core.batch import Batch
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.check import check_captions, check_source
from siglip2.core.data.loader import EvalBatches, FromIndex, Maker, Noticeboard, ResumableLoader, Shares, TrainBatches
from siglip2.core.data.mixture import JoinedSource, Mixture, seed_of
from siglip2.core.data.order import Order
from siglip2.core.data.predicting import PicturesToRank
from siglip2.core.data.settings import PredictSet, ReferringSet, RetrievalSet, TextOptions, TrainSet, ZeroShotSet
from siglip2.core.data.source import Source, open_source
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.weights import open_weights
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


@runtime_checkable
class ChecksItself(Protocol):
    """A view that reads more than samples, and can tell beforehand whether that is there and fits."""

    def check(self, source: Source, tokenizer: Tokenizer) -> None:
        """Raises ValueError if what it reads does not fit the samples or the text contract."""


class SigLIP2Data(LightningDataModule):
    """Training, evaluation and prediction data of a recipe.

    Args:
        plugins: the plugins of the recipe: they decide which views are made.
        tokenizer: a tokenizer.json, a SentencePiece model, a folder or hub id with one, or a checkpoint to take it
            from.
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
        self._train_parts = train.parts() if train else {}
        self.train_shares = train.source_shares() if train else {}
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

    @cached_property
    def _train_sources(self) -> dict[str, Source]:
        """The sets that are trained on by name, opened and checked; one alone has the name ""."""
        if self.train is None:
            raise ValueError("data.train is not set: give at least data.train.path")
        return {name: _open_train(name, part) for name, part in self._train_parts.items()}

    @cached_property
    def train_source(self) -> Source:
        """The samples that are trained on, those of several sources one after another."""
        sources = self._train_sources
        return JoinedSource(sources) if self.train_shares else sources[""]

    @cached_property
    def train_order(self) -> Order | Mixture:
        """Which sample stands at which position of the training stream."""
        orders = {name: self._order(name, source) for name, source in self._train_sources.items()}
        return Mixture(orders, self.train_shares, self.seed) if self.train_shares else orders[""]

    def _order(self, name: str, source: Source) -> Order:
        part, seed = self._train_parts[name], seed_of(self.seed, name) if name else self.seed
        with _in_source(name):
            weights = None if part.weights is None else open_weights(source, part.weights)
            return Order(source.shard_sizes(), seed, window=part.window, weights=weights)

    @property
    def _train_maker(self) -> Maker:
        shares = {name: Shares(part.languages, part.captions) for name, part in self._train_parts.items()}
        return Maker(self.train_source, self.patchifier, self.tokenizer, self.seed, shares, self._board("train"))

    def _board(self, name: str) -> Noticeboard:
        """Where the workers of a loader note what they read; the watchdog looks at `boards`."""
        return self.boards.setdefault(name, Noticeboard(self.num_workers))

    def setup(self, stage: str) -> None:
        """Before `fit`: makes every view of two samples of the first and the last shard of every set.

        Raises:
            FileNotFoundError: if shards or example weights are missing.
            ValueError: if a field is missing, no sample can be used, or example weights are stale; names source, shard,
                key and field.
        """
        if stage != "fit" or self.train is None:
            return
        begin = time.monotonic()
        maker, layout = self._train_maker, replace(self.patchifier.layout(0), batch_size=1)
        for phase in phases(self.recipe_plugins):
            views = self.views_of(phase)
            for view in views:
                if isinstance(view, ChecksItself):
                    view.check(self.train_source, self.tokenizer)
            make = partial(maker.row, position=0, views=views, layout=layout)
            for name, source in self._train_sources.items():
                first = self.train_source.first_of(name) if isinstance(self.train_source, JoinedSource) else 0
                with _in_source(name):
                    check_source(source, (), use=_beginning_at(first, make))
        _ = self.train_order  # opens example weights
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
        if self.train_shares:
            sizes = {name: len(source) for name, source in self._train_sources.items()}
            parts = [f"{share:.4g} {name} ({sizes[name]})" for name, share in self.train_shares.items()]
            text += f", mixed {' + '.join(parts)},"
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
        views = [(phase.start, self.views_of(phase)) for phase in phases(self.recipe_plugins)]
        return TrainBatches(
            self._train_maker,
            self.train_order,
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


def _open_train(name: str, part: TrainSet) -> Source:
    """Opens one set that is trained on, and looks for its pictures and captions."""
    assert part.path is not None
    with _in_source(name):
        source = open_source(
            part.path, format=part.format, fields=part.fields, cache_dir=part.cache_dir, max_bytes=part.max_bytes
        )
        if part.captions is None:
            check_source(source)
        else:
            check_source(source, ("image",))
            check_captions(source, list(part.captions))
    return source


def _beginning_at(first: int, make: Callable[[int], Any]) -> Callable[[int], Any]:
    return lambda number: make(first + number)


@contextmanager
def _in_source(name: str) -> Iterator[None]:
    """Says of errors which of several sources they are about."""
    try:
        yield
    except (OSError, ValueError) as error:
        if name:
            error.add_note(f"in data.train.sources.{name}")
        raise


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
