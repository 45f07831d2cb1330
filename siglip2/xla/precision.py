"""Precision on XLA devices, and what strategies do about it: float32, or bfloat16 where autocast says so."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.xla import XLAPrecision
from lightning.pytorch.strategies import Strategy


class XLAAutocast(XLAPrecision):
    """`bf16-mixed` on XLA: parameters stay float32, matrix products run in bfloat16.

    Lightning's plugin refuses `bf16-mixed`; its `bf16-true` sets a variable that torch_xla reads once and deprecates.
    """

    def __init__(self) -> None:
        super().__init__("32-true")
        self.precision = "bf16-mixed"  # type: ignore[assignment]

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return torch.autocast("xla", dtype=torch.bfloat16)  # type: ignore[return-value]


def on_xla(plugin: Precision | None) -> XLAPrecision | None:
    """Returns the plugin that does on XLA what `plugin`, chosen by `trainer.precision`, does elsewhere.

    Raises:
        ValueError: for a precision other than 32-true and bf16-mixed.
    """
    if plugin is None or isinstance(plugin, XLAPrecision):
        return plugin
    if plugin.precision == "32-true":
        return XLAPrecision("32-true")
    if plugin.precision == "bf16-mixed":
        return XLAAutocast()
    raise ValueError(f"trainer.precision is {plugin.precision}: on XLA devices use 32-true or bf16-mixed")


class OnXLA(Strategy):
    """What strategies on XLA devices have in common; stands before Lightning's strategy among the bases."""

    @property
    def precision_plugin(self) -> Precision:
        """The XLA counterpart of what `trainer.precision` chose."""
        return self._precision_plugin or XLAPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = on_xla(precision_plugin)

    def setup(self, trainer: Any) -> None:
        """Lets loops go without gradient instead of in inference mode, moves the model and makes the optimizer."""
        validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # XLA has no inference tensors; Lightning uses no_grad on its own TPUs, too
        super().setup(trainer)
