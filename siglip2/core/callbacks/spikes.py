"""Loss spikes: a run that goes back to weights from before one, and leaves the batches in between out."""

import logging
import math
import statistics
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)
LEAST = 8  # losses that have to be known before one can stand out


class Snapshot:
    """What a step of a run changes: parameters, buffers and optimizer state, kept in the host's memory.

    Of a sharded model each rank keeps its own part.

    Args:
        module: whose tensors are kept.
        optimizer: of the run.
        step: optimizer steps done.
    """

    def __init__(self, module: torch.nn.Module, optimizer: Any, step: int):
        self.step = step
        self._tensors = [_kept(tensor) for tensor in _tensors_of(module)]
        self._moments = [
            {key: _kept(value) if isinstance(value, Tensor) else value for key, value in optimizer.state[p].items()}
            if p in optimizer.state
            else None
            for p in _trained_by(optimizer)
        ]

    @torch.no_grad()
    def restore(self, module: torch.nn.Module, optimizer: Any) -> None:
        """Writes everything back, in place."""
        for tensor, kept in zip(_tensors_of(module), self._tensors, strict=True):
            _own(tensor).copy_(kept)
        for parameter, state in zip(_trained_by(optimizer), self._moments, strict=True):
            if state is None:
                optimizer.state.pop(parameter, None)
                continue
            now = optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    _own(now[key]).copy_(value)
                else:
                    now[key] = value


def _kept(tensor: Tensor) -> Tensor:
    return _own(tensor).detach().to("cpu", copy=True)


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors_of(module: torch.nn.Module) -> list[Tensor]:
    """Trained parameters, those of plugins even if they have no gradient (a teacher moves, too), and buffers."""
    moved = [p for name, p in module.named_parameters() if p.requires_grad or name.startswith("plugins.")]
    return [*moved, *module.buffers()]


def _trained_by(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class RewindSpikes(Callback):
    """Notices a loss that jumps, puts weights and optimizer back to before it, and goes on with the next batch.

    The batches since the snapshot are left out: their steps are counted, learning rate and samples go on as if nothing
    had been, but the weights do not know them. This is how PaLM was trained past its spikes
    (https://arxiv.org/abs/2204.02311, section 5.1). A loss is a spike if it is not finite, or above the median of the
    last ones by more than `threshold` times their median deviation and by `least` nats.

    Nothing here is drawn at random: the same run rewinds in the same places. A snapshot is also taken whenever a
    checkpoint is saved, so that a run that is resumed from it rewinds to the same weights. Reading a loss makes the
    device wait once a step.

    Args:
        every: steps between snapshots.
        window: losses that a new one is compared with.
        threshold: how far above the median a spike is, in median absolute deviations.
        least: how far above it is at least, in nats per image.
        attempts: rewinds after which the run ends with an error.

    Raises:
        ValueError: if a number is not positive, or the window is too short to say anything.
    """

    def __init__(
        self, every: int = 100, window: int = 64, threshold: float = 10.0, least: float = 0.5, attempts: int = 5
    ):
        if min(every, attempts, threshold) <= 0 or least < 0 or window < LEAST:
            raise ValueError(
                f"RewindSpikes: expected every, threshold and attempts above 0, least from 0 on and window from "
                f"{LEAST} on, found {every}, {threshold}, {attempts}, {least} and {window}"
            )
        self.every, self.threshold, self.least, self.attempts = every, threshold, least, attempts
        self.losses: deque[float] = deque(maxlen=window)
        self.rewinds: list[dict[str, float]] = []
        self._good: Snapshot | None = None
        self._due = False
        self._part: list[float] = []

    def is_spike(self, loss: float) -> bool:
        """Says whether a loss stands out of the last ones; one that is not finite always does."""
        if not math.isfinite(loss):
            return True
        if len(self.losses) < LEAST:
            return False
        middle = statistics.median(self.losses)
        deviation = statistics.median(abs(x - middle) for x in self.losses)
        return loss > middle + max(self.threshold * deviation, self.least)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due:
            self._keep(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.callback_metrics["train/loss"].detach().float()
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        self._part.append(float(loss))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss_of_step, self._part = statistics.fmean(self._part), []
        if self.is_spike(loss_of_step):
            self._rewind(trainer, pl_module, loss_of_step)
            return
        self.losses.append(loss_of_step)
        if self._good is None or trainer.global_step - self._good.step >= self.every:
            self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        self._good, self._due = Snapshot(module, trainer.optimizers[0], trainer.global_step), False

    def _rewind(self, trainer: Trainer, module: LightningModule, loss: float) -> None:
        good, step = self._good, trainer.global_step
        assert good is not None  # taken before the first step
        usual = statistics.median(self.losses) if self.losses else math.nan
        if len(self.rewinds) >= self.attempts:
            steps = ", ".join(f"{rewind['step']:.0f}" for rewind in self.rewinds)
            raise RuntimeError(
                f"the loss jumped to {loss:.4g} at step {step} (usually {usual:.4g}), after {self.attempts} rewinds at "
                f"the steps {steps}. This is no single bad batch: lower "
                f"model.optimizer.init_args.lr, or look at the data of these steps"
            )
        good.restore(module, trainer.optimizers[0])
        self.rewinds.append({"step": step, "to": good.step, "loss": loss, "usual": usual})
        if not trainer.is_global_zero:
            return
        log.warning(
            "the loss jumped to %.4g at step %d (usually %.4g): back to the weights of step %d, and on with the next "
            "batch; the %d since then are left out (rewind %d of %d)",
            *(loss, step, usual, good.step, step - good.step, len(self.rewinds), self.attempts),
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.validating:  # FSDP2's ranks have whole parameters then, and would keep those instead of their parts
            self._due = trainer.state.fn == TrainerFn.FITTING
        elif trainer.state.fn == TrainerFn.FITTING:
            self._keep(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "rewinds": self.rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
        self.rewinds = list(state_dict["rewinds"])
