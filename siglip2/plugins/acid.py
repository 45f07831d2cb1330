"""`acid`: of every batch, trains on the rows from which the model learns most."""

# m rows of this rank, M of the global super-batch, b of this rank that are kept, K chunks, D width

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from siglip2.core.batch import Batch
from siglip2.core.data.embeddings import CachedReference
from siglip2.core.data.fields import Sample
from siglip2.core.data.text import Tokenizer
from siglip2.core.distributed import mean_over_ranks, rank, world_size
from siglip2.core.hooks import hookimpl
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.model.vision import TimmVisionTower
from siglip2.core.plugin import Plugin
from siglip2.core.reference import Reference, contract_view, load_reference
from siglip2.core.selection import Draw, Embedded, Terms, best_rows, draw_jointly, gumbel_noise, own_scores
from siglip2.core.step import Step
from siglip2.core.views import CAPTION, IMAGE, Context, View

# factor of the learner's and of the reference's loss of a pair (ACID, section 3)
SCORES = {"learnability": (1.0, -1.0), "easy_reference": (0.0, -1.0), "hard_learner": (1.0, 0.0)}
METHODS = ("joint", "independent", "random")
FIRST = ("diagonal", "uniform")


@dataclass(frozen=True)
class FieldView:
    """A number that is stored with a sample, float32 [1]; 0 where it is absent.

    Args:
        name: the key under which the step finds it.
        field: of the sample, as in data.train.fields.
    """

    name: str
    field: str
    copies: int = 1

    def __call__(self, sample: Sample, context: Context) -> Tensor:
        value: Any = sample.get(self.field) if sample.has(self.field) else 0
        try:
            return torch.tensor([float(value)], dtype=torch.float32)
        except (TypeError, ValueError):
            raise sample.bad(f"{self.field} should be a number, found {value!r:.80}") from None


