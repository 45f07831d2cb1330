"""The Lightning module: it owns the towers and the plugins and calls hooks in a fixed order. No mathematics."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from siglip2.core.batch import Batch, Patches
from siglip2.core.checkpoint import fresh_plugins, read_checkpoint, reconcile
from siglip2.core.data.text import Tokenizer
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Patchifier, Phase, Positions, phase_at, phases
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
from siglip2.core.plugin import Objective, Plugin
from siglip2.core.rehearsal import name_cold, rehearse
from siglip2.core.step import STUDENT, Step
from siglip2.core.timeline import Timeline
from siglip2.core.warm_start import Surgery, branch_timeline, fit_state, load_optimizer, report

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
        warm_start: a checkpoint of another run to start from, in any resolution, patch size or patchifier.
        surgery: what a warm start takes over, and how tensors of another size are cut.
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
    ):
        super().__init__()
        self.hooks = build_manager(plugins)
        self.patchifier = the_patchifier(self.hooks.hook.patchifier, plugins)
        self.tokenizer, self.rehearsal = tokenizer, rehearsal
        self.warm_start, self.surgery = warm_start, surgery
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
        self.hooks.hook.setup(model=self.model, heads=self.heads)
        self.phases = phases(plugins)
        self.rules = [KERNELS_ONLY, *rules]
        self.make_optimizer, self.warmup = optimizer, warmup
        self.recipe: dict[str, Any] = {}
        self.woken: set[str] = set()
        self.scalars: dict[str, Tensor] = {}
        check_rules((n for n, _ in self.named_parameters()), rules)
        freeze(self, self.rules)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Returns the weighted loss terms of one batch by name."""
        step = self.make_step(batch, progress)
        kept = self.awake_hook("curate", progress)(step=step)
        step = step if kept is None else step.select(kept)
        terms: dict[str, Tensor] = {}
        for answer in self.awake_hook("losses", progress)(step=step):
            merge_unique(terms, answer, "loss term")
        self.scalars = step.scalars
        return terms

    def make_step(self, batch: Batch, progress: float) -> Step:
        """Returns the step that the awake plugins see."""
        offered = self.awake_hook("encoders", progress)()
        encoders: dict[str, nn.Module] = {STUDENT: self.model.vision}
        for answer in offered:
            merge_unique(encoders, answer, "encoder")
        del encoders[STUDENT]  # it was there so that no plugin takes its name
        return Step(self.model, batch, progress=progress, encoders=encoders, heads=self.heads)

    def awake_hook(self, name: str, progress: float) -> Any:
        """Returns the caller of a hook that leaves out the plugins asleep at `progress`."""
        awake = phase_at(self.phases, progress).awake
        return self.hooks.subset_hook_caller(name, [p for n, p in self.plugins.items() if n not in awake])

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
        terms = self(batch, self.progress)
        total = torch.stack(list(terms.values())).sum()
        self.log_dict(
            {f"train/{name}": term.detach() for name, term in terms.items()}, prog_bar=True, batch_size=batch.size
        )
        self.log("train/loss", total.detach(), batch_size=batch.size)
        self.log_dict({f"train/{name}": value for name, value in self.scalars.items()}, batch_size=batch.size)
        self.log("logit_scale", self.model.logit_scale.detach().exp().mean(), batch_size=batch.size)
        self.log("logit_bias", self.model.logit_bias.detach().mean(), batch_size=batch.size)
        return total

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

    def configure_optimizers(self) -> Any:
        steps = self.trainer.max_steps
        if steps < 1:
            raise ValueError(
                "trainer.max_steps is not set: a recipe is a share of its steps, so give the number of optimizer steps"
            )
        continues = self.warm_start is not None and self.surgery.schedule == "continue"
        if not continues and not 0 <= self.warmup < steps:
            raise ValueError(f"model.warmup is {self.warmup} steps, expected fewer than trainer.max_steps = {steps}")
        optimizer = self.make_optimizer(param_groups(self, self.rules))
        if self.trainer.precision != "16-mixed":
            # without a gradient scaler a fused optimizer unscales nothing, so Lightning may clip before it
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        apply_lr_factors(optimizer)
        optimizer.register_load_state_dict_pre_hook(match_state_by_name)
        schedule = StepCountLR(optimizer, lambda step: self.timeline.lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._check_accumulation()
        if self.warm_start is not None and not self.resumed:
            self._start_warm(self.warm_start)
        if self.rehearsal:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            begin = self.progress
            due = tuple(replace(p, start=max(p.start, begin)) for p in self.phases if p.stop > begin)
            self._check_cold(rehearse(self, due, lambda phase: data.rehearsal_batch(phase).to(self.device)))
        else:
            self._check_sleepers()

    def _start_warm(self, path: str) -> None:
        checkpoint = read_checkpoint(path)
        ours = checkpoint["siglip2"]
        self._check_text(ours["text"])
        fitted = fit_state(checkpoint["state_dict"], self, self.surgery)
        self.load_state_dict(fitted.state)
        self.woken = (set(ours["woken"]) & set(self.plugins)) - fitted.fresh
        states = checkpoint.get("optimizer_states") if self.surgery.optimizer else None
        with_state = load_optimizer(self.trainer.optimizers[0], states[0], fitted) if states else None
        if self.surgery.schedule == "continue":
            self.branch = branch_timeline(ours["timeline"])
            for config in self.trainer.lr_scheduler_configs:
                config.scheduler.load_state_dict(config.scheduler.state_dict())  # its factors are the branch's now
        report(path, fitted, with_state, self.branch, self.trainer.max_steps)

    def rehearsal_losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Returns the loss terms at `progress` under the run's precision."""
        with self.trainer.precision_plugin.train_step_context():
            return self.forward(batch, progress)

    def _check_accumulation(self) -> None:
        inexact = [n for n, p in self.plugins.items() if isinstance(p, Objective) and not p.accumulates]
        if self.trainer.accumulate_grad_batches > 1 and inexact:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but {', '.join(inexact)} "
                f"would see only the pairs inside each micro-batch, or take batch statistics such as a centre from it, "
                f"which is another loss: set it to 1 and use more devices"
            )

    @property
    def _plain_ddp(self) -> bool:
        strategy = self.trainer.strategy
        return isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")

    def _check_cold(self, cold: Mapping[Phase, list[str]]) -> None:
        if self._plain_ddp and any(cold.values()):
            raise ValueError(
                f"no gradient reaches {name_cold(cold)}, and plain DDP waits for one of every parameter in every step: "
                f"use --trainer.strategy ddp_find_unused_parameters_true"
            )

    def _check_sleepers(self) -> None:
        """Guesses what the rehearsal would have found."""
        plugins = cast(Iterable[tuple[str, Plugin]], self.plugins.items())
        trained = [(n, p) for n, p in plugins if any(x.requires_grad for x in p.parameters())]
        begin = self.progress
        sleepers = [n for n, p in trained if p.start > begin or p.stop < 1]
        if self._plain_ddp and sleepers:
            raise ValueError(
                f"plugins that sleep for part of the run ({', '.join(sleepers)}) have parameters without gradient "
                f"then, which plain DDP does not allow: use --trainer.strategy ddp_find_unused_parameters_true"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["siglip2"] = {
            "recipe": self.recipe,
            "text": self.tokenizer.to_state(),
            "pixels": self.patchifier.contract(),
            "stream": self._stream(),
            "woken": sorted(self.woken),
            "timeline": self._timeline(),
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
        return {
            "batches": [[layout.batch_size, layout.seq_len] for layout in layouts],
            "data.train": data.get("train"),
            "data.seed": data.get("seed"),
            "trainer.max_steps": trainer.get("max_steps"),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint.get("siglip2")
        if ours is None:
            raise ValueError("this checkpoint was not written by siglip2: it carries no text and pixel contract")
        self._check_text(ours["text"])
        if differences := _differences(self.patchifier.contract(), ours["pixels"], "here", "there"):
            raise ValueError(
                f"the checkpoint was trained with other pixels: {'; '.join(differences)}. To start a run at another "
                f"resolution from it, give it as model.warm_start instead"
            )
        self.resumed = True
        branch = (ours.get("timeline") or {}).get("branch")
        self.branch = Timeline(**branch) if branch else None
        current = self.state_dict()
        fresh = fresh_plugins(checkpoint["state_dict"], current)
        self.woken = (set(ours["woken"]) & set(self.plugins)) - fresh  # what starts fresh is woken again
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        for line in _differences(self._stream(), ours["stream"], "here", "in the checkpoint") if resuming else ():
            log.warning("resuming with another stream of samples: %s", line)
        checkpoint["state_dict"] = reconcile(checkpoint["state_dict"], current)
        if "optimizer_states" in checkpoint:
            theirs = tuple(f"plugins.{name}." for name in fresh)
            checkpoint["optimizer_states"] = [without_state_of(s, theirs) for s in checkpoint["optimizer_states"]]

    def _check_text(self, state: Any) -> None:
        if differences := self.tokenizer.differences(Tokenizer.from_state(state)):
            raise ValueError("the checkpoint was trained with another text contract: " + "; ".join(differences))


class Heads(dict[str, nn.Module]):
    """Heads by name; a second one under a taken name is an error, since the first would be lost silently."""

    def __setitem__(self, name: str, head: nn.Module) -> None:
        if name in self:
            raise ValueError(f"two plugins give a head called '{name}': rename one of them")
        super().__setitem__(name, head)

    def update(self, *heads: Any, **more: nn.Module) -> None:
        """Adds heads one by one, each under a name of its own."""
        for name, head in dict(*heads, **more).items():
            self[name] = head


def the_patchifier(hook: Any, plugins: Iterable[Plugin]) -> Patchifier:
    """Returns the one patchifier of a recipe.

    Raises:
        ValueError: if no plugin or more than one offers a patchifier.
    """
    offering = [p.name for p in plugins if hasattr(p, "patchifier")]
    if len(offering) != 1:
        found = "none" if not offering else " and ".join(offering)
        cure = f"remove one (--plugins.{offering[0]} off)" if offering else "`siglip2 plugins` lists what there is"
        raise ValueError(f"a recipe needs exactly one patchifier, found {found}: {cure}")
    patchifier: Patchifier = hook()
    return patchifier


def merge_unique(into: dict[str, Any], more: Mapping[str, Any], what: str) -> None:
    """Adds the entries of `more`; raises ValueError if a name is there already, since one would be lost silently."""
    for name, value in more.items():
        if name in into:
            raise ValueError(f"two plugins give a {what} called '{name}': rename one of them")
        into[name] = value


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], of_a: str, of_b: str) -> list[str]:
    keys = [*a, *(k for k in b if k not in a)]
    return [f"{k}: {of_a} {a.get(k)}, {of_b} {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
