"""`temperature`: keeps temperature and bias still while a fine-tune begins, and the temperature within bounds."""

import math

import torch
from torch import Tensor

from siglip2.core.hooks import hookimpl
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.plugin import Plugin
from siglip2.core.step import Step


class Temperature(Plugin):
    """Freezes temperature and bias for the first share of a run, and clamps the temperature after every step.

    Temperature and bias were learned with the weights that a fine-tune starts from, and each of them acts on all pairs
    at once: a few steps on new data can undo them before the towers have followed. They get a gradient of zero while
    they are frozen, and no weight decay, so that they stay as they are to the last bit.

    Args:
        frozen: progress in [0, 1] up to which both stay as they are; 0 freezes neither. Ours.
        max_scale: the largest temperature factor, exp(logit_scale); null sets no bound. The released SigLIP 2 models
            have about 110, CLIP stops at 100. Ours.
        min_scale: the smallest one; null sets no bound.
        start: progress in [0, 1] at which the plugin wakes; before that it does nothing.
        stop: progress in [0, 1] from which it does nothing again.

    Raises:
        ValueError: if `frozen` is no share, or the bounds are not positive or cross.
    """

    name = "temperature"

    def __init__(
        self,
        frozen: float = 0.1,
        max_scale: float | None = 200.0,
        min_scale: float | None = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(start=start, stop=stop)
        if not 0 <= frozen <= 1:
            raise ValueError(f"temperature: frozen is a share of the run in [0, 1], found {frozen}")
        low, high = min_scale or 0.0, math.inf if max_scale is None else max_scale
        if low < 0 or high <= low:
            raise ValueError(f"temperature: expected 0 < min_scale < max_scale, found {min_scale} and {max_scale}")
        self.frozen = frozen
        self.bounds = (math.log(low) if low else None, None if max_scale is None else math.log(max_scale))
        self._hold = False
        self._hooked: list[Tensor] = []

    @hookimpl
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Adds no term; it is called before every backward pass, and says whether gradients count in this one."""
        self._hold = step.progress < self.frozen
        for parameter in (step.model.logit_scale, step.model.logit_bias):
            if parameter.requires_grad and not any(parameter is known for known in self._hooked):
                parameter.register_hook(self._gradient)  # not in `setup`: FSDP2 puts another tensor in its place
                self._hooked.append(parameter)
        return {}

    def _gradient(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._hold else gradient

    @hookimpl
    @torch.no_grad()
    def after_step(self, model: TwoTowers, progress: float) -> None:
        self._hold = False  # or it would stay so if the plugin slept from here on
        if self.bounds != (None, None):
            model.logit_scale.clamp_(*self.bounds)
