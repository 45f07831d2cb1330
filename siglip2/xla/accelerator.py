"""The accelerator `xla`: the devices of torch_xla's PJRT runtime."""

import os
from typing import Any

import torch
from lightning.fabric.accelerators.xla import XLAAccelerator as FabricXLAAccelerator
from lightning.pytorch.accelerators import Accelerator
from lightning_utilities.core.imports import RequirementCache

INSTALLED = RequirementCache("torch_xla>=2.9", "torch_xla")


def check_installed() -> None:
    """Raises ModuleNotFoundError, with what to install, if torch_xla is missing."""
    if not INSTALLED:
        raise ModuleNotFoundError(
            "training on XLA devices needs torch_xla: pip install 'siglip2[tpu]', and on a TPU host "
            "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'"
        )


class PjrtAccelerator(Accelerator):
    """Whatever `PJRT_DEVICE` names: TPU chips, or a CPU with `CPU_NUM_DEVICES` virtual devices.

    Lightning's own accelerator `tpu` takes nothing but a TPU.
    """

    def __init__(self) -> None:
        check_installed()
        super().__init__()

    @staticmethod
    def auto_device_count() -> int:
        """Devices of this host, without starting the runtime: that has to wait until processes are forked."""
        if not INSTALLED:
            return 0
        if os.environ.get("PJRT_DEVICE") == "CPU":
            return int(os.environ.get("CPU_NUM_DEVICES", "1"))
        return FabricXLAAccelerator.auto_device_count()

    @staticmethod
    def is_available() -> bool:
        if os.environ.get("PJRT_DEVICE") == "CPU":
            return bool(INSTALLED)
        return FabricXLAAccelerator.is_available()

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """Returns the number of devices.

        Raises:
            ValueError: unless that is one or all of the host.
        """
        everything = PjrtAccelerator.auto_device_count()
        if devices in ("auto", -1, "-1"):
            return everything
        if str(devices) not in ("1", str(everything)):
            raise ValueError(f"trainer.devices is {devices!r}: XLA takes one device or all {everything} of a host")
        return int(str(devices))

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("xla", number) for number in range(devices)]

    def setup_device(self, device: torch.device) -> None:
        """Nothing: the runtime has set its devices up."""

    def teardown(self) -> None:
        """Nothing: devices belong to the process as long as it lives."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Returns what the runtime says of the memory of a device; nothing on a CPU, which does not say."""
        import torch_xla.core.xla_model as xm

        try:
            return dict(xm.get_memory_info(device))
        except RuntimeError:
            return {}

    @staticmethod
    def name() -> str:
        return "xla"
