"""The rehearsal: every phase of a recipe run once on two samples before training, without leaving a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from siglip2.core.layout import Phase
from siglip2.core.plugin import Plugin


def rehearse(module: Any, phases: tuple[Phase, ...], make_batch: Any) -> dict[Phase, list[str]]:
    """Runs forward and backward of every phase once.

    Args:
        module: gives the weighted loss terms of a batch through `rehearsal_losses(batch, progress)`.
        phases: the phases of the recipe.
        make_batch: returns a tiny `Batch` on the module's device for a phase.

    Returns:
        For each phase the names of the trainable parameters that no gradient reached at its start.

    Raises:
        ValueError: if a loss term is not a finite scalar, or no objective is awake.
        Exception: whatever a plugin raises, with a note that names the phase and its plugins.
    """
    cold = {}
    for phase in phases:
        with no_trace(module):
            try:
                terms = module.rehearsal_losses(make_batch(phase), phase.start)
                _check(terms, phase)
                cold[phase] = _backward(torch.stack(list(terms.values())).sum(), module)
            except Exception as error:
                error.add_note(
                    f"while rehearsing progress {phase.start:g} to {phase.stop:g} with the plugins "
                    f"{', '.join(phase.awake)}, before the first training step"
                )
                raise
    return cold


def _backward(total: Tensor, module: nn.Module) -> list[str]:
    """Runs the backward pass of a loss; the names of the trainable parameters that no gradient reaches.

    It leaves `.grad` alone: DDP's reducer notes every parameter that gets one, and would take the first training step
    for one that uses them all. Where gradients come only with `.grad`, nothing takes such notes: under FSDP2 the graph
    ends in gathered copies of the parameters, and on XLA a block that is recomputed answers no other call.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not total.requires_grad:
        return list(trained)
    if isinstance(module, FSDPModule) or total.device.type == "xla":
        total.backward()
        return [name for name, parameter in trained.items() if parameter.grad is None]
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def name_cold(cold: Mapping[Phase, list[str]]) -> str:
    """Returns the plugins and towers that no gradient reaches in whole or in part, with a parameter and when first.

    Args:
        cold: for each phase the names of parameters without gradient, as `rehearse` returns them.

    Returns:
        For example `plugins.silc.head.prototype_weight at progress 0.8`; empty if every parameter has a gradient.
    """
    found: dict[str, str] = {}
    for phase, names in cold.items():
        for part in dict.fromkeys(".".join(name.split(".")[:2]) for name in names):
            inside = [name for name in names if name == part or name.startswith(f"{part}.")]
            more = f" and {len(inside) - 1} more of {part}" if len(inside) > 1 else ""
            found.setdefault(part, f"{inside[0]}{more} at progress {phase.start:g}")
    return ", ".join(found.values())


def check_cold(cold: Mapping[Phase, list[str]], strategy: Any) -> None:
    """Raises ValueError if a parameter gets no gradient in some phase and the strategy would wait for one.

    Args:
        cold: what `rehearse` found.
        strategy: of the trainer.
    """
    if _plain_ddp(strategy) and any(cold.values()):
        raise ValueError(
            f"no gradient reaches {name_cold(cold)}, and plain DDP waits for one of every parameter in every step: "
            f"use --trainer.strategy ddp_find_unused_parameters_true"
        )


def check_sleepers(plugins: Mapping[str, Plugin], begin: float, strategy: Any) -> None:
    """Guesses what a rehearsal would have found: plugins with parameters that sleep at some time from `begin` on."""
    trained = [(n, p) for n, p in plugins.items() if any(x.requires_grad for x in p.parameters())]
    sleepers = [n for n, p in trained if p.start > begin or p.stop < 1]
    if _plain_ddp(strategy) and sleepers:
        raise ValueError(
            f"plugins that sleep for part of the run ({', '.join(sleepers)}) have parameters without gradient "
            f"then, which plain DDP does not allow: use --trainer.strategy ddp_find_unused_parameters_true"
        )


def _plain_ddp(strategy: Any) -> bool:
    return isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")


def _check(terms: dict[str, Tensor], phase: Phase) -> None:
    if not terms:
        raise ValueError(
            f"no objective is awake at progress {phase.start:g} to {phase.stop:g}: enable one "
            f"(`siglip2 plugins` lists them)"
        )
    for name, term in terms.items():
        if term.ndim != 0:
            raise ValueError(f"loss term '{name}' has the shape {list(term.shape)}, expected a scalar")
        if not torch.isfinite(term.detach()).all():
            raise ValueError(f"loss term '{name}' is not finite on its first two samples")


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Restores random state, buffers and gradients of `module` afterwards."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for parameter in module.parameters():
                parameter.grad = None
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
