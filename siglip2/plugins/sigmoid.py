"""`sigmoid`: the image-text objective of SigLIP."""

from torch import Tensor

from siglip2.core.hooks import hookimpl
from siglip2.core.pairs import pair_loss
from siglip2.core.plugin import Objective
from siglip2.core.step import Step
from siglip2.core.views import CAPTION, IMAGE, View


class Sigmoid(Objective):
    """Sigmoid loss over all image-text pairs of the global batch (SigLIP, https://arxiv.org/abs/2303.15343, eq. 1).

    Args:
        weight: factor of the loss term: a number, or a schedule over progress.
        start: progress in [0, 1] at which the objective wakes; before that it is not called at all.
        stop: progress in [0, 1] from which it sleeps again.
    """

    name = "sigmoid"

    @hookimpl
    def views(self) -> list[View]:
        return [IMAGE, CAPTION]

    def loss(self, step: Step) -> Tensor:
        """Returns the loss in nats per image; each rank takes its own images against the texts of all ranks."""
        z_image = step.encode_image("image").embedding  # [b, E]
        z_text = step.encode_text("caption").embedding  # [b, E]
        return pair_loss(z_image, z_text, scale=step.model.logit_scale, bias=step.model.logit_bias)
