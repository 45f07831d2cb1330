"""Losses over all image-text pairs of the global batch that never hold them all: a block of logits at a time.

The gradient of such a loss in its logits is known as soon as they are. So the forward pass turns each block of logits
into the gradients of the embeddings, and the backward pass only scales these: nothing of size B x B is kept. Texts of
other ranks come around a ring, one rank's at a time, and carry their gradient with them until both are home again.
"""

# b images and texts of this rank, C images and K texts of one block, D width

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip2.core.distributed import from_left, world_size

PairTerm = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
"""(logits [C, K], paired) -> the summed loss of a block, and its derivative in every logit.

`paired` says whether the diagonal holds true pairs; all other pairs are not. The logits may be written to.
"""

BLOCK = 4096
"""Images and texts of one block: 64 MiB of float32 logits, enough to fill a GPU. Ours."""

CPU_BLOCK = 256
"""The same on a CPU, where a quarter of a megabyte stays in the cache. Ours."""


def sigmoid_term(logits: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """The sigmoid loss of a block of pairs: softplus(a) for others and softplus(a) - a for true pairs, a the logit.

    Source: SigLIP, https://arxiv.org/abs/2303.15343, eq. 1; its derivative is sigmoid(a) - 1[true pair].
    """
    total = F.softplus(logits).sum()
    if paired:
        total = total - logits.diagonal().sum()
    slope = logits.sigmoid_()
    if paired:
        slope.diagonal().sub_(1)
    return total, slope


def pair_loss(
    z_image_bD: Tensor,
    z_text_bD: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    term: PairTerm = sigmoid_term,
    block: int | None = None,
) -> Tensor:
    """Mean over this rank's images of a loss summed over all texts of all ranks; gradients in O(b D) memory.

    Averaged over ranks, as DDP and FSDP do, value and gradients are those of one process on the joined batch. Products
    and sums are float32, also under autocast. Gradients can be asked for once, and with the same factor on every rank.

    Args:
        z_image_bD: unit-norm image embeddings, float; the same number on every rank.
        z_text_bD: unit-norm text embeddings; row i is the text of image i.
        scale: log of the temperature factor, shape [1]: logits are exp(scale) x.y + bias.
        bias: logit bias, shape [1].
        term: what a block of pairs costs; the sigmoid loss unless given.
        block: images and texts whose logits are held at a time.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if there is not one text for every image.
    """
    if z_image_bD.shape != z_text_bD.shape:
        raise ValueError(
            f"expected one text embedding for every image embedding, found {list(z_text_bD.shape)} and "
            f"{list(z_image_bD.shape)}"
        )
    # a compiler that spreads one program over all chips cuts the rows itself: more blocks would only be more exchanges
    whole = max(z_image_bD.shape[0], 1)
    side = block or {"cpu": CPU_BLOCK, "xla": whole}.get(z_image_bD.device.type, BLOCK)
    with torch.autocast(z_image_bD.device.type, enabled=False):
        x, y, t, b = (tensor.float() for tensor in (z_image_bD, z_text_bD, scale, bias))
        loss: Tensor = _PairLoss.apply(x, y, t, b, term, side)
    return loss


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, term: PairTerm, side: int) -> Tensor:
        num_images, factor = x.shape[0], scale.exp()
        total, d_scale, d_bias = (x.new_zeros(1) for _ in range(3))
        dx, texts, d_texts = torch.zeros_like(x), y, torch.zeros_like(y)
        blocks = [slice(first, first + side) for first in range(0, num_images, side)]
        for turn in range(world_size()):
            for j, i in product(blocks, blocks):
                dots = x[i] @ texts[j].T  # [C, K]
                loss, slope = term(torch.addcmul(bias, dots, factor), turn == 0 and i == j)
                total += loss
                d_bias += slope.sum()
                d_scale += (slope.flatten() @ dots.flatten()) * factor
                dx[i].addmm_(slope, texts[j])
                d_texts[j].addmm_(slope.T, x[i])
            texts, d_texts = from_left(texts, d_texts, last=turn == world_size() - 1)
        mean = 1 / num_images
        ctx.save_for_backward(dx.mul_(factor * mean), d_texts.mul_(factor * mean), d_scale * mean, d_bias * mean)
        return total[0] * mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # in place: autograd notices if they are asked for again
        return *(saved.mul_(grad) for saved in ctx.saved_tensors), None, None
