"""`silc`: local-to-global self-distillation."""

# B batch, C local crops of each image, D width, K prototypes, d bottleneck

from dataclasses import replace

import torch
from torch import Tensor, nn

from siglip2.core.augment import DINO_GLOBAL, DINO_LOCAL, Photometric
from siglip2.core.chunked import consistency
from siglip2.core.crops import GLOBAL, LOCAL
from siglip2.core.hooks import hookimpl
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.model.vision import VisionTower
from siglip2.core.plugin import Objective
from siglip2.core.schedules import Schedule, value_at
from siglip2.core.self_distillation import Centre, ProjectionHead, check_options
from siglip2.core.step import Step
from siglip2.core.views import View


class SILC(Objective):
    """Local-to-global consistency: small crops, seen by the student, predict what the teacher sees in a large one.

    -sum_k q_t[k] log q_s[k], with q_t = softmax((a_t - centre) / teacher_temperature) of the global view and
    q_s = softmax(a_s / student_temperature) of a local view; a is the cosine of the projected pooled features with K
    prototypes. Mean over images and their local views. Sources: SigLIP 2, section 2.3 (https://arxiv.org/abs/2502.14786);
    SILC, eqs. 2 and 3 (https://arxiv.org/abs/2310.13355), the same form as DINO (https://arxiv.org/abs/2104.14294).
    SigLIP 2 publishes 1 global and 8 local views and the weight; the rest are DINO's or SILC's values.

    Args:
        weight: factor of the loss term. In SigLIP 2, 1 times the size factor: 0.25 for B, 0.5 for L, 1 for So400m,
            0.5 for g.
        local_crops: local views of each image; 8 in SigLIP 2.
        local_size: side of a local view in pixels; null takes 3/8 of the image's, to the nearest whole patch: 96 of
            256 px, which is DINO's.
        local_scale: least and largest share of the image's area in a local view (SILC, DINO).
        local_photometric: chances and strengths of colour jitter, grey and blur in local views (DINO).
        global_scale: least and largest share in the global view, which has the recipe's image size (SILC); [1, 1] takes
            the whole image. With `tips` beside it, set this and the next the same there.
        global_photometric: colour jitter, grey and blur in the global view (DINO).
        hidden: width of the projection head's two hidden layers (DINO).
        bottleneck: width of its unit-norm output (DINO).
        prototypes: K, the number of prototypes (DINO).
        student_temperature: divides the student's cosines (DINO).
        teacher_temperature: divides the teacher's centred cosines: a number, or a schedule over progress (DINO: 0.04).
        centre_momentum: share of itself that the running mean of the teacher's cosines keeps in a step (DINO).
        freeze_prototypes: share of the run, counted from `start`, during which the student's prototypes stay as they
            are. DINO freezes its last layer for the first epoch; 0.001 is about 1200 steps of SigLIP 2's run.
        start: progress in [0, 1] at which the objective wakes; 0.8 in SigLIP 2. Before that no crop is made.
        stop: progress in [0, 1] from which it sleeps again.

    Raises:
        ValueError: if an option is out of its range.
    """

    name = "silc"
    needs = ("teacher",)
    accumulates = True  # a mean over rows under a centre that stays until the step is done

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        local_crops: int = 8,
        local_size: int | None = None,
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_photometric: Photometric = DINO_LOCAL,
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
        self.local_view = replace(
            LOCAL, copies=local_crops, size=local_size, scale=local_scale, photometric=local_photometric
        )
        self.global_view = replace(GLOBAL, scale=global_scale, photometric=global_photometric)
        self.hidden, self.bottleneck = hidden, bottleneck
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.frozen_until = start + freeze_prototypes
        self.centre = Centre(prototypes, momentum=centre_momentum)

    @hookimpl
    def views(self) -> list[View]:
        return [self.global_view, self.local_view]

    @hookimpl
    def setup(self, model: TwoTowers, heads: dict[str, nn.Module]) -> None:
        if not isinstance(model.vision, VisionTower):
            raise ValueError(
                "silc's local crops are not of the recipe's image size, the only one that a timm vision tower takes: "
                "drop `model.timm`"
            )
        prototypes = self.centre.value.shape[0]
        self.head = ProjectionHead(
            model.vision.width, hidden=self.hidden, bottleneck=self.bottleneck, prototypes=prototypes
        )
        heads[self.name] = self.head

    @hookimpl
    def after_step(self) -> None:
        self.centre.move()

    def loss(self, step: Step) -> Tensor:
        """Returns the mean cross-entropy in nats; about ln K at first, the teacher's entropy at best."""
        head_t = step.head(self.name, by="teacher")
        with torch.no_grad():
            z_global_Bd = head_t(step.encode_image("global", by="teacher").pooled)
        z_local_BCd = self.head(step.encode_image("local").pooled)  # [C * B, D] -> [C * B, d], copies-major
        p_s, p_t = self.head.prototypes(), head_t.prototypes()  # [K, d]
        loss = consistency(
            z_local_BCd.unflatten(0, (self.local_view.copies, -1)),
            p_s.detach() if step.progress < self.frozen_until else p_s,
            z_global_Bd,
            p_t,
            self.centre.value,
            temperature_student=self.student_temperature,
            temperature_teacher=value_at(self.teacher_temperature, step.progress),
        )
        self.centre.collect(z_global_Bd, p_t)
        return loss
