"""How training is laid out: parameters cut over ranks (FSDP2), blocks recomputed or compiled. No loss knows of it.

What is cut, recomputed and compiled is the transformer block, in place: names in `state_dict` stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch._dynamo
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from siglip2.core.checkpoint import read_checkpoint

VARIANTS = 64  # of one block: towers, image sizes, teacher, evaluation. torch gives up compiling after 8


# Blocks


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields every transformer block of a module and its plugins: what lies in a list called `blocks`."""
    for part in module.modules():
        if isinstance(found := getattr(part, "blocks", None), nn.ModuleList | nn.Sequential):
            yield from found


def checkpoint_blocks(module: nn.Module) -> None:
    """Lets every block keep only its inputs for the backward pass and run once more there, in place.

    Memory for activations shrinks to about one tensor [B, N, D] per block, a step costs about a third more. Source:
    Chen et al., https://arxiv.org/abs/1604.06174.
    """
    for block in blocks(module):
        own = vars(block).get("forward")  # that somebody gave this block alone
        # else a method of the block, not a closure over its forward: compiled, blocks of one shape share it
        run = MethodType(_run, block) if own is None else partial(_recomputed, own)
        block.forward = run  # type: ignore[method-assign]


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Compiles every block in place, each input shape for itself; blocks of one shape share what was compiled.

    Not the whole module: its forward takes `progress`, a number that differs in every step. Sharding and recomputation
    work on blocks too, so that nothing of theirs ends up inside of what is compiled.

    Args:
        module: the towers and plugins; `checkpoint_blocks` comes before this.
        backend: of torch.compile, for example `inductor`.

    Raises:
        ValueError: if torch has no such backend.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"model.compile is '{backend}', expected null or a backend of torch: {', '.join(known)}")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks(module):
        # the forward, not the block: hooks that gather its parameters stay outside
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)  # type: ignore[method-assign]


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block's class, run again in the backward pass."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)

    return _recomputed(forward, *args, **kwargs)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward, run again in the backward pass."""
    if not torch.is_grad_enabled():  # a teacher, or evaluation: nothing is kept anyway
        return forward(*args, **kwargs)
    first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    if first.device.type != "xla":
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return _recomputed_on_xla(forward, args, kwargs)


def _recomputed_on_xla(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same by torch_xla, whose barrier keeps its compiler from merging the second run with the first."""
    from torch_xla.utils.checkpoint import checkpoint as checkpoint_xla

    leaves, nesting = tree_flatten((args, kwargs))  # it sees only tensors that are arguments themselves

    def flat(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, nesting)
        return forward(*args, **kwargs)

    return checkpoint_xla(flat, *leaves)


# Sharding


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts the parameters of a module over a mesh, in place: each block for itself, the rest with the root.

    The root is the Lightning module, so that parameters of plugins belong to a group too, and those that an objective
    reads without calling their module (a table of prototypes, the temperature) are whole while a loss is computed.
    In training a block is called as a whole, so that it is gathered when its parts run; that holds for plugins' blocks
    too. A teacher's tower is cut as the student's is, so that each rank moves its part of the average. Source:
    https://arxiv.org/abs/2304.11277, in torch `fully_shard`.

    Args:
        module: the root; call it, not its forward.
        mesh: of one dimension, or of two: copies, and the ranks that share one.
    """
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    module.register_load_state_dict_pre_hook(_cut_state)


def make_whole(module: nn.Module) -> None:
    """Gives every rank all parameters until `cut_again`: evaluation then calls any part, on any rank, in any order."""
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()  # else the first block that runs would take itself for the root
        for part in _sharded(module):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def cut_again(module: nn.Module) -> None:
    """Undoes `make_whole`."""
    for part in _sharded(module):
        part.reshard()
        part.set_reshard_after_forward(part is not module, recurse=False)  # the root's are needed in backward at once


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensors: Any, *, keep: bool) -> Any:
    """Returns nested dicts and lists with all tensors whole and on the CPU, one gathered after the other.

    Args:
        tensors: nested dicts, lists and tuples; every rank gives the same.
        keep: false on ranks that only take part; they get None for every tensor.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = value.full_tensor() if isinstance(value, DTensor) else value
        return full.detach().cpu() if keep else None

    return tree_map(one, tensors)


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor if `like` is cut and of that shape, else the tensor itself."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    # every rank has the whole, so nothing is sent
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _cut_state(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    for name, current in module.state_dict().items():
        if name in state:
            state[name] = cut_like(state[name], current)


def cut_moments(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a loaded optimizer state dict with whole moments cut as their parameters are.

    Use as `optimizer.register_load_state_dict_pre_hook(cut_moments)`, behind `match_state_by_name`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {k: cut_like(v, parameters[number]) if isinstance(v, Tensor) else v for k, v in found.items()}
        for number, found in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


# Strategy


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state cut over ranks (FSDP2), with the checkpoints of an unsharded run.

    A checkpoint is one ordinary file with everything: it resumes on any number of ranks, with any strategy. Evaluation
    gathers the model once, before it begins.

    Args:
        replicas: copies of the model, each cut over world size / replicas ranks, for example the number of nodes: then
            parameters travel only inside a node, and gradients between nodes.
        timeout: longest wait for another rank, in seconds.

    Raises:
        ValueError: if the replicas do not divide the ranks.
    """

    def __init__(self, replicas: int = 1, timeout: float = 1800.0):
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))
        if replicas < 1:
            raise ValueError(f"FSDP2Strategy: replicas is {replicas}, expected at least 1")
        self.replicas = replicas

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # as with other strategies, before `on_fit_start`: shards can be loaded as soon as there are some

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks that share a model; of two dimensions if there are several copies of it."""
        return self.device_mesh if self.replicas > 1 else self.device_mesh["tensor_parallel"]

    def setup_environment(self) -> None:
        """Raises ValueError if the replicas do not divide the ranks."""
        ranks = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise ValueError(f"FSDP2Strategy: replicas is {self.replicas}, which does not divide {ranks} processes")
        # Lightning's names for the two dimensions of its mesh
        self._data_parallel_size, self._tensor_parallel_size = self.replicas, ranks // self.replicas
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Moves the model and makes the optimizer."""
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
        for loop in loops:
            loop.inference_mode = False  # parameters gathered there could not be trained with afterwards
        super().setup(trainer)

    def on_validation_start(self) -> None:
        make_whole(self._module)

    on_test_start = on_predict_start = on_train_end = on_validation_start

    def on_validation_end(self) -> None:
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            cut_again(self._module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the whole state on the first rank; also during evaluation, which goes on with whole parameters."""
        cut = any(isinstance(parameter, DTensor) for parameter in self._module.parameters())
        state = whole(dict(self._module.state_dict()), keep=self.is_global_zero)
        if not cut:
            make_whole(self._module)  # `state_dict` has cut them
        return cast(dict[str, Any], state)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Returns the whole state on the first rank, as one process has it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return cast(dict[str, Any], whole(optimizer.state_dict(), keep=self.is_global_zero))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes one file from the first rank."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or URL on every rank; ranks of a node share a local file's pages."""
        return read_checkpoint(str(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads whole tensors; the module takes its part of each."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads whole moments; the optimizer takes its part of each."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def check_strategy(strategy: Any) -> None:
    """Raises ValueError for a strategy that loads checkpoints into shards before they are matched with the recipe."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which loads a checkpoint before it is said what of it "
            f"fits the recipe, and evaluates on shards: use --trainer.strategy fsdp2"
        )


if "fsdp2" not in StrategyRegistry:  # as Lightning does with its own, where they are defined
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks, with whole checkpoints")
