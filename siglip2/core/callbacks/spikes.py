"""Loss spikes: a run that goes back to weights from before one, and leaves the batches in between out."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)
LEAST = 8  # losses that have to be known before one can stand out


def copied(tree: Any) -> Any:
    """Returns a collection with copies of its tensors in the host's memory; of a sharded one, this rank's part."""
    return apply_to_collection(tree, Tensor, lambda tensor: _own(tensor).detach().to("cpu", copy=True))


class Snapshot:
    """What a step of a run changes: parameters, buffers, who is awake, and optimizer state, kept in the host's memory.

    Args:
        module: the SigLIP2Module whose tensors are kept.
        optimizer: of the run.
        step: optimizer steps done.
        copy: makes copies of a collection's tensors in the host's memory.
    """

    def __init__(self, module: Any, optimizer: Any, step: int, copy: Callable[[Any], Any] = copied):
        self.step = step
        self._woken = frozenset(module.woken)
        moments = [optimizer.state.get(parameter) for parameter in _trained_by(optimizer)]
        self._tensors, self._moments = copy((_tensors_of(module), moments))

    @torch.no_grad()
    def restore(self, module: Any, optimizer: Any) -> None:
        """Writes everything back, in place; a plugin that woke since then will be woken again."""
        module.woken = set(self._woken)
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

    Whether weights are good is known from the loss of the step after them. Until then the snapshot before is kept, too,
    and is what the run goes back to if it has gone back to the new one and the loss is a spike again.

    Nothing here is drawn at random: the same run rewinds in the same places. A snapshot is also taken whenever a
    checkpoint is saved, so that a run that is resumed from it rewinds to the same weights; the one before is not in
    the checkpoint. Reading a loss makes the device wait once a step. A snapshot takes host memory for what is trained,
    its teachers and its optimizer state, twice that in the step after it was taken.

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
        self._snapshots: list[Snapshot] = []  # one that a good loss followed; behind it one that has seen no loss yet
        self._due = False
        self._tried = False  # the run went back to the last one, and no good loss has followed
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
        self._snapshots, self._due, self._tried = [], True, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the snapshot that is due.

        Not where it became due: a checkpoint may be saved before the loss of its step was looked at, or in an
        evaluation, where FSDP2's ranks have whole parameters and would keep those instead of their parts.
        """
        if not self._due:
            return
        if self._tried:  # the weights are still those of the last snapshot
            self._snapshots[-1].step = trainer.global_step
        else:
            # a strategy says how if it knows better: `xla_spmd` would compile a program for each tensor in parts
            copy = getattr(trainer.strategy, "copy_to_cpu", copied)
            self._snapshots[1:] = [Snapshot(pl_module, trainer.optimizers[0], trainer.global_step, copy)]
        self._due = False

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
        del self._snapshots[:-1]
        self._tried = False
        self._due |= trainer.global_step - self._snapshots[-1].step >= self.every

    def _rewind(self, trainer: Trainer, module: LightningModule, loss: float) -> None:
        step = trainer.global_step
        usual = statistics.median(self.losses) if self.losses else math.nan
        if len(self.rewinds) >= self.attempts:
            steps = ", ".join(f"{rewind['step']:.0f}" for rewind in self.rewinds)
            raise RuntimeError(
                f"the loss jumped to {loss:.4g} at step {step} (usually {usual:.4g}), after {self.attempts} rewinds at "
                f"the steps {steps}. This is no single bad batch: lower "
                f"model.optimizer.init_args.lr, or look at the data of these steps"
            )
        bad = self._snapshots.pop() if self._tried and len(self._snapshots) > 1 else None
        good, self._tried = self._snapshots[-1], True
        good.restore(module, trainer.optimizers[0])
        self.rewinds.append({"step": step, "to": good.step, "loss": loss, "usual": usual})
        if not trainer.is_global_zero:
            return
        log.warning(
            "the loss jumped to %.4g at step %d (usually %.4g): back to the weights of step %d, and on with the next "
            "batch; the %d since then are left out (rewind %d of %d)",
            *(loss, step, usual, good.step, step - good.step, len(self.rewinds), self.attempts),
        )
        if bad is not None:
            log.warning(
                "the weights of step %d were bad themselves, and so are those of a checkpoint saved then", bad.step
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._snapshots = []  # whole copies of the model, which the strategy `xla` would carry out of its replicas

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._due = True

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "rewinds": self.rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
        self.rewinds = list(state_dict["rewinds"])
