"""What losses of a student towards its teacher share: the projection head with its prototypes, and the centre."""

# M rows (images or patches), K prototypes, D bottleneck width

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip2.core.distributed import mean_over_ranks
from siglip2.core.schedules import Schedule, values_of


class ProjectionHead(nn.Module):
    """Three-layer MLP to a unit-norm bottleneck, and unit-norm prototypes to compare it with.

    Source: facebookresearch/dino, vision_transformer.py, DINOHead without batch norm. Its last layer, weight-normalised
    with the gain fixed to 1 and without bias, is the prototypes here; logits are their dot products with the output.
    Those are [M, K] and not made here: `siglip2.core.chunked.consistency` makes them a chunk at a time.

    Args:
        width: width of the features.
        hidden: width of the two hidden layers.
        bottleneck: width of the output.
        prototypes: number of prototypes.

    Raises:
        ValueError: if a size is less than 1.
    """

    def __init__(self, width: int, *, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65536):
        super().__init__()
        _check_sizes("projection head", hidden=hidden, bottleneck=bottleneck, prototypes=prototypes)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototype_weight = nn.Parameter(torch.empty(prototypes, bottleneck))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the unit-norm projection of features [..., width], float32 [..., D]."""
        return _unit_norm(self.mlp(x))

    def prototypes(self) -> Tensor:
        """Returns the unit-norm prototypes, float32 [K, D], with gradient to `prototype_weight`."""
        return _unit_norm(self.prototype_weight)


def _unit_norm(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1, eps=1e-6)  # of a zero row, 0 with a gradient that is large but finite


class Centre(nn.Module):
    """Running mean of the teacher's logits, subtracted before its softmax so that no prototype wins for every image.

    Source: Caron et al. (DINO), https://arxiv.org/abs/2104.14294, eq. 4: c <- m c + (1 - m) mean of the logits.

    Args:
        prototypes: number of prototypes.
        momentum: m, the share of the old centre that stays, in [0, 1]; DINO and iBOT have 0.9.

    Raises:
        ValueError: if there are fewer than two prototypes, or the momentum is outside [0, 1].
    """

    value: Tensor
    """The centre, float32 [K], 0 at the start."""

    _sum: Tensor
    _count: Tensor

    def __init__(self, prototypes: int, *, momentum: float = 0.9):
        super().__init__()
        if prototypes < 2:
            raise ValueError(
                f"centre: prototypes is {prototypes}, expected at least 2, between which a student decides"
            )
        if not 0 <= momentum <= 1:
            raise ValueError(f"centre: momentum is {momentum}, expected a share in [0, 1], such as 0.9")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))
        self.register_buffer("_sum", torch.zeros(prototypes), persistent=False)
        self.register_buffer("_count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def collect(self, z_teacher_MD: Tensor, prototypes_teacher_KD: Tensor) -> None:
        """Notes the mean logits of a batch, or of each part of one; the centre stays until `move`.

        Args:
            z_teacher_MD: the teacher's embeddings, the same M on every rank.
            prototypes_teacher_KD: the teacher's prototypes, equal on every rank.
        """
        mean_D = mean_over_ranks(z_teacher_MD.float().mean(0))
        with torch.autocast(mean_D.device.type, enabled=False):
            mean_K = prototypes_teacher_KD.float() @ mean_D  # logits are linear: their mean is that of the mean
        self._sum += mean_K.to(self._sum.dtype)  # bfloat16 if the whole module is
        self._count += 1

    @torch.no_grad()
    def move(self) -> None:
        """Moves the centre towards the mean of what was collected; call it once per optimizer step."""
        collected = (self._count > 0).to(self.value.dtype)
        self.value.lerp_(self._sum / self._count.clamp(min=1), (1 - self.momentum) * collected)
        self._sum.zero_()
        self._count.zero_()


def check_options(
    plugin: str,
    *,
    hidden: int,
    bottleneck: int,
    student_temperature: float,
    teacher_temperature: float | Schedule,
    freeze_prototypes: float,
) -> None:
    """Raises ValueError, naming the plugin, for an option of a self-distilling objective that is out of its range."""
    _check_sizes(plugin, hidden=hidden, bottleneck=bottleneck)
    both = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    for option, temperature in both.items():
        for value in values_of(temperature):
            if not 0 < value < math.inf:
                raise ValueError(f"{plugin}: {option} divides cosines, expected more than 0, found {value}")
    if not 0 <= freeze_prototypes <= 1:
        raise ValueError(
            f"{plugin}: freeze_prototypes is a share of the run, expected 0 to 1, found {freeze_prototypes}"
        )


def _check_sizes(what: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{what}: {name} is {size}, expected at least 1")
