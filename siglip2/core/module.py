"""The Lightning module: it owns the towers and the plugins and calls hooks in a fixed order. No mathematics."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from siglip2.core.batch import Batch, Patches
from siglip2.core.checkpoint import fresh_plugins, reconcile
from siglip2.core.data.text import Tokenizer
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Patchifier, Phase, phase_at, phases
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
from siglip2.core.schedules import warmup_cosine
from siglip2.core.step import STUDENT, Step

log = logging.getLogger(__name__)


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
    ):
        super().__init__()
        self.hooks = build_manager(plugins)
        self.patchifier = the_patchifier(self.hooks.hook.patchifier, plugins)
        self.tokenizer, self.rehearsal = tokenizer, rehearsal
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
    def progress(self) -> float:
        """Optimizer steps done / max_steps, in [0, 1)."""
        return self.trainer.global_step / max(self.trainer.max_steps, 1)

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
        if not 0 <= self.warmup < steps:
            raise ValueError(f"model.warmup is {self.warmup} steps, expected fewer than trainer.max_steps = {steps}")
        optimizer = self.make_optimizer(param_groups(self, self.rules))
        if self.trainer.precision != "16-mixed":
            # without a gradient scaler a fused optimizer unscales nothing, so Lightning may clip before it
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        apply_lr_factors(optimizer)
        optimizer.register_load_state_dict_pre_hook(match_state_by_name)
        schedule = StepCountLR(optimizer, partial(warmup_cosine, total=steps, warmup=self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._check_accumulation()
        if self.rehearsal:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self._check_cold(rehearse(self, self.phases, lambda phase: data.rehearsal_batch(phase).to(self.device)))
        else:
            self._check_sleepers()

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
        sleepers = [n for n, p in trained if p.start > 0 or p.stop < 1]
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
        }

    def _stream(self) -> dict[str, Any]:
        """What decides which samples come when, as plain values."""
        data, trainer = self.recipe.get("data") or {}, self.recipe.get("trainer") or {}
        batch_size = self.patchifier.layout(0).batch_size
        return {
            "batch_size": batch_size,
            "data.train": data.get("train"),
            "data.seed": data.get("seed"),
            "trainer.max_steps": trainer.get("max_steps"),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint.get("siglip2")
        if ours is None:
            raise ValueError("this checkpoint was not written by siglip2: it carries no text and pixel contract")
        differences = self.tokenizer.differences(Tokenizer.from_state(ours["text"]))
        differences += _differences(self.patchifier.contract(), ours["pixels"], "here", "there")
        if differences:
            raise ValueError("the checkpoint was trained with another input contract: " + "; ".join(differences))
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
