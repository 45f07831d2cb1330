"""The strategy `xla_spmd`: one process per host, one program over all devices (GSPMD)."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import find_shared_parameters, set_shared_parameters
from torch import Tensor, nn

from siglip2.core.batch import Batch
from siglip2.xla.accelerator import check_installed
from siglip2.xla.checkpoint import on_cpu, read_sharded, write_sharded
from siglip2.xla.hosts import meet
from siglip2.xla.precision import OnXLA
from siglip2.xla.sharding import all_devices, finish_all, replicate, shard, upload


class XLASPMDStrategy(OnXLA, SingleDeviceStrategy):
    """One process on each host drives all its devices: XLA cuts one program over all of them (GSPMD).

    The program is written as if there were one large device with the whole batch. Rows of the batch lie across the
    devices, and XLA adds the collectives. So losses over pairs see all pairs, and no gradient is averaged by hand.
    Source: Xu et al., GSPMD, https://arxiv.org/abs/2105.04663.

    Args:
        shard_parameters: cut parameters and optimizer state over the devices (as FSDP does) instead of keeping all of
            them on each.
        min_shard: parameters with fewer elements stay whole. Ours: gathering them costs more than they take.
        sharded_checkpoints: write checkpoints as folders to which each host adds its part, on a disk that all share.
            `python -m siglip2.xla.checkpoint` makes ordinary files of them. A run resumes from either.

    Raises:
        ModuleNotFoundError: if torch_xla is not installed.
    """

    strategy_name = "xla_spmd"

    def __init__(self, shard_parameters: bool = False, min_shard: int = 4096, sharded_checkpoints: bool = False):
        check_installed()
        import torch_xla
        import torch_xla.runtime as xr

        if not xr.is_spmd():
            xr.use_spmd()
        super().__init__(device=torch_xla.device())
        self.shard_parameters, self.min_shard = shard_parameters, min_shard
        self.sharded_checkpoints = sharded_checkpoints
        self.parallel_devices: list[torch.device] = []  # the connector fills it in
        self.mesh, self.hosts = all_devices(), meet()
        self.world_size, self.global_rank = self.hosts.size, self.hosts.rank
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def setup_environment(self) -> None:
        """Raises ValueError if only some of the devices are asked for: the program runs on all there are."""
        import torch_xla.runtime as xr

        count = xr.addressable_runtime_device_count()
        if len(self.parallel_devices) != count:
            raise ValueError(
                f"trainer.devices is {len(self.parallel_devices)}, but xla_spmd runs on all {count} of a host: "
                f"set it to auto"
            )
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Moves the model to the devices, whole or cut, and makes the optimizer.

        Raises:
            ValueError: if checkpoints are to be folders and to be written in a thread, by AsyncCheckpointIO.
        """
        if self.sharded_checkpoints and isinstance(self.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "trainer.plugins has AsyncCheckpointIO, which writes files, but sharded_checkpoints writes folders, "
                "together with the other hosts: take one of them out of the recipe"
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves the model; parameters that two modules share stay shared, which `Module.to` forgets on XLA."""
        assert self.model is not None
        shared = find_shared_parameters(self.model)
        super().model_to_device()
        set_shared_parameters(self.model, shared)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.shard_parameters:
            shard(model.parameters(), self.mesh, min_size=self.min_shard)
        replicate([*model.parameters(), *model.buffers()], self.mesh)
        return model

    def on_train_start(self) -> None:
        """Lays everything out once more: a warm start has written new tensors into parameters and moments."""
        assert self.model is not None
        self._setup_model(self.model)
        self._shard_moments()

    def _shard_moments(self) -> None:
        if not self.shard_parameters:
            return
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                moments = [v for v in state.values() if isinstance(v, Tensor) and v.device.type == "xla"]
                shard(moments, self.mesh, min_size=self.min_shard)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Loads whole moments and cuts them as their parameters are."""
        super().load_optimizer_state_dict(checkpoint)
        self._shard_moments()

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Sends each device its rows, after handing over what the last step left to do, such as moving a teacher."""
        import torch_xla

        torch_xla.sync()
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a siglip2 Batch from the loader, found {type(batch).__name__}")
        return upload(batch, self.mesh, self.root_device, num_hosts=self.hosts.size)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes one ordinary file, or a folder of shards; every host takes part."""
        if self.sharded_checkpoints:
            finish_all()
            write_sharded(checkpoint, filepath, self.hosts)
            return
        whole = self.copy_to_cpu(checkpoint)  # on every host: sharded tensors are gathered by all of them
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, filepath, storage_options=storage_options)

    def copy_to_cpu(self, tree: Any) -> Any:
        """Returns a collection with whole copies of its tensors in the memory of every host; all have to call it."""
        finish_all()  # all that is left to compute in one program, not in one for each tensor
        return on_cpu(tree, num_hosts=self.hosts.size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or a folder of shards, whole, into the memory of every host."""
        if "://" not in str(checkpoint_path) and Path(checkpoint_path).is_dir():
            return read_sharded(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Returns when every host has come here."""
        self.hosts.exchange(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns what host `src` gave."""
        return self.hosts.exchange(obj)[src] if self.hosts.size > 1 else obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Returns the mean or the sum over hosts of a tensor or number.

        Raises:
            ValueError: for any other operation.
        """
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        if name not in ("mean", "avg", "sum"):
            raise ValueError(f"xla_spmd reduces by mean or sum, found {reduce_op}")
        if self.hosts.size == 1:
            return tensor
        total = torch.stack([torch.as_tensor(part) for part in self._exchange_tensors(tensor)]).sum(0)
        total = total if name == "sum" else total / self.hosts.size
        return total.to(tensor.device) if isinstance(tensor, Tensor) else total

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Returns the tensors of all hosts, stacked [W, ...]; without gradient, and the tensor itself on one host.

        Raises:
            ValueError: if gradients are asked for: inside the step the program sees the rows of every host.
        """
        if sync_grads:
            raise ValueError("xla_spmd gathers without gradient: a step sees the rows of all hosts already")
        if self.hosts.size == 1:
            return tensor
        return torch.stack(self._exchange_tensors(tensor)).to(tensor.device)

    def _exchange_tensors(self, tensor: Any) -> list[Any]:
        return self.hosts.exchange(tensor.detach().cpu() if isinstance(tensor, Tensor) else tensor)
