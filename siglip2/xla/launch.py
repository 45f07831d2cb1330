"""Starts the replicas of a run, and brings what they learned back into the process that started them.

torch_xla forks a process for each chip of a host, with a thread for each device of it: one on TPUs since v4, two on v2
and v3. On a CPU all devices are threads of one process.
"""

import copy
import io
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from siglip2.xla import turns

OUTCOME = "outcome"
ERROR = "error"
Task = tuple[Trainer, Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_forked: list[Task] = []  # what replicas do; they inherit it, since a trainer and all that is in it rarely pickle
_copying = threading.Lock()


class ReplicaLauncher(_Launcher):
    """Runs what the trainer is asked for once on every device, and then knows what the first replica knows.

    Lightning's own launcher takes weights and logged values back. Here callbacks and loops remember, too, so that what
    follows a run (its report, its scores) is as after a run on one device.

    Args:
        num_replicas: devices of this host.

    Raises:
        ValueError: if there is only one.
    """

    def __init__(self, num_replicas: int):
        if num_replicas < 2:
            raise ValueError(
                "trainer.strategy 'xla' has a replica on each of several devices, found one: use xla_spmd, or on a CPU "
                "set CPU_NUM_DEVICES to more"
            )
        self.num_replicas = num_replicas
        self._fitted = False

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Returns what the first replica of this host returns.

        Raises:
            NotImplementedError: if the trainer has trained before: its optimizer is gone with the replicas.
            RuntimeError: if the replicas ended without an error, for example killed for want of memory.
            BaseException: what a replica raised; the first one, and the other replicas are stopped.
            KeyboardInterrupt: at Ctrl-C, which ends the replicas at once.
        """
        import torch_xla.distributed.xla_multiprocessing as xmp
        import torch_xla.runtime as xr

        if self._fitted and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError("replicas train once for each Trainer: make a new one, and resume by ckpt_path")
        for data in (a for a in (*args, *kwargs.values()) if isinstance(a, LightningDataModule)):
            trainer.datamodule, data.trainer = data, trainer  # else only the copies of the replicas had them
        if xr.device_type() == "CPU":
            turns.prepare(os.environ, self.num_replicas)
        with tempfile.TemporaryDirectory() as folder:
            _forked[:] = [(trainer, function, args, kwargs)]
            try:
                with _interruptible():
                    xmp.spawn(_run, args=(folder,), start_method="fork")
            except BrokenProcessPool:
                error, where = _first_error(Path(folder))
                raise error from where
            finally:
                _forked.clear()
            outcome: Outcome = torch.load(Path(folder, OUTCOME), weights_only=False)
        outcome.restore(trainer)
        self._fitted |= trainer.state.fn == TrainerFn.FITTING
        return outcome.result

    def kill(self, signum: Any) -> None:
        """Nothing: replicas end when the process that started them does."""


@dataclass(frozen=True)
class Outcome:
    """What a replica knows in the end: tensors on the CPU, callbacks attribute by attribute, pickled."""

    result: Any
    host: int
    weights: dict[str, Tensor]
    metrics: dict[str, Tensor]
    state: TrainerState
    progress: dict[str, Any]
    callbacks: list[dict[str, bytes]]

    @classmethod
    def of(cls, trainer: Any, result: Any) -> Self:
        """Returns the outcome of a trainer that is through."""
        import torch_xla.runtime as xr

        known = _known(trainer)
        return cls(
            result=_on_cpu(result),
            host=xr.host_index(),
            weights=_on_cpu(trainer.lightning_module.state_dict()),
            metrics=_on_cpu(dict(trainer.callback_metrics)),
            state=trainer.state,
            progress=trainer.fit_loop.state_dict(),
            callbacks=[_pickled(callback.__getstate__() or {}, known) for callback in trainer.callbacks],
        )

    def restore(self, trainer: Any) -> None:
        """Lets a trainer that was copied before know it, too."""
        trainer.lightning_module.load_state_dict(self.weights)
        trainer.callback_metrics.update(self.metrics)
        trainer.state = self.state
        trainer.strategy.host = self.host
        trainer.fit_loop.load_state_dict(self.progress)
        known = _known(trainer)
        for callback, attributes in zip(trainer.callbacks, self.callbacks, strict=True):
            for name, data in attributes.items():
                setattr(callback, name, _Unpickler(data, known).load())


def _run(ordinal: int, folder: str) -> None:
    """One replica, in a thread of its own in a process that was forked."""
    import torch_xla.runtime as xr

    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    try:
        if xr.device_type() == "CPU":
            turns.take_turns()
        (task,) = _forked
        if xr.addressable_device_count() > 1:
            with _copying:
                task = copy.deepcopy(task)
        trainer, function, args, kwargs = task
        result = function(*args, **kwargs)
        if xr.local_ordinal() == 0:
            torch.save(Outcome.of(trainer, result), Path(folder, OUTCOME))
        trainer.strategy.barrier("end")
        if xr.process_index() == 0 and xr.process_count() > 1:
            time.sleep(1)  # as Lightning does: this process holds the store, and others may not have read the last word
    except BaseException as error:
        _write_error(error, Path(folder, f"{ERROR}-{ordinal}"))
        # the other replicas may wait for this one for ever; torch_xla stops those in other processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends what is started in here at Ctrl-C, too: the pool of processes would wait until the replicas are through."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # it is ignored, or cannot be caught here
        return
    starter, others = os.getpid(), set(active_children())

    def end(number: int, frame: Any) -> Any:
        if os.getpid() != starter:
            os._exit(128 + number)  # a replica, or a worker of its loader: they inherit this
        for process in set(active_children()) - others:
            process.kill()
        return before(number, frame)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write_error(error: BaseException, path: Path) -> None:
    where = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps((error, where))
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), where))
    partial = path.with_name(f".{path.name}")  # another replica may end the process at any moment
    partial.write_bytes(data)
    partial.rename(path)


def _first_error(folder: Path) -> tuple[BaseException, BaseException | None]:
    """The error that came first, and one that says where."""
    written = sorted(folder.glob(f"{ERROR}-*"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        text = (
            "a replica ended without an error: its last words say why, or the system stopped it (want of memory?). "
            "'Termination timeout', on a CPU, says that one waited 10 s for one that was late or ran another program"
        )
        return RuntimeError(text), None
    error, where = pickle.loads(written[0].read_bytes())
    return error, RuntimeError(f"in replica {written[0].name.removeprefix(ERROR)[1:]}:\n{where}")


def _on_cpu(value: Any) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().cpu())


def _known(trainer: Any) -> list[Any]:
    """What attributes of callbacks may point at, in the order that it has in every copy of the trainer."""
    data = getattr(trainer, "datamodule", None)
    return [trainer, trainer.lightning_module, data, trainer.strategy, *trainer.callbacks]


def _pickled(attributes: dict[str, Any], known: Sequence[Any]) -> dict[str, bytes]:
    """The attributes that pickle; a lock or an open file is left out."""
    found = {}
    for name, value in attributes.items():
        try:
            pickler = _Pickler(known)
            pickler.dump(value)
            found[name] = pickler.file.getvalue()
        except (TypeError, AttributeError, pickle.PicklingError):
            continue
    return found


class _Pickler(pickle.Pickler):
    """Writes tensors as tensors on the CPU, and objects that the reader has a copy of by their number."""

    def __init__(self, known: Sequence[Any]):
        self.file = io.BytesIO()
        super().__init__(self.file)
        self._numbers = {id(thing): number for number, thing in enumerate(known) if thing is not None}

    def persistent_id(self, thing: Any) -> int | None:
        return self._numbers.get(id(thing))

    def reducer_override(self, thing: Any) -> Any:
        # to read a tensor of a device would start the devices in a process that has to fork once more
        on_device = isinstance(thing, Tensor) and thing.device.type != "cpu"
        return thing.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL) if on_device else NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Sequence[Any]):
        super().__init__(io.BytesIO(data))
        self._known = known

    def persistent_load(self, number: Any) -> Any:
        return self._known[number]
