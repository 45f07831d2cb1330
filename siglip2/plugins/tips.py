"""`tips`: masked prediction of patch features."""

# B batch, N patches, M masked patches of each image, D width, K prototypes, d bottleneck

from dataclasses import replace

import torch
from torch import Tensor, nn

from siglip2.core.augment import DINO_GLOBAL, Photometric
from siglip2.core.chunked import consistency
from siglip2.core.crops import GLOBAL
from siglip2.core.hooks import hookimpl
from siglip2.core.masks import MaskView
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.model.vision import VisionTower
from siglip2.core.plugin import Objective
from siglip2.core.schedules import Schedule, value_at
from siglip2.core.self_distillation import Centre, ProjectionHead, check_options
from siglip2.core.step import Step
from siglip2.core.views import View


class TIPS(Objective):
    """Masked prediction: from half of the patches the student predicts the teacher's features of the other half.

    Both see the same global view. In the student's, masked patches are replaced, once embedded, by a learned token that
    keeps its position. At those positions: -sum_k q_t[k] log q_s[k], with q_t = softmax((a_t - centre) /
    teacher_temperature), q_s = softmax(a_s / student_temperature), and a the cosine of a projected patch feature (after
    the tower's last norm, not pooled) with K prototypes. Mean over masked patches, then over images. Sources: SigLIP 2,
    section 2.3 (https://arxiv.org/abs/2502.14786); TIPS (https://arxiv.org/abs/2410.16512); iBOT
    (https://arxiv.org/abs/2111.07832). SigLIP 2 publishes the share of 50 % and the weight; the rest are iBOT's values.

    Args:
        weight: factor of the loss term. In SigLIP 2, 0.25 times the size factor: 0.0625 for B, 0.125 for L, 0.25 for
            So400m, 0.125 for g.
        mask_ratio: share of the patches that are masked, in (0, 1); 0.5 in SigLIP 2.
        mask_pattern: `random`, or `block` for rectangles (BEiT, iBOT); always exactly that share.
        global_scale: least and largest share of the image's area in the global view, which has the recipe's image
            size; [1, 1] takes the whole image. With `silc` beside it, set this and the next the same there.
        global_photometric: chances and strengths of colour jitter, grey and blur in the global view (DINO).
        hidden: width of the projection head's two hidden layers (iBOT). The head is separate from that of `silc`.
        bottleneck: width of its unit-norm output (iBOT).
        prototypes: K, the number of prototypes (DINOv2; iBOT has 8192).
        student_temperature: divides the student's cosines (iBOT).
        teacher_temperature: divides the teacher's centred cosines: a number, or a schedule over progress. iBOT and
            TIPS raise it from 0.04 to 0.07 in the first epochs.
        centre_momentum: share of itself that the running mean of the teacher's cosines keeps in a step (iBOT).
        freeze_prototypes: share of the run, counted from `start`, during which the student's prototypes stay as they
            are; see `silc`.
        start: progress in [0, 1] at which the objective wakes; 0.8 in SigLIP 2. Before that no view is made.
        stop: progress in [0, 1] from which it sleeps again.

    Raises:
        ValueError: if an option is out of its range.
    """

    name = "tips"
    needs = ("teacher",)
    accumulates = True  # a mean over rows under a centre that stays until the step is done

    def __init__(
        self,
        weight: float | Schedule = 0.25,
        mask_ratio: float = 0.5,
        mask_pattern: str = "random",
        global_scale: tuple[float, float] = (0.4, 1.0),
        global_photometric: Photometric = DINO_GLOBAL,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        centre_momentum: float = 0.9,
        freeze_prototypes: float = 0.001,
        start: float = 0.8,
        stop: float = 1.0,
    ):
        super().__init__(weight=weight, start=start, stop=stop)
        check_options(
            self.name,
            hidden=hidden,
            bottleneck=bottleneck,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            freeze_prototypes=freeze_prototypes,
        )
        self.mask_view = MaskView(ratio=mask_ratio, pattern=mask_pattern)
        self.global_view = replace(GLOBAL, scale=global_scale, photometric=global_photometric)
        self.hidden, self.bottleneck = hidden, bottleneck
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.frozen_until = start + freeze_prototypes
        self.centre = Centre(prototypes, momentum=centre_momentum)

    @hookimpl
    def views(self) -> list[View]:
        return [self.global_view, self.mask_view]

    @hookimpl
    def setup(self, model: TwoTowers, heads: dict[str, nn.Module]) -> None:
        if not isinstance(model.vision, VisionTower):
            raise ValueError("tips masks embedded patches, which a timm vision tower does not offer: drop `model.timm`")
        width, prototypes = model.vision.width, self.centre.value.shape[0]
        self.head = ProjectionHead(width, hidden=self.hidden, bottleneck=self.bottleneck, prototypes=prototypes)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        heads[self.name] = self.head

    @hookimpl
    def after_step(self) -> None:
        self.centre.move()

    def loss(self, step: Step) -> Tensor:
        """Returns the mean cross-entropy in nats over masked patches; about ln K at first."""
        index_BM = step.view("mask").long()
        head_t = step.head(self.name, by="teacher")
        with torch.no_grad():
            z_teacher_d = head_t(_take(step.encode_image("global", by="teacher").tokens, index_BM))  # [B * M, d]
        z_student_d = self.head(_take(self._encode_masked(step, index_BM), index_BM))
        p_s, p_t = self.head.prototypes(), head_t.prototypes()  # [K, d]
        loss = consistency(
            z_student_d[None],
            p_s.detach() if step.progress < self.frozen_until else p_s,
            z_teacher_d,
            p_t,
            self.centre.value,
            temperature_student=self.student_temperature,
            temperature_teacher=value_at(self.teacher_temperature, step.progress),
        )
        self.centre.collect(z_teacher_d, p_t)
        return loss

    def _encode_masked(self, step: Step, index_BM: Tensor) -> Tensor:
        """Returns the student's tokens [B, N, D] of the masked global view; no other objective can use them."""
        images = step.view("global")
        masked_BN = torch.zeros(images.patches.shape[:2], dtype=torch.bool, device=index_BM.device)
        masked_BN = masked_BN.scatter(1, index_BM, True)
        mask = {"masked_BN": masked_BN, "mask_token_D": self.mask_token}
        tokens: Tensor = step.model.vision(images, **mask, pool=False).tokens
        return tokens


def _take(tokens_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Returns the tokens at the given positions of each image, [B * M, D]."""
    index = index_BM[..., None].expand(-1, -1, tokens_BND.shape[-1])
    return tokens_BND.gather(1, index).flatten(0, 1)
