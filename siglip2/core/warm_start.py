"""A run that starts from the weights of another, of any library: towers cut to size, the rest as far as it fits."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torch import Tensor, nn

from siglip2.core.checkpoint import differences, fresh_plugins, read_checkpoint, reconcile
from siglip2.core.data.text import Tokenizer
from siglip2.core.interop.contracts import same_vocabulary
from siglip2.core.interop.detect import is_foreign, read_weights
from siglip2.core.interop.weights import Weights
from siglip2.core.layout import phase_at
from siglip2.core.model.vision import VisionTower
from siglip2.core.optim import without_state_of
from siglip2.core.surgery import FILTERS, resize_kernel, resize_positions
from siglip2.core.timeline import Timeline

log = logging.getLogger(__name__)
SCHEDULES = ("continue", "fresh")


@dataclass(frozen=True)
class Surgery:
    """What a warm start takes over, and how tensors of another size are cut.

    Args:
        schedule: `continue` goes on at the checkpoint's progress: losses, learning rate and stream of samples are those
            of the run that it left, and trainer.max_steps are spread over what remained of it. `fresh` begins at
            progress 0 with this recipe's own warm-up.
        optimizer: keep the optimizer's state for parameters that kept their shape.
        corners: resize position tables corner-aligned, as big_vision does when it loads a fixed-resolution checkpoint;
            off is bilinear, antialiased, half-pixel, as NaFlex does at every step. Which one SigLIP 2 used at 95 % is
            not published.
        kernel_filter: bilinear or bicubic, the resize that a patch kernel of another size is made to undo.
        kernel_antialias: whether that resize is antialiased. big_vision: bilinear, not antialiased.

    Raises:
        ValueError: if there is no such schedule or filter.
    """

    schedule: str = "continue"
    optimizer: bool = True
    corners: bool = False
    kernel_filter: str = "bilinear"
    kernel_antialias: bool = False

    def __post_init__(self) -> None:
        if self.kernel_filter not in FILTERS:
            raise ValueError(f"model.surgery.kernel_filter is '{self.kernel_filter}', expected {' or '.join(FILTERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"model.surgery.schedule is '{self.schedule}', expected {' or '.join(SCHEDULES)}")


@dataclass(frozen=True)
class Fitted:
    """A state dict that fits a module, and what was done to it.

    Args:
        state: every tensor of the module by name.
        kept: names that were taken over as they are.
        resized: name -> what was done.
        fresh: plugins that start fresh.
    """

    state: dict[str, Tensor]
    kept: tuple[str, ...]
    resized: dict[str, str]
    fresh: frozenset[str]


def begin_from(path: str, module: Any, surgery: Surgery) -> None:
    """Gives a run that is set up the weights, optimizer state and place in the schedule of a checkpoint.

    Sets `branch` and `woken` of the module. Other libraries' files have weights alone: plugins and optimizer start
    fresh, and so does the schedule.

    Args:
        path: of a checkpoint of ours, or whatever `read_weights` reads.
        module: the `SigLIP2Module` that starts, with its trainer.
        surgery: what is taken over and how.

    Raises:
        ValueError: if the checkpoint does not fit, in text, towers, optimizer or schedule.
    """
    if path == MISSING:
        raise ValueError(
            "this recipe is a branch: give the checkpoint that it leaves, for example "
            "--model.warm_start runs/siglip2-b16-256/progress-0.95.ckpt"
        )
    if is_foreign(path):
        _begin_from_weights(path, module, surgery)
        return
    checkpoint, trainer = read_checkpoint(path), module.trainer
    ours = checkpoint["siglip2"]
    check_text(module.tokenizer, ours["text"])
    if surgery.schedule == "continue":
        module.branch = branch_timeline(ours.get("timeline"))
    fitted = fit_state(checkpoint["state_dict"], module, surgery)
    module.load_state_dict(fitted.state)
    awake = phase_at(module.phases, module.progress).awake  # who sleeps here is woken again
    module.woken = (set(ours["woken"]) & set(awake)) - fitted.fresh
    optimizer = trainer.optimizers[0]
    if surgery.optimizer:
        _check_optimizer(optimizer, ours.get("optimizer"))
    states = checkpoint.get("optimizer_states") if surgery.optimizer else None
    with_state = load_optimizer(optimizer, states[0], fitted) if states else None
    for config in trainer.lr_scheduler_configs:
        config.scheduler.load_state_dict(config.scheduler.state_dict())  # its factors may be a branch's now
    if trainer.is_global_zero:
        pixels = differences(module.patchifier.contract(), ours["pixels"], "now", "then")
        report(path, fitted, with_state, pixels, module.branch, trainer.max_steps)


def _begin_from_weights(path: str, module: Any, surgery: Surgery) -> None:
    if surgery.schedule != "fresh":
        raise ValueError(
            f"{path} is no checkpoint of ours and does not say where in a schedule it stands: set "
            f"model.surgery.schedule to fresh, for a schedule of this recipe's own"
        )
    weights, trainer = read_weights(path), module.trainer
    check_weights(weights, module, path)
    saved = {f"model.{name}": tensor for name, tensor in weights.state.items()}
    current = module.state_dict()
    own = () if weights.text else ("model.text.", "model.logit_")  # of a trunk alone: this run's own text tower
    saved |= {name: tensor for name, tensor in current.items() if name.startswith(own)}
    fitted = fit_state(saved, module, surgery)
    module.load_state_dict(fitted.state)
    if not trainer.is_global_zero:
        return
    pixels = differences(module.patchifier.contract(), weights.pixels, "now", "then") if weights.pixels else []
    report(path, fitted, None, pixels, None, trainer.max_steps)
    for note in weights.notes:
        log.info("  %s", note)
    if own:
        log.info("  fresh: the text tower, temperature and bias, which a vision tower alone does not bring")


def check_weights(weights: Weights, module: Any, path: str) -> None:
    """Raises ValueError if weights mean something else in a run than where they were trained, though they would load.

    Args:
        weights: that were read.
        module: the `SigLIP2Module` that starts.
        path: what messages call them.
    """
    towers, tokenizer = module.model, module.tokenizer
    if not isinstance(towers.vision, VisionTower):
        raise ValueError(f"{path} holds a SigLIP tower, and this recipe has one of timm's own: drop model.timm")
    for name, found in weights.heads.items():
        ours: Any = getattr(towers, name).blocks[0]
        if found != ours.attn.num_heads:  # tensors of the same shape, read as other heads
            raise ValueError(
                f"{path} has {found} attention heads in its {name} tower, this recipe {ours.attn.num_heads}: set "
                f"model.size, or model.{name}.num_heads, to match"
            )
    if weights.text is None:
        return
    if tokenizer.vocab_size != weights.vocab_size:
        raise ValueError(
            f"{path} reads a vocabulary of {weights.vocab_size} ids, this run's tokenizer has {tokenizer.vocab_size}: "
            f"give --data.tokenizer the tokenizer that lies beside the weights"
        )
    if weights.tokenizer is None:
        log.warning("%s does not say how texts were read: nothing was compared with this run's text contract", path)
        return
    lines = tokenizer.contract.differences(weights.tokenizer.contract)
    if not same_vocabulary(tokenizer, weights.tokenizer):
        lines.insert(0, "tokenizer file: other pieces")
    if lines:
        raise ValueError(
            f"{path} was trained with another text contract: {'; '.join(lines)}. Set data.text to match, and "
            f"--data.tokenizer to the tokenizer that lies beside the weights"
        )


def check_text(tokenizer: Tokenizer, saved: Any) -> None:
    """Raises ValueError if a checkpoint was trained with another text contract; `saved` is its `siglip2.text`."""
    if found := tokenizer.differences(Tokenizer.from_state(saved)):
        raise ValueError(
            f"the checkpoint was trained with another text contract: {'; '.join(found)}. Set data.text to "
            f"match; --data.tokenizer CHECKPOINT takes tokenizer and contract out of the file"
        )


def _check_optimizer(optimizer: Any, saved: str | None) -> None:
    found = type(optimizer).__name__
    if saved not in (None, found):
        raise ValueError(
            f"the checkpoint has the state of another optimizer: {saved} there, {found} here. Take the same one, "
            f"or set model.surgery.optimizer to false to start it fresh"
        )


def fit_state(saved: Mapping[str, Tensor], module: nn.Module, surgery: Surgery) -> Fitted:
    """Returns the state of another run, with the position tables and patch kernels of all vision towers cut to size.

    Args:
        saved: `state_dict` of a checkpoint.
        module: the run that starts; teachers in its plugins are cut as well.
        surgery: how.

    Raises:
        ValueError: if the towers differ in more than that.
    """
    current = module.state_dict()
    cut, resized = dict(saved), {}
    for prefix in [name for name, part in module.named_modules() if isinstance(part, VisionTower)]:
        for name, (tensor, done) in _cut(prefix, saved, current, surgery).items():
            cut[name], resized[name] = tensor, done
    fresh = fresh_plugins(cut, current)
    state = reconcile(cut, current)
    kept = [n for n in current if n not in resized and not n.startswith(tuple(f"plugins.{p}." for p in fresh))]
    return Fitted(state, tuple(kept), {n: done for n, done in resized.items() if n in current}, frozenset(fresh))


def _cut(
    prefix: str, saved: Mapping[str, Tensor], current: Mapping[str, Tensor], surgery: Surgery
) -> dict[str, tuple[Tensor, str]]:
    """The two tensors of a vision tower whose shape follows the input, where it differs, with what was done."""
    table, kernel = f"{prefix}.pos_embed", f"{prefix}.embed.weight"
    out = {}
    if table in saved and saved[table].shape[:2] != current[table].shape[:2]:
        (rows, columns), (r, c) = saved[table].shape[:2], current[table].shape[:2]
        how = "corner-aligned" if surgery.corners else "antialiased"
        resized = resize_positions(saved[table], (r, c), corners=surgery.corners)
        out[table] = resized, f"positions {rows} x {columns} -> {r} x {c}, bilinear, {how}"
    if kernel in saved and saved[kernel].shape[1] != current[kernel].shape[1]:
        p, q = (round((t.shape[1] // 3) ** 0.5) for t in (saved[kernel], current[kernel]))
        filter, antialias = surgery.kernel_filter, surgery.kernel_antialias
        resized = resize_kernel(saved[kernel], q, filter=filter, antialias=antialias)
        how = f"{filter}, {'antialiased' if antialias else 'not antialiased'}"
        out[kernel] = resized, f"patch kernel {p} -> {q} px, pseudo-inverse of the resize ({how})"
    return out


def branch_timeline(saved: Mapping[str, Any] | None) -> Timeline:
    """Returns the timeline of a branch from what a checkpoint says of its own (`siglip2.timeline`).

    Raises:
        ValueError: if it says nothing, or the run has come to its end, so that nothing of its schedule is left.
    """
    if saved is None:
        raise ValueError(
            "the checkpoint does not say where its run stood: it is older than branches are. Resume that run for a "
            "step and save it again, or set model.surgery.schedule to fresh"
        )
    if saved["position"] >= saved["total"]:
        raise ValueError(
            f"the checkpoint is from the end of its run ({saved['position']:.10g} of {saved['total']} steps): nothing "
            f"of its schedule is left to continue. Take an earlier one, or set model.surgery.schedule to fresh"
        )
    return Timeline(saved["total"], saved["warmup"], saved["position"], saved["seen"])


def load_optimizer(optimizer: Any, saved: dict[str, Any], fitted: Fitted) -> int:
    """Loads the state of the parameters that were kept; returns of how many there is one."""
    forgotten = (*(f"plugins.{name}." for name in fitted.fresh), *fitted.resized)
    optimizer.load_state_dict(without_state_of(saved, forgotten))  # which matches by name
    return len(optimizer.state)


def report(
    path: str, fitted: Fitted, with_state: int | None, pixels: Sequence[str], timeline: Timeline | None, steps: int
) -> None:
    """Logs what was kept, resized, and started fresh; what was dropped, `reconcile` has named.

    Args:
        path: of the checkpoint.
        fitted: what was done.
        with_state: parameters with optimizer state; None if it was not taken over.
        pixels: what differs between the two pixel contracts.
        timeline: of the branch; None for a schedule of its own.
        steps: optimizer steps of this run.
    """
    values = sum(fitted.state[name].numel() for name in fitted.kept)
    log.info("warm start from %s: kept %d tensors (%.1f M values)", path, len(fitted.kept), values / 1e6)
    for name, done in fitted.resized.items():
        log.info("  resized %s: %s", name, done)
    for difference in pixels:
        log.info("  pixels: %s", difference)
    for name in sorted(fitted.fresh):
        log.info("  fresh: plugin '%s'", name)
    log.info("  optimizer state: %s", "fresh" if with_state is None else f"kept for {with_state} parameters")
    if timeline is not None:
        left = timeline.total - timeline.first
        log.info(
            "  continues at %.1f %% (step %.10g of %d, %d examples seen): the %.10g steps left there are %d here, "
            "%.3g times",
            100 * timeline.first / timeline.total,
            timeline.first,
            timeline.total,
            timeline.examples,
            left,
            steps,
            steps / left,
        )
