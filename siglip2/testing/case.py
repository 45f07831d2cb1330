"""A plugin class and its options, as something that can be checked."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from siglip2.core.plugin import Plugin
from siglip2.testing.tiny import TinyModule, tiny_module

ROWS = 4


@dataclass(frozen=True)
class Case:
    """A plugin class and the options it is checked with; picklable, so that other processes can check it too.

    Args:
        cls: the plugin class.
        options: options of its constructor, by name.
    """

    cls: type[Plugin]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The plugin's name in recipes."""
        return self.cls.name

    def plugin(self, **more: Any) -> Plugin:
        """Returns a new instance; AssertionError if it cannot be constructed."""
        try:
            return self.cls(**{**self.options, **more})
        except TypeError as error:
            raise AssertionError(
                f"{self.cls.__name__}({', '.join(more)}) cannot be constructed: {error}. Give every option a "
                f"default, take `start` and `stop`, and hand them to super().__init__"
            ) from error

    @property
    def start(self) -> float:
        """The progress at which it wakes."""
        return self.plugin().start

    def module(self, *, seed: int = 0) -> TinyModule:
        """Returns a tiny module whose recipe is this plugin, woken, beside a patchifier if it is none."""
        module = tiny_module([self.plugin()], seed=seed)
        module.wake_due(self.start)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.plugins[self.name].parameters():
            if parameter.requires_grad and not parameter.any():  # what begins at zero may let no gradient through
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        return module

    def losses(self, module: TinyModule, *, first: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
        """Returns the loss terms of `rows` samples from position `first`, at the progress where the plugin starts."""
        start = self.start
        batch = module.fake_batch(start, batch_size=rows, first=first)
        torch.manual_seed(0)
        return module(batch, start)


def require(claim: bool, advice: str) -> None:
    """Raises AssertionError with `advice` if the claim is false."""
    if not claim:
        raise AssertionError(advice)
