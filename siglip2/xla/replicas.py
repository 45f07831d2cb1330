"""The strategy `xla`: a replica of the model on each device, with a program and a share of the batch of its own.

It stands in for Lightning's strategy of that name. Lightning's leans on torch_xla's `rendezvous` and `all_gather`,
which put the number of the replica into the graph: replicas then run different programs, which XLA's CPU backend takes
for different meetings. It adds gradients in a way that XLA refuses to compile beside our collectives, and that forgets
those that are views. Here what replicas add up has one graph for all, and what else they say goes through a store.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics.metric
from lightning.fabric.plugins.environments import XLAEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import find_shared_parameters, set_shared_parameters
from torch import Tensor

from siglip2.core.distributed import gather, in_its_own_graph, sum_over_ranks
from siglip2.xla.accelerator import check_installed
from siglip2.xla.checkpoint import on_cpu
from siglip2.xla.hosts import Hosts
from siglip2.xla.launch import ReplicaLauncher
from siglip2.xla.precision import OnXLA

_threads_meet = dist.HashStore()  # replicas that are threads of this process
_of_thread = threading.local()


class XLAReplicaStrategy(OnXLA, ParallelStrategy):
    """A replica of the model on each XLA device; gradients are averaged, as with DDP.

    Args:
        sync_module_states: start with the parameters and buffers of the first replica. Those of one host are copies of
            one model anyway.

    Raises:
        ModuleNotFoundError: if torch_xla is not installed.
        ValueError: when replicas are to be started and there is one device only.
    """

    strategy_name = "xla"
    is_distributed = True

    def __init__(self, sync_module_states: bool = True):
        check_installed()
        super().__init__(cluster_environment=XLAEnvironment())
        self.sync_module_states = sync_module_states
        self.replicas = Hosts()
        self.host = 0  # for the process that has started replicas: one of them writes the report
        self._launched = False  # in a replica; in the process that starts them torch_xla must not be asked

    def _configure_launcher(self) -> None:
        self._launcher = ReplicaLauncher(len(self.parallel_devices or []))

    @property
    def root_device(self) -> torch.device:
        if not self._launched:
            return torch.device("xla")
        import torch_xla

        device: torch.device = torch_xla.device()  # of this thread
        return device

    @property
    def global_rank(self) -> int:
        return super().global_rank if self._launched else self.host

    @property
    def local_rank(self) -> int:
        return super().local_rank if self._launched else 0

    @property
    def node_rank(self) -> int:
        return super().node_rank if self._launched else 0

    @property
    def world_size(self) -> int:
        return super().world_size if self._launched else 1

    @property
    def store(self) -> dist.Store | None:
        """Where the watchdogs of replicas meet; None before these have started."""
        return self.replicas.store

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Finds the other replicas."""
        import torch_xla.runtime as xr

        self._launched = True
        self.replicas = _of_thread.replicas = meet_replicas()
        threads = xr.addressable_device_count() > 1
        rank_zero_only.rank = RankOfThread() if threads else self.global_rank  # type: ignore[attr-defined]
        # they would ask torch.distributed, which knows nothing of replicas
        torchmetrics.metric.jit_distributed_available = _several
        torchmetrics.metric.gather_all_tensors = gather_states  # type: ignore[assignment]
        super().setup_environment()

    def model_to_device(self) -> None:
        """Moves the model; parameters that two modules share stay shared, which `Module.to` forgets on XLA."""
        from torch_xla.core.xla_model import broadcast_master_param

        assert self.model is not None
        shared = find_shared_parameters(self.model)
        self.model.to(self.root_device)
        set_shared_parameters(self.model, shared)
        if self.sync_module_states:
            broadcast_master_param(self.model)

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Sends a batch, after handing over what the last step left to do, such as moving a teacher."""
        import torch_xla

        torch_xla.sync()
        return super().batch_to_device(batch, device, dataloader_idx)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Steps with gradients that are means over all replicas, and hands the whole step over."""
        import torch_xla

        def averaged() -> Any:
            loss = closure()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(trained)
            rewrite(p for p in trained if p.grad is None)
            return loss

        model = model or self.lightning_module
        # not XLAPrecision's own step: it averages by `xm.reduce_gradients`
        found = Precision.optimizer_step(self.precision_plugin, optimizer, model, averaged, **kwargs)
        torch_xla.sync()
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes an ordinary file from the first replica."""
        import torch_xla

        torch_xla.sync()  # on all: what a step left to do may hold collectives
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(on_cpu(checkpoint), filepath, storage_options=storage_options)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Returns when every replica has come here."""
        self.replicas.exchange(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns what replica `src` gave; a tensor comes on the CPU."""
        return self.replicas.exchange(obj.detach().cpu() if isinstance(obj, Tensor) else obj)[src]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Returns the mean or the sum over replicas of a tensor or number, on the device.

        Raises:
            ValueError: for any other operation.
        """
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        if name not in ("mean", "avg", "sum"):
            raise ValueError(f"the strategy xla reduces by mean or sum, found {reduce_op}")
        if not self._launched:
            return tensor
        total = in_its_own_graph(sum_over_ranks, torch.as_tensor(tensor).to(self.root_device))
        return total if name == "sum" else total / self.world_size

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Returns the tensors of all replicas, of one shape, stacked [W, ...].

        Args:
            tensor: of this replica.
            group: unused.
            sync_grads: with gradient to the tensors of all replicas.
        """
        if not self._launched:
            return tensor
        if sync_grads:
            return gather(tensor.to(self.root_device)[None])
        return in_its_own_graph(gather, tensor.detach().to(self.root_device)[None]).to(tensor.device)


def meet_replicas() -> Hosts:
    """Returns the replicas of all hosts, each with a store of its own to wait at."""
    import torch_xla.runtime as xr

    if xr.process_count() == 1:
        return Hosts(_threads_meet, xr.global_ordinal(), xr.world_size())
    import torch_xla.distributed.xla_backend  # noqa: F401 - it teaches torch.distributed the address xla://

    store, rank, size = next(dist.rendezvous("xla://"))
    return Hosts(store.clone(), rank, size)  # threads share the one that torch_xla made, and one that waits locks it


def average_gradients(parameters: Any) -> None:
    """Replaces the gradients of parameters by their means over all replicas; those without one are left alone.

    Unlike torch_xla's `reduce_gradients` it leaves layouts to the compiler, as our other collectives do: XLA compiles
    no program with both kinds. And it sums copies: in place of a gradient that is a view, as those of the chunked
    cross-entropies are, its sum is forgotten by whoever looks at it next.
    """
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    trained = [p for p in parameters if p.grad is not None]
    means = [p.grad.clone() for p in trained]
    xm.all_reduce(xm.REDUCE_SUM, means, scale=1 / xr.world_size(), pin_layout=False)
    for parameter, mean in zip(trained, means, strict=True):
        parameter.grad = mean


def rewrite(parameters: Any) -> None:
    """Lets a step write parameters although it does not change them.

    torch_xla 2.9 deletes the memory of one that a step reads through `detach` and does not train, such as prototypes
    that are frozen for the first steps: the next step, or a checkpoint, would end the run.
    """
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _several() -> bool:
    return hasattr(_of_thread, "replicas")


def gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
    """Returns the state of a metric on every replica, in the order of ranks; for torchmetrics, in place of its own.

    Args:
        state: of this replica; shapes may differ.
        group: unused.
    """
    replicas: Hosts = _of_thread.replicas
    if len(set(replicas.exchange(tuple(state.shape)))) == 1:
        return list(in_its_own_graph(gather, state.detach()[None]))
    return [other.to(state.device) for other in replicas.exchange(state.detach().cpu())]


class RankOfThread:
    """What Lightning's `rank_zero_only` compares with 0: a number for each thread, where a process has several."""

    def __eq__(self, other: object) -> bool:
        return _rank() == other

    def __gt__(self, other: int) -> bool:
        return _rank() > other

    def __hash__(self) -> int:
        return hash(_rank())

    def __str__(self) -> str:
        return str(_rank())


def _rank() -> int:
    import torch_xla.runtime as xr

    return int(xr.global_ordinal())


def register() -> None:
    """Puts this strategy in the place of Lightning's strategy `xla`."""
    StrategyRegistry.register(
        XLAReplicaStrategy.strategy_name,
        XLAReplicaStrategy,
        description="a replica on each XLA device, gradients averaged",
        override=True,
    )
