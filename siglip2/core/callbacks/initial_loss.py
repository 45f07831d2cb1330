"""A look at the first loss: is it what temperature, bias and batch size say it should be?"""

import logging
import math
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from siglip2.core.distributed import world_size

log = logging.getLogger(__name__)
SPREAD = 3.0  # standard deviations of the cosine of two random directions, 1 / sqrt(E) each


def softplus(x: float) -> float:
    """Returns log(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def unrelated_loss(pairs: int, *, factor: float, bias: float, cosine: float = 0.0) -> float:
    """Returns the sigmoid loss, in nats per image, of embeddings that all have the same cosine with one another.

    With the cosine 0 it is what a model costs that knows nothing of a batch: softplus(-bias) for the true pair and
    softplus(bias) for each of the others. With bias -10 and 32 768 pairs that is 10.0 + 1.5.

    Source: SigLIP, https://arxiv.org/abs/2303.15343, eq. 1.

    Args:
        pairs: images in the global batch.
        factor: temperature factor, exp(logit_scale).
        bias: logit bias.
        cosine: of every image with every text.
    """
    logit = factor * cosine + bias
    return softplus(-logit) + (pairs - 1) * softplus(logit)


def highest_loss(pairs: int, *, factor: float, bias: float, embed_dim: int) -> float:
    """Returns the largest loss that chance explains: of cosines as far from 0 as random directions get.

    Args:
        pairs: images in the global batch.
        factor: temperature factor, exp(logit_scale).
        bias: logit bias.
        embed_dim: E; the cosine of random directions has the standard deviation 1 / sqrt(E).
    """
    furthest = SPREAD / math.sqrt(embed_dim)
    return max(unrelated_loss(pairs, factor=factor, bias=bias, cosine=sign * furthest) for sign in (-1, 1))


def remark(loss: float, *, pairs: int, factor: float, bias: float, embed_dim: int) -> tuple[bool, str]:
    """Returns whether a first loss is above what chance explains, and what to say about it.

    Args:
        loss: nats per image.
        pairs: images in the global batch.
        factor: temperature factor, exp(logit_scale).
        bias: logit bias.
        embed_dim: E.
    """
    ignorant = unrelated_loss(pairs, factor=factor, bias=bias)
    most = highest_loss(pairs, factor=factor, bias=bias, embed_dim=embed_dim)
    found = (
        f"first loss {loss:.4g} nats per image; a model that knows nothing has {ignorant:.4g} at temperature "
        f"{factor:.4g}, bias {bias:.4g} and {pairs} pairs"
    )
    if loss <= most:
        return False, found
    return True, (
        f"{found}, and chance explains {most:.4g} at most. Were the weights loaded, are tokenizer, text and pixels "
        f"those that they were trained with, and is the bias theirs (about {-math.log(max(pairs - 1, 1)):.1f} for "
        f"fresh weights)?"
    )


class InitialLoss(Callback):
    """Compares the first loss of a run with the closed form, and says so if the model is worse than ignorance.

    A model that was trained before knows something of any batch of pictures and texts. If its first loss is above what
    chance explains, it is usually not the data: another tokenizer, other pixels, weights that were not loaded, or a
    temperature and bias of another model.

    Args:
        term: name of the loss over pairs, as it is logged behind `train/`.
        weight: the factor that it has in the recipe.
        stop: end the run with a ValueError instead of a warning.
    """

    def __init__(self, term: str = "sigmoid", weight: float = 1.0, stop: bool = False):
        self.term, self.weight, self.stop = term, weight, stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != 1 or batch_idx % trainer.accumulate_grad_batches:
            return
        metrics = trainer.callback_metrics
        if f"train/{self.term}" not in metrics:
            log.warning("the first loss was not checked: there is no term '%s' (InitialLoss.term)", self.term)
            return
        loss = metrics[f"train/{self.term}"].detach().float()
        if world_size() > 1:  # ranks with rows of their own; hosts that share a program have all rows each
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        worse, text = remark(
            float(loss) / self.weight,
            pairs=batch.size * world_size(),
            factor=float(metrics["logit_scale"]),
            bias=float(metrics["logit_bias"]),
            embed_dim=cast(Any, pl_module).model.embed_dim,
        )
        if worse and self.stop:
            raise ValueError(text)
        if trainer.is_global_zero:
            log.log(logging.WARNING if worse else logging.INFO, "%s", text)
