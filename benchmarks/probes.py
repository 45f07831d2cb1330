"""Small heads trained on frozen image tokens: one finds what a name stands for, one says what each pixel shows.

The tower gives its tokens once and is not touched. Size, data, batches and steps of a probe are the same for every
checkpoint, so that scores differ by what the tokens hold.
"""

# M images, B images of a batch, N patches, D width of the tokens, d of the probe, R regions, K classes, H W pixels

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from siglip2.core.schedules import warmup_cosine

NOTHING = -1  # class of a region that is not there
EVERY = 3  # the segmentation loss looks at every third pixel of every third row: the others say almost the same


@dataclass(frozen=True)
class Scenes:
    """Pictures as a frozen tower sees them, and what is true of them.

    Args:
        tokens_MND: un-pooled tokens, float32.
        labels_MR: class of each region, int64; `NOTHING` where a picture has fewer.
        boxes_MR4: xmin, ymin, xmax, ymax in [0, 1], float32; zeros where there is no region.
        masks_MHW: class of each pixel, uint8; 0 is background, k + 1 is class k.
    """

    tokens_MND: Tensor
    labels_MR: Tensor
    boxes_MR4: Tensor
    masks_MHW: Tensor


@dataclass(frozen=True)
class Training:
    """How a probe is trained: AdamW, linear warm-up over a tenth of the steps, cosine to zero.

    Args:
        steps: optimizer steps.
        batch_size: pictures in each.
        lr: highest learning rate.
        weight_decay: of AdamW.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 1e-4


# ours, tried on pilot runs of seed 100, which is not reported; bounded by time, a probe is not trained to the end
REFERRING = Training(steps=800, batch_size=64, lr=2e-3)
SEGMENTATION = Training(steps=400, batch_size=64, lr=1e-2)


class Standardise(nn.Module):
    """(x - mean) / std of each channel, over all tokens of the training pictures."""

    def __init__(self, tokens_MND: Tensor):
        super().__init__()
        std_D, mean_D = torch.std_mean(tokens_MND.flatten(0, -2), dim=0)
        self.register_buffer("mean_D", mean_D)
        self.register_buffer("scale_D", 1 / (std_D + 1e-5))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return (tokens_BND - self.mean_D) * self.scale_D


class ReferringProbe(nn.Module):
    """A learned query for each class that reads the tokens twice and becomes a box; queries do not see one another.

    Args:
        width: D of the tokens.
        num_classes: K.
        hidden: d, width of the queries.
        num_heads: attention heads.
        depth: times that a query reads the tokens.
    """

    def __init__(self, width: int, num_classes: int, *, hidden: int = 64, num_heads: int = 4, depth: int = 2):
        super().__init__()
        self.query = nn.Embedding(num_classes, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2 * depth))
        read = partial(nn.MultiheadAttention, hidden, num_heads, kdim=width, vdim=width, batch_first=True)
        self.reads = nn.ModuleList(read() for _ in range(depth))
        self.mlps = nn.ModuleList(_mlp(hidden, 2 * hidden, hidden) for _ in range(depth))
        self.box = _mlp(hidden, hidden, 4)

    def forward(self, tokens_BND: Tensor, labels_BR: Tensor) -> Tensor:
        """Returns the box of each class in its picture, xmin, ymin, xmax, ymax, [B, R, 4]."""
        x = self.query(labels_BR.clamp(min=0))  # [B, R] -> [B, R, d]
        for i, (read, mlp) in enumerate(zip(self.reads, self.mlps, strict=True)):
            x = x + read(self.norms[2 * i](x), tokens_BND, tokens_BND, need_weights=False)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        return box_convert(self.box(x).sigmoid(), "cxcywh", "xyxy")


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class SegmentationProbe(nn.Module):
    """A linear layer on each token; its logits are upsampled bilinearly.

    Source: TIPS, section 4.1 (https://arxiv.org/abs/2410.16512), after DINOv2.

    Args:
        width: D of the tokens.
        num_classes: K, to which the background is added as number 0.
        grid: (rows, columns) of the patches.
    """

    def __init__(self, width: int, num_classes: int, grid: tuple[int, int]):
        super().__init__()
        self.head, self.grid = nn.Linear(width, num_classes + 1), grid

    def forward(self, tokens_BND: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns logits at each of `size` pixels, [B, 1 + K, H, W]."""
        logits = self.head(tokens_BND).transpose(1, 2).unflatten(2, self.grid)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def train(head: nn.Module, loss: Callable[[Tensor], Tensor], num_images: int, how: Training, *, seed: int) -> None:
    """Minimises `loss(index_B)`, index_B the numbers of the pictures of a batch, over the parameters of `head`."""
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    rate = partial(warmup_cosine, total=how.steps, warmup=how.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(how.steps):
        index_B = torch.randint(num_images, (how.batch_size,), generator=draws)
        optimizer.zero_grad()
        loss(index_B).backward()
        optimizer.step()
        schedule.step()


def box_loss(found_BR4: Tensor, boxes_BR4: Tensor, there_BR: Tensor) -> Tensor:
    """Returns 5 |difference|_1 + 2 (1 - GIoU), mean over the regions that are there: the weights are DETR's."""
    distance_BR = (found_BR4 - boxes_BR4).abs().sum(-1)
    overlap_BR = generalized_box_iou_loss(found_BR4, boxes_BR4)
    return ((5 * distance_BR + 2 * overlap_BR) * there_BR).sum() / there_BR.sum()


def referring_accuracy(
    train_on: Scenes, test_on: Scenes, num_classes: int, *, seed: int, placed: bool = False, how: Training = REFERRING
) -> float:
    """Returns the share of the regions of `test_on` that a freshly trained probe finds with an IoU of at least 0.5.

    Args:
        train_on: what the probe learns from.
        test_on: held-out pictures.
        num_classes: K.
        seed: of the probe's weights and batches.
        placed: tell the probe where each token lies. If not, as in SigLIP 2's protocol, the tokens have to say so.
        how: length of the training.
    """
    torch.manual_seed(seed)
    standardise = Standardise(train_on.tokens_MND)
    train_MND, test_MND = (standardise(scenes.tokens_MND) for scenes in (train_on, test_on))
    if placed:
        train_MND, test_MND = with_places(train_MND), with_places(test_MND)
    probe, there_MR = ReferringProbe(train_MND.shape[-1], num_classes), train_on.labels_MR != NOTHING

    def loss(index_B: Tensor) -> Tensor:
        found_BR4 = probe(train_MND[index_B], train_on.labels_MR[index_B])
        return box_loss(found_BR4, train_on.boxes_MR4[index_B], there_MR[index_B])

    train(probe, loss, len(train_MND), how, seed=seed)
    with torch.no_grad():
        found_MR4 = probe(test_MND, test_on.labels_MR)
    asked_MR = test_on.labels_MR != NOTHING
    return hit_rate(found_MR4[asked_MR], test_on.boxes_MR4[asked_MR])


def with_places(tokens_MND: Tensor) -> Tensor:
    """Returns the tokens with the number of each one's place beside it, one-hot, [M, N, D + N]."""
    num_images, num_places, _ = tokens_MND.shape
    return torch.cat([tokens_MND, torch.eye(num_places).expand(num_images, -1, -1)], dim=-1)


def hit_rate(found_R4: Tensor, true_R4: Tensor) -> float:
    """Returns the share of boxes whose IoU with the true one is at least 0.5; NaN is a miss."""
    return float((paired_iou(found_R4.float(), true_R4.float()) >= 0.5).float().mean())


def paired_iou(found_R4: Tensor, true_R4: Tensor) -> Tensor:
    """Returns the intersection over union of box i of the one and box i of the other, [R]."""
    low_R2, high_R2 = found_R4[:, :2].maximum(true_R4[:, :2]), found_R4[:, 2:].minimum(true_R4[:, 2:])
    shared_R = (high_R2 - low_R2).clamp(min=0).prod(-1)
    found_R, true_R = ((box[:, 2:] - box[:, :2]).prod(-1) for box in (found_R4, true_R4))
    return shared_R / (found_R + true_R - shared_R)


def segmentation_miou(
    train_on: Scenes,
    test_on: Scenes,
    num_classes: int,
    grid: tuple[int, int],
    *,
    seed: int,
    how: Training = SEGMENTATION,
) -> float:
    """Returns the mIoU over all pixels of `test_on` of a freshly trained linear probe."""
    torch.manual_seed(seed)
    standardise = Standardise(train_on.tokens_MND)
    tokens_MND = standardise(train_on.tokens_MND)
    targets_MHW = train_on.masks_MHW[:, EVERY // 2 :: EVERY, EVERY // 2 :: EVERY]
    coarse, full = _size(targets_MHW), _size(test_on.masks_MHW)
    probe = SegmentationProbe(tokens_MND.shape[-1], num_classes, grid)

    def loss(index_B: Tensor) -> Tensor:
        return F.cross_entropy(probe(tokens_MND[index_B], coarse), targets_MHW[index_B].long())

    train(probe, loss, len(tokens_MND), how, seed=seed)
    counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    parts = zip(test_on.tokens_MND.split(50), test_on.masks_MHW.split(50), strict=True)
    with torch.no_grad():
        for tokens_BND, masks_BHW in parts:
            counts += confusion(probe(standardise(tokens_BND), full).argmax(1), masks_BHW, num_classes + 1)
    return mean_iou(counts)


def _size(masks_MHW: Tensor) -> tuple[int, int]:
    return masks_MHW.shape[1], masks_MHW.shape[2]


def confusion(found: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """Returns how many pixels of each class (rows) were taken for each class (columns), int64."""
    pairs = true.flatten().long() * num_classes + found.flatten().long()
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(counts: Tensor) -> float:
    """Returns the mean of TP / (TP + FP + FN) over the classes that occur, in truth or in the prediction."""
    hits, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((hits[union > 0] / union[union > 0]).mean())