class ACID(Plugin):
    """Active data curation: each batch is a super-batch, of which only the best rows are trained on.

    Rows are scored without gradient by the model itself (the learner) and by a frozen reference, and drawn jointly, by
    what they add to those that were drawn before them (JEST, https://arxiv.org/abs/2406.17711; ACID,
    https://arxiv.org/abs/2411.18674; SigLIP 2, section 2.5). All objectives of the recipe are trained on what was kept.
    The patchifier's batch_size is that of the super-batch. Each kept row costs a training step, every row two forward
    passes. Logged are train/acid/score and kept_score, the mean score of a row's own pair over all rows and over those
    kept, and train/acid/entropy of the draws: 1 is an even draw, near 0 the best rows win without chance.

    Args:
        reference: a checkpoint of `siglip2 fit` that scores, of any size, patch size and resolution, with the same
            tokenizer as the run. It is not written into checkpoints. hard_learner and random do not read it.
        cached: FOLDER/NAME, the reference's embeddings of the training set as `siglip2 embed` wrote them, in place of
            the reference itself, which then is not run.
        score: learnability (loss of the learner minus loss of the reference), easy_reference (minus the loss of the
            reference) or hard_learner (loss of the learner).
        method: joint (drawn in chunks, the published one), independent (the rows with the best score of their own pair,
            without any noise), or random (evenly, without scoring: the control).
        filter_ratio: share of each super-batch that is dropped, in (0, 1): 0.5 for B/16 and 0.75 for B/32 in SigLIP 2.
        n_chunks: chunks in which rows are drawn jointly; 16 in JEST.
        groups: stretches of the super-batch from each of which every chunk takes the same number of rows; a multiple of
            the number of devices, over which the work is divided this way. What is drawn depends on it, but not on the
            number of devices. 1 is the published draw, on one device; with more, good rows compete within their group.
        first: how the first chunk is drawn: diagonal (by the score of each row's own pair) or uniform. Published code
            differs; diagonal is our choice.
        gain: factor of all scores: how much they count against the noise of the draw.
        normalise: divide the score of a row by the number of its pairs, which grows with every chunk. Published code
            differs. Without it late chunks are less random: watch train/acid/entropy.
        scoring_tokens: patches of the smaller images that learner and reference score; a square number where images are
            squares. Null scores what is trained on, and the reference images of its own size.
        score_rows: rows of a device that are scored at a time, for less memory; null scores all at once.
        watch: numeric fields of the samples (data.train.fields.extra) whose mean over all rows and over those kept is
            logged, for example to follow planted noise.
        seed: of the draws.
        start: progress in [0, 1] at which curation begins; before that every row is trained on.
        stop: progress in [0, 1] from which every row is trained on again.

    Raises:
        ValueError: if an option is out of its range; in `setup` if the reference is missing or does not fit, or a
            super-batch does not divide.
    """

    name = "acid"
    reference: Reference | None

    def __init__(
        self,
        reference: str | None = None,
        cached: str | None = None,
        score: str = "learnability",
        method: str = "joint",
        filter_ratio: float = 0.5,
        n_chunks: int = 16,
        groups: int = 8,
        first: str = "diagonal",
        gain: float = 1.0,
        normalise: bool = False,
        scoring_tokens: int | None = None,
        score_rows: int | None = None,
        watch: list[str] = [],  # noqa: B006 - never written to
        seed: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        for option, found, known in (
            ("score", score, SCORES),
            ("method", method, METHODS),
            ("first", first, FIRST),
        ):
            if found not in known:
                raise ValueError(f"acid: {option} is '{found}', expected one of {', '.join(known)}")
        if not 0 < filter_ratio < 1:
            raise ValueError(f"acid: filter_ratio is the share that is dropped, in (0, 1), found {filter_ratio}")
        counts = {"n_chunks": n_chunks, "groups": groups, "scoring_tokens": scoring_tokens, "score_rows": score_rows}
        if wrong := {name: value for name, value in counts.items() if value is not None and value < 1}:
            raise ValueError(f"acid: expected at least 1 of each, found {wrong}")
        if not 0 < gain < math.inf or seed < 0:
            raise ValueError(f"acid: expected a positive gain and a seed of at least 0, found gain={gain}, seed={seed}")
        if reference not in (None, MISSING) and cached is not None:
            raise ValueError(
                f"acid: reference ({reference}) and cached ({cached}) are both set: set one of them to null"
            )
        self.reference_path, self.cached_path, self.score, self.method = reference, cached, score, method
        self.kept_share = 1 - Fraction(str(filter_ratio))  # 1 - 0.8 is not quite 0.2
        self.n_chunks, self.groups = n_chunks if method == "joint" else 1, groups
        self.first, self.gain, self.normalise = first, gain, normalise
        self.scoring_tokens, self.score_rows, self.seed = scoring_tokens, score_rows, seed
        self.watched = {field: FieldView(f"acid_watch_{field}", field) for field in watch}
        self.learner_view: View = IMAGE
        self.reference_view: View = IMAGE
        self.reference = None
        self.cached: CachedReference | None = None
        self._super_batches: frozenset[int] = frozenset()

    @property
    def factors(self) -> tuple[float, float]:
        """What multiplies the losses of learner and reference; 0 where nobody is asked."""
        return (0.0, 0.0) if self.method == "random" else SCORES[self.score]

    @hookimpl
    def setup(self, model: TwoTowers, tokenizer: Tokenizer, patchifier: Patchifier) -> None:
        for layout in patchifier.layouts:
            self._check(layout)
        self._super_batches = frozenset(layout.batch_size for layout in patchifier.layouts)
        learner, reference = self.factors
        if learner and self.scoring_tokens:
            _check_resizable(model, "model.timm")
            self.learner_view = contract_view("acid_image", patchifier.contract(), self.scoring_tokens)
        if reference and self.cached_path is not None:
            self.cached = CachedReference(self.cached_path)
            self.reference_view = self.cached.view("acid_cached")
        elif reference:
            self.reference = self._load(model, tokenizer, patchifier)
            self.reference_view = self._view_of(self.reference, patchifier)

    def _load(self, model: TwoTowers, tokenizer: Tokenizer, patchifier: Patchifier) -> Reference:
        if self.reference_path in (None, MISSING):
            raise ValueError(
                f"acid: the score '{self.score}' needs a reference: give a checkpoint of `siglip2 fit` that has the "
                f"run's tokenizer, --plugins.acid.reference PATH, or what `siglip2 embed` wrote with it, "
                f"--plugins.acid.cached FOLDER/NAME"
            )
        path = str(self.reference_path)
        return load_reference(path, tokenizer, patchifier, fused_attention=model.fused_attention)

    def _view_of(self, reference: Reference, patchifier: Patchifier) -> View:
        """The images that the reference reads: the run's, those that the learner scores, or its own."""
        if self.scoring_tokens:
            _check_resizable(reference.towers, "the reference")
        elif reference.pixels == patchifier.contract():
            return IMAGE
        view = contract_view("acid_reference", reference.pixels, self.scoring_tokens)
        renamed = replace(view, name=self.learner_view.name)  # type: ignore[type-var]
        return self.learner_view if renamed == self.learner_view else view

    def _check(self, layout: Layout) -> None:
        """Raises ValueError if a super-batch cannot be divided as the options say."""
        if layout.packed and self.score_rows:
            raise ValueError("acid: score_rows cannot cut rows that images share: set it to null")
        size, share, parts = layout.batch_size, self.kept_share, self.n_chunks * self.groups
        kept = size * share
        if kept % parts == 0 and size % self.groups == 0:
            return
        unit = math.lcm(self.groups, share.denominator * parts // math.gcd(parts, share.numerator))
        near = [str(n) for n in (size // unit * unit, size // unit * unit + unit) if n]
        raise ValueError(
            f"acid: a super-batch of {size} (those of {layout.seq_len} patches) at filter_ratio {float(1 - share):g} "
            f"leaves {float(kept):g} rows, which do not divide into {self.n_chunks} chunks of {self.groups} groups: "
            f"set the patchifier's batch_size to {' or '.join(near)}, or n_chunks and groups to less"
        )

    @hookimpl
    def views(self) -> list[View]:
        learner, reference = self.factors
        scored = [v for v, factor in ((self.learner_view, learner), (self.reference_view, reference)) if factor]
        return [*dict.fromkeys(scored), *([CAPTION] if scored else []), *self.watched.values()]

    @hookimpl
    @torch.no_grad()
    def curate(self, step: Step) -> Tensor:
        """Returns the rows of this rank that are trained on, int64 [b], by group and then as they were drawn."""
        draw = self._draw(step.batch.size)
        if self.method == "random":
            kept = best_rows(self._noise(step, draw)[0], draw)
            self._log(step, kept, {})
            return kept
        terms = self._terms(step)
        own_m = own_scores(terms)
        if self.method == "independent":
            kept, entropy = best_rows(own_m, draw), {}
        else:
            drawn = draw_jointly(terms, self._noise(step, draw), draw)
            kept, entropy = drawn.rows_b, {"entropy": drawn.entropy}
        self._log(step, kept, {"score": own_m.mean(), "kept_score": own_m.index_select(0, kept).mean(), **entropy})
        return kept

    def kept(self, size: int) -> int:
        return int(size * self.kept_share)

    def chosen_by(self) -> dict[str, object]:
        if self.cached is not None:
            return {"embeddings of": self.cached.head.encoder.digest}
        return {} if self.reference is None else {"reference weights": self.reference.fingerprint}

    def _draw(self, rows: int) -> Draw:
        """How many rows are drawn from how many groups of this rank's rows."""
        ranks = world_size()
        if self.groups % ranks:
            lower = self.groups // ranks * ranks
            near = " or ".join(str(n) for n in (lower, lower + ranks) if n)
            raise ValueError(f"acid: {self.groups} groups do not divide over {ranks} devices: set groups to {near}")
        how = Draw(self.groups // ranks, self.n_chunks, 0, self.first == "uniform", self.gain, self.normalise)
        kept = max(1, int(rows * self.kept_share))
        if rows * ranks in self._super_batches:
            return replace(how, per_group=kept // (how.chunks * how.groups))
        # the rehearsal has two rows: one group, and as many chunks as that leaves
        chunks = max(n for n in range(1, min(kept, self.n_chunks) + 1) if kept % n == 0)
        return replace(how, groups=1, chunks=chunks, per_group=kept // chunks)

    def _noise(self, step: Step, draw: Draw) -> Tensor:
        """Gumbel noise [K, m] of this rank's rows: the same rows have the same, however many ranks there are."""
        rows = step.batch.size
        noise_KM = gumbel_noise(self.seed, step.batch.index, chunks=draw.chunks, rows=rows * world_size())
        return noise_KM[:, rank() * rows : (rank() + 1) * rows].to(step.model.logit_scale.device, non_blocking=True)

    def _terms(self, step: Step) -> Terms:
        """The factor of everybody who is asked, and what they make of the rows of this rank."""
        learner, reference = self.factors
        terms = []
        if learner:
            terms.append((learner, self._embed(step.model, self.learner_view, step.batch)))
        if self.cached is not None:
            terms.append((reference, self._read(self.cached, step.view(self.reference_view.name))))
        elif reference:
            assert self.reference is not None
            terms.append((reference, self._embed(self.reference.towers, self.reference_view, step.batch)))
        torch.clear_autocast_cache()  # its casts were made without gradient, and would be taken for those with it
        return terms

    def _embed(self, towers: TwoTowers, view: View, batch: Batch) -> Embedded:
        size, device = batch.size, towers.logit_scale.device
        batch = replace(batch, views={name: batch.views[name] for name in (view.name, CAPTION.name)})
        parts = [batch]
        if self.score_rows and self.score_rows < size:
            edges = [*range(0, size, self.score_rows), size]
            parts = [batch.select(torch.arange(a, b, device=device)) for a, b in pairwise(edges)]
        images = [towers.encode_image(part.views[view.name]).embedding for part in parts]
        texts = [towers.encode_text(part.views[CAPTION.name]).embedding for part in parts]
        return Embedded(torch.cat(images), torch.cat(texts), towers.logit_scale, towers.logit_bias)

    def _read(self, cached: CachedReference, rows_m2D: Tensor) -> Embedded:
        """What the reference made of the rows of this rank, when it was asked beforehand."""
        image_mD, text_mD = cached.split(rows_m2D)
        scale, bias = (image_mD.new_full((1,), value) for value in (cached.logit_scale, cached.logit_bias))
        return Embedded(image_mD, text_mD, scale, bias)

    def _log(self, step: Step, kept: Tensor, values: dict[str, Tensor]) -> None:
        """Logs means over the rows of all ranks."""
        for field, view in self.watched.items():
            numbers = step.view(view.name)
            values |= {f"all_{field}": numbers.mean(), f"kept_{field}": numbers.index_select(0, kept).mean()}
        if values:
            means = mean_over_ranks(torch.stack(list(values.values())))  # one exchange for all
            for name, mean in zip(values, means.unbind(), strict=True):
                step.log(f"acid/{name}", mean)


def _check_resizable(towers: TwoTowers, whose: str) -> None:
    if isinstance(towers.vision, TimmVisionTower):
        raise ValueError(
            f"acid: {whose} is a network of timm, which reads images of one size: leave scoring_tokens out"
        )
