"""`ema_teacher`: a moving average of the student, for objectives that learn from it."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from siglip2.core.batch import Patches
from siglip2.core.hooks import hookimpl
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.plugin import Plugin
from siglip2.core.schedules import Schedule, value_at, values_of


class EMATeacher(Plugin):
    """Exponential moving average of the vision tower, its pooling head and the objectives' heads: encoder `teacher`.

    After each optimizer step: teacher <- momentum * teacher + (1 - momentum) * student. It never has a gradient. When
    it wakes it is a copy of the student (SigLIP 2, section 2.3, https://arxiv.org/abs/2502.14786).

    Args:
        momentum: share of itself that the teacher keeps in a step, in [0, 1]: a number, or a schedule over progress.
            SigLIP 2 does not publish it. SILC keeps it constant, so that image-text knowledge reaches the teacher to
            the end; 0.996 is where DINO starts.
        start: progress in [0, 1] at which the teacher copies the student; 0.8 in SigLIP 2.
        stop: progress in [0, 1] from which it sleeps: it moves no more, but stays in memory and in checkpoints.

    Raises:
        ValueError: if the momentum is outside [0, 1], the vision tower has adapters (`lora`), or the teacher is to be
            kept in 16 bits (trainer.precision is bf16-true or 16-true).
    """

    name = "ema_teacher"
    offers = ("teacher",)

    def __init__(self, momentum: float | Schedule = 0.996, start: float = 0.8, stop: float = 1.0):
        super().__init__(start=start, stop=stop)
        for value in values_of(momentum):
            if not 0 <= value <= 1:
                raise ValueError(f"ema_teacher: momentum is a share in [0, 1], such as 0.996, found {value}")
        self.momentum = momentum

    @hookimpl(trylast=True)  # after the objectives, which register their heads
    def setup(self, model: TwoTowers, heads: dict[str, nn.Module]) -> None:
        if any(hasattr(part, "base_layer") for part in model.vision.modules()):  # as peft calls what it wraps
            raise ValueError(
                "ema_teacher: the vision tower has adapters, and a copy of it would be saved and loaded as if it were "
                "trained. Set --plugins.ema_teacher off, with silc and tips, or leave lora out"
            )
        self.vision = _frozen_copy(model.vision)
        self.heads = nn.ModuleDict({name: _frozen_copy(head) for name, head in heads.items()})
        self._led = (dict(heads),)  # in a tuple: the student's heads belong to their plugins, not to this module

    @hookimpl
    def encoders(self) -> dict[str, nn.Module]:
        dtype = next(self.parameters()).dtype
        if dtype.itemsize < 4:
            raise ValueError(
                f"ema_teacher: the teacher is in {dtype}, in which a step of 0.4 % of a small difference rounds to "
                f"nothing: it would stay where it is. Set trainer.precision to bf16-mixed"
            )
        return {"teacher": self}

    def forward(self, images: Patches) -> Any:
        """Encodes uint8 patches [B, N, P] as the vision tower does."""
        return self.vision(images)

    @hookimpl
    @torch.no_grad()
    def wake(self, model: TwoTowers) -> None:
        for mine, theirs in self._pairs(model):
            mine.copy_(theirs)

    @hookimpl
    @torch.no_grad()
    def after_step(self, model: TwoTowers, progress: float) -> None:
        mine, theirs = zip(*self._pairs(model), strict=True)
        get_ema_multi_avg_fn(value_at(self.momentum, progress))(list(mine), list(theirs), 0)

    def _pairs(self, model: TwoTowers) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the teacher with the student's."""
        leaders = {"vision": model.vision, **{f"heads.{name}": head for name, head in self._led[0].items()}}
        for name, leader in leaders.items():
            yield from zip(self.get_submodule(name).parameters(), leader.parameters(), strict=True)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stays in evaluation mode: a teacher has no dropout."""
        return super().train(False)


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)
