"""XLA: a TPU host, a slice of several hosts, or virtual devices on a CPU; torch_xla is loaded when it is used.

`--trainer.accelerator xla --trainer.strategy xla_spmd` trains on all devices as one program, `--trainer.strategy xla`
with a replica on each: see docs/tpu.md.
"""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from siglip2.xla import replicas
from siglip2.xla.accelerator import PjrtAccelerator
from siglip2.xla.precision import XLAAutocast
from siglip2.xla.replicas import XLAReplicaStrategy
from siglip2.xla.strategy import XLASPMDStrategy

__all__ = ["PjrtAccelerator", "XLAAutocast", "XLAReplicaStrategy", "XLASPMDStrategy", "register"]


def register() -> None:
    """Makes the accelerator `xla` and the strategies `xla_spmd`, `xla_spmd_sharded` and `xla` known to Lightning."""
    replicas.register()
    if "xla" not in AcceleratorRegistry:
        AcceleratorRegistry.register("xla", PjrtAccelerator, description="XLA devices, by torch_xla's PJRT runtime")
    if "xla_spmd" not in StrategyRegistry:
        StrategyRegistry.register("xla_spmd", XLASPMDStrategy, description="GSPMD over all XLA devices")
        StrategyRegistry.register(
            "xla_spmd_sharded",
            XLASPMDStrategy,
            description="GSPMD over all XLA devices, parameters and optimizer state sharded",
            shard_parameters=True,
        )
