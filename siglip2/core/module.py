"""The Lightning module: it owns the towers and the plugins and calls hooks in a fixed order. No mathematics."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from siglip2.core.accumulate import (
    Owed,
    WholeStep,
    check_accumulation,
    mean_terms,
    over_pairs,
    owed_by_pairs,
    part_loss,
    parts_of,
)
from siglip2.core.assembly import Heads, merge_unique, the_patchifier
from siglip2.core.batch import Batch, Patches
from siglip2.core.checkpoint import differences, fresh_plugins, reconcile, reopen
from siglip2.core.curation import KeptCounts
from siglip2.core.data.text import Tokenizer
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Positions, phase_at, phases
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.optim import (
    KERNELS_ONLY,
    Rule,
    StepCountLR,
    apply_lr_factors,
    check_rules,
    freeze,
    match_state_by_name,
    param_groups,
    published_adamw,
    without_state_of,
)
from siglip2.core.parallel import FSDP2Strategy, check_strategy, checkpoint_blocks, compile_blocks, cut_moments, shard
from siglip2.core.plugin import Plugin
from siglip2.core.rehearsal import check_cold, check_sleepers, rehearse
from siglip2.core.step import STUDENT, Step
from siglip2.core.timeline import Timeline
from siglip2.core.warm_start import Surgery, begin_from, check_text

log = logging.getLogger(__name__)
LAYOUTS_COMPARED = 16  # batches whose sizes and lengths a resumed run compares with the file's


class SigLIP2Module(LightningModule):
    """Two towers and the plugins that train them.

    Args:
        plugins: the plugins of the recipe, in order.
        tokenizer: the text contract; sizes the token table and travels with every checkpoint.
        size: named size of the towers: tiny/16, mini/16, B/32, B/16, L/16, So400m/14, So400m/16, g-opt/16.
        vision: changes to the shape of the vision tower.
        text: changes to the shape of the text tower.
        timm: a timm ViT by name as the vision tower instead, for example vit_small_patch16_224.
        logit_scale: initial log of the temperature factor (log 10 in the paper).
        logit_bias: initial logit bias; -10 in the paper, for batches of 32768. About -log(batch - 1) suits small ones.
        fused_attention: attention through torch's fused kernel. Off multiplies the matrices out, which in bf16 on a CPU
            is about twice as fast for towers of the quickstart's size.
        optimizer: any torch optimizer. The decoupled weight decay 0.1 at learning rate 1e-3 is the paper's 1e-4: its
            code does not multiply the decay by the learning rate.
        warmup: optimizer steps of linear warm-up before the cosine to zero.
        rules: regexes on parameter names that set learning-rate factors, weight decay and freezing.
        rehearsal: run every phase once on two samples before training.
        warm_start: a checkpoint of another run to start from, or weights of another library (a folder, a file or a hub
            id; docs/interop.md), in any resolution, patch size or patchifier.
        surgery: what a warm start takes over, and how tensors of another size are cut.
        accumulate: parts that each batch is run in, one after the other. Gradients are those of the whole batch, losses
            over pairs included; memory is that of a part, time about that of a second forward pass.
        checkpoint_blocks: keep only the inputs of transformer blocks for the backward pass and run them once more there
            (activation checkpointing): much less memory for about a third more time.
        compile: backend of torch.compile for every transformer block, such as inductor; null does not compile.
    """

    def __init__(
        self,
        plugins: list[Plugin],
        tokenizer: Tokenizer,
        size: str = "B/16",
        vision: ShapeOptions = ShapeOptions(),  # noqa: B008 - frozen
        text: ShapeOptions = ShapeOptions(),  # noqa: B008 - frozen
        timm: str | None = None,
        logit_scale: float = 2.302585092994046,
        logit_bias: float = -10.0,
        fused_attention: bool = True,
        optimizer: OptimizerCallable = published_adamw,
        warmup: int = 20000,
        rules: list[Rule] = [],  # noqa: B006 - never written to
        rehearsal: bool = True,
        warm_start: str | None = None,
        surgery: Surgery = Surgery(),  # noqa: B008 - frozen
        accumulate: int = 1,
        checkpoint_blocks: bool = False,
        compile: str | None = None,
    ):
        super().__init__()
        self.hooks = build_manager(plugins)
        self.patchifier = the_patchifier(self.hooks.hook.patchifier, plugins)
        self.tokenizer, self.rehearsal = tokenizer, rehearsal
        if accumulate < 1:
            raise ValueError(f"model.accumulate is {accumulate}, expected the number of parts of a batch, at least 1")
        self.warm_start, self.surgery, self.accumulate = warm_start, surgery, accumulate
        self.branch: Timeline | None = None
        self.resumed = False
        self._positions = Positions(self.patchifier)
        self.model = build_two_towers(
            size,
            patch_size=self.patchifier.patch_size,
            grid=self.patchifier.grid,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.contract.length,
            vision=vision,
            text=text,
            timm_name=timm,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            fused_attention=fused_attention,
        )
        self.plugins = nn.ModuleDict({p.name: p for p in plugins})
        self.heads: dict[str, nn.Module] = Heads()  # each belongs to the plugin that registered it
        self.hooks.hook.setup(model=self.model, heads=self.heads, tokenizer=tokenizer, patchifier=self.patchifier)
        self.phases = phases(plugins)
        self.rules = [KERNELS_ONLY, *rules]
        self.make_optimizer, self.warmup = optimizer, warmup
        self.checkpoint_blocks, self.compile_backend = checkpoint_blocks, compile
        self._laid_out = False
        self.recipe: dict[str, Any] = {}
        self.woken: set[str] = set()
        self.scalars: dict[str, Tensor] = {}
        self.kept_counts = KeptCounts()
        check_rules((n for n, _ in self.named_parameters()), rules)
        freeze(self, self.rules)

    def forward(self, batch: Batch, progress: float, work: Callable[[Step], Any] | None = None) -> Any:
        """Returns the weighted loss terms of one batch by name, or what `work` makes of its step."""
        step = self.make_step(batch, progress)
        if work is not None:
            return work(step)
        kept = self.curate(step)
        step = step if kept is None else step.select(kept)
        self.scalars = step.scalars
        return self.losses(step)

    def curate(self, step: Step) -> Tensor | None:
        """Returns the rows to train on as the awake curator chose them, int64 [b']; None for all.

        Raises:
            ValueError: if the ranks keep different numbers of rows, or one keeps another number than before.
        """
        kept: Tensor | None = self.awake_hook("curate", step.progress)(step=step)
        phase = phase_at(self.phases, step.progress)
        if any(hasattr(self.plugins[name], "curate") for name in phase.awake):  # all rows are a number, too
            rows = torch.arange(step.batch.size, device=self.device) if kept is None else kept
            self.kept_counts.check(step.batch.size, rows, phase)
        return kept

    def losses(self, step: Step, *, pairs: bool | None = None) -> dict[str, Tensor]:
        """Returns the weighted loss terms of a step by name.

        Args:
            step: what the objectives see.
            pairs: only those that are no mean over rows (`accumulates` is false), or only those that are; None for
                all.
        """
        left_out = [n for n, p in self.plugins.items() if pairs is not None and over_pairs(p) != pairs]
        terms: dict[str, Tensor] = {}
        for answer in self.awake_hook("losses", step.progress, left_out)(step=step):
            merge_unique(terms, answer, "loss term")
        return terms

    def make_step(self, batch: Batch, progress: float) -> Step:
        """Returns the step that the awake plugins see."""
        offered = self.awake_hook("encoders", progress)()
        encoders: dict[str, nn.Module] = {STUDENT: self.model.vision}
        for answer in offered:
            merge_unique(encoders, answer, "encoder")
        del encoders[STUDENT]  # it was there so that no plugin takes its name
        return Step(self.model, batch, progress=progress, encoders=encoders, heads=self.heads)

    def awake_hook(self, name: str, progress: float, left_out: Collection[str] = ()) -> Any:
        """Returns the caller of a hook that leaves out the plugins asleep at `progress`, and those named."""
        called = set(phase_at(self.phases, progress).awake) - set(left_out)
        return self.hooks.subset_hook_caller(name, [p for n, p in self.plugins.items() if n not in called])

    @property
    def timeline(self) -> Timeline:
        """Where this run stands in the whole: all of it, unless it is a branch."""
        return self.branch or Timeline(self.trainer.max_steps, self.warmup)

    @property
    def progress(self) -> float:
        """Share of the whole run that is done, in [0, 1); optimizer steps / max_steps unless this is a branch."""
        return self.timeline.progress(self.trainer.global_step, self.trainer.max_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.wake_due(self.progress)
        if self.accumulate == 1:
            terms = self(batch, self.progress)
            loss = total = torch.stack(list(terms.values())).sum()
        else:
            terms, loss = self._in_parts(batch, self.progress)
            total = torch.stack(list(terms.values())).sum()
        shown = self.device.type != "xla"  # a bar reads every value back after every step
        losses = {f"train/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(losses, prog_bar=shown, batch_size=batch.size)
        self.log("train/loss", total.detach(), batch_size=batch.size)
        self.log_dict({f"train/{name}": value for name, value in self.scalars.items()}, batch_size=batch.size)
        self.log("logit_scale", self.model.logit_scale.detach().exp().mean(), batch_size=batch.size)
        self.log("logit_bias", self.model.logit_bias.detach().mean(), batch_size=batch.size)
        return loss

    def _in_parts(self, batch: Batch, progress: float) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms of a batch that is run in parts, and the last part's loss, whose backward pass is left."""
        self.trainer.optimizers[0].zero_grad()
        count, scalars = self.accumulate, {}

        def curate(step: Step) -> Tensor | None:
            kept = self.curate(step)
            scalars.update(step.scalars)
            return kept

        kept = self(batch, progress, curate)
        batch = batch if kept is None else batch.select(kept)
        parts = parts_of(batch, count, self.device)

        def pairs(whole: Step) -> Owed:
            step = WholeStep(whole, [self.make_step(part, progress) for part in parts])
            owed = owed_by_pairs(step, lambda s: self.losses(s, pairs=True), self)
            scalars.update(step.scalars)
            return owed

        owed, rows = self(batch, progress, pairs), []

        def one(step: Step, number: int) -> Tensor:
            rows.append(self.losses(step, pairs=False))
            scalars.update(step.scalars)
            return part_loss(step, number, count, rows[-1], owed, self)

        for number, part in enumerate(parts):
            loss: Tensor = self(part, progress, partial(one, number=number))
            torch.clear_autocast_cache()  # its casts belong to a graph that is gone after the backward pass
            if number < count - 1:
                self.trainer.strategy.backward(loss, None)
        self.scalars = scalars
        return {**owed.terms, **dict(mean_terms(rows))}, loss

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self.accumulate == 1:  # else Lightning would zero the gradients of the earlier parts here
            super().optimizer_zero_grad(*args, **kwargs)

    def wake_due(self, progress: float) -> None:
        """Calls `wake` on every plugin whose first step this is."""
        for name in phase_at(self.phases, progress).awake:
            plugin = cast(Plugin, self.plugins[name])
            if name not in self.woken:
                others = [p for p in self.plugins.values() if p is not plugin]
                self.hooks.subset_hook_caller("wake", others)(model=self.model)
                self.woken.add(name)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        progress = self.progress  # of the step just taken: Lightning has not counted it yet
        super().optimizer_step(*args, **kwargs)
        self.awake_hook("after_step", progress)(model=self.model, progress=progress)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Returns the embeddings [b, E] of every image and caption view, and other views as they are."""
        return self.embed(batch)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.embed(batch)

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the unit-norm embedding [b, E] of each image and caption view by name.

        Labels, boxes and region texts pass through.
        """
        out = {}
        for name, view in batch.views.items():
            if isinstance(view, Patches):
                out[name] = self.model.encode_image(view).embedding
            elif view.ndim == 2 and not view.is_floating_point() and not name.startswith("region_text"):
                out[name] = self.model.encode_text(view).embedding
            else:
                out[name] = view
        return out

    def configure_model(self) -> None:
        """Lays the model out for training, once; in a run that only evaluates it stays as it is."""
        if self._trainer is None:
            return
        if isinstance(self._trainer.precision_plugin, HalfPrecision):
            # it would rebuild batches, which are frozen; pixels are bytes, and the towers know what they take
            self._trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        if self._trainer.state.fn != TrainerFn.FITTING or self._laid_out:
            return
        self._laid_out = True
        strategy = self._trainer.strategy
        check_strategy(strategy)
        if self.checkpoint_blocks:
            checkpoint_blocks(self)
        if self.compile_backend:
            compile_blocks(self, self.compile_backend)
        if isinstance(strategy, FSDP2Strategy):
            shard(self, strategy.mesh)

    def configure_optimizers(self) -> Any:
        steps = self.trainer.max_steps
        if steps < 1:
            raise ValueError(
                "trainer.max_steps is not set: a recipe is a share of its steps, so give the number of optimizer steps"
            )
        begins = self.warm_start is not None and not self.resumed and self.surgery.schedule == "continue"
        if not begins and self.branch is None and not 0 <= self.warmup < steps:
            raise ValueError(f"model.warmup is {self.warmup} steps, expected fewer than trainer.max_steps = {steps}")
        optimizer = self.make_optimizer(param_groups(self, self.rules))
        if self.trainer.precision != "16-mixed":
            # without a gradient scaler a fused optimizer unscales nothing, so Lightning may clip before it
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        apply_lr_factors(optimizer)
        optimizer.register_load_state_dict_pre_hook(match_state_by_name)
        optimizer.register_load_state_dict_pre_hook(cut_moments)
        schedule = StepCountLR(optimizer, lambda step: self.timeline.lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        check_accumulation(
            cast(Mapping[str, Plugin], self.plugins),
            self.patchifier.layouts,
            parts=self.accumulate,
            batches=self.trainer.accumulate_grad_batches,
            world_size=self.trainer.world_size,
        )
        if self.warm_start is not None and not self.resumed:
            begin_from(self.warm_start, self, self.surgery)
        if self.rehearsal:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            begin = self.progress
            due = tuple(replace(p, start=max(p.start, begin)) for p in self.phases if p.stop > begin)
            cold = rehearse(self, due, lambda phase: data.rehearsal_batch(phase).to(self.device))
            check_cold(cold, self.trainer.strategy)
        else:
            check_sleepers(cast(Mapping[str, Plugin], self.plugins), self.progress, self.trainer.strategy)

    def rehearsal_losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Returns the loss terms at `progress` under the run's precision."""
        with self.trainer.precision_plugin.train_step_context():
            # DDP's hooks are around another module; FSDP2's are around this one, and gather its parameters
            return cast(dict[str, Tensor], self(batch, progress))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["siglip2"] = {
            "recipe": self.recipe,
            "text": self.tokenizer.to_state(),
            "pixels": self.patchifier.contract(),
            "stream": self._stream(),
            "woken": sorted(self.woken),
            "timeline": self._timeline(),
            "optimizer": type(self.trainer.optimizers[0]).__name__ if self.trainer.optimizers else None,
        }

    def _timeline(self) -> dict[str, Any]:
        """Where the run stands, as plain values: `branch` for those who resume it, the rest for those who branch."""
        now, batches = self.timeline, self.trainer.global_step * self.trainer.accumulate_grad_batches
        return {
            "branch": asdict(self.branch) if self.branch else None,
            "total": now.total,
            "warmup": now.warmup,
            "position": now.position(self.trainer.global_step, self.trainer.max_steps),
            "seen": now.examples + self._positions.before(batches),
        }

    def _stream(self) -> dict[str, Any]:
        """What decides which samples come when, as plain values."""
        data, trainer = self.recipe.get("data") or {}, self.recipe.get("trainer") or {}
        layouts = [self.patchifier.layout(i) for i in range(LAYOUTS_COMPARED)]
        plugins = cast(Mapping[str, Plugin], self.plugins)
        options = self.recipe.get("plugins") or {}
        chosen = {n: {**(options.get(n) or {}), **p.chosen_by()} for n, p in plugins.items() if hasattr(p, "curate")}
        return {
            **({"curators": chosen} if chosen else {}),
            "batches": [[layout.batch_size, layout.seq_len] for layout in layouts],
            "data.train": data.get("train"),
            "data.seed": data.get("seed"),
            "trainer.max_steps": trainer.get("max_steps"),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint.get("siglip2")
        if ours is None:
            raise ValueError("this checkpoint was not written by siglip2: it carries no text and pixel contract")
        check_text(self.tokenizer, ours["text"])
        if found := differences(self.patchifier.contract(), ours["pixels"], "here", "there"):
            raise ValueError(
                f"the checkpoint was trained with other pixels: {'; '.join(found)}. To start a run at another "
                f"resolution from it, give it as model.warm_start instead"
            )
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self.resumed = True
        branch = (ours.get("timeline") or {}).get("branch")
        self.branch = Timeline(**branch) if branch else None
        if resuming and self.warm_start and not branch:
            log.warning("resuming from a checkpoint of a run that is no branch: model.warm_start is not read")
        current = self.state_dict()
        fresh = fresh_plugins(checkpoint["state_dict"], current)
        self.woken = (set(ours["woken"]) & set(self.plugins)) - fresh  # what starts fresh is woken again
        for line in differences(self._stream(), ours["stream"], "here", "in the checkpoint") if resuming else ():
            log.warning("resuming with another stream of samples: %s", line)
        checkpoint["state_dict"] = reconcile(checkpoint["state_dict"], current)
        if resuming and checkpoint["global_step"] < self.trainer.max_steps:
            reopen(checkpoint["loops"])
        if "optimizer_states" in checkpoint:
            theirs = tuple(f"plugins.{name}." for name in fresh)
            checkpoint["optimizer_states"] = [without_state_of(s, theirs) for s in checkpoint["optimizer_states"]]
