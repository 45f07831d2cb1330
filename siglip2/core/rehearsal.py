"""The rehearsal: every phase of a recipe run once on two samples before training, without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from siglip2.core.batch import Batch
from siglip2.core.layout import Phase


class Rehearsable(Protocol):
    """A module that can run one step: `rehearsal_losses` gives the weighted terms at a progress."""

    def rehearsal_losses(self, batch: Batch, progress: float) -> dict[str, Tensor]: ...

    def parameters(self) -> Any: ...


def rehearse(module: Any, phases: tuple[Phase, ...], make_batch: Any) -> None:
    """Runs forward and backward of every phase once.

    Args:
        module: gives the weighted loss terms of a batch through `rehearsal_losses(batch, progress)`.
        phases: the phases of the recipe.
        make_batch: returns a tiny `Batch` on the module's device for a phase.

    Raises:
        ValueError: if a loss term is not a finite scalar, or no objective is awake.
        Exception: whatever a plugin raises, with a note that names the phase and its plugins.
    """
    for phase in phases:
        with no_trace(module):
            try:
                terms = module.rehearsal_losses(make_batch(phase), phase.start)
                _check(terms, phase)
                total = torch.stack(list(terms.values())).sum()
                if total.requires_grad:
                    total.backward()
            except Exception as error:
                error.add_note(
                    f"while rehearsing progress {phase.start:g} to {phase.stop:g} with the plugins "
                    f"{', '.join(phase.awake)}, before the first training step"
                )
                raise


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
