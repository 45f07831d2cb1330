"""`koleo`: a regulariser that spreads image embeddings evenly over the sphere."""

# b images of this rank, B images of all ranks, E embedding dimension

import torch
from torch import Tensor

from siglip2 import IMAGE, Objective, Schedule, Step, View, gather, hookimpl, rank


class KoLeo(Objective):
    """Pushes every image away from its nearest neighbour in the batch (Sablayrolles, https://arxiv.org/abs/1806.03198).

    Args:
        weight: factor of the loss term: a number, or a schedule over progress. 0.1 in DINOv2 (ssl_default_config.yaml).
        eps: least distance inside the logarithm, so that two equal images stay finite.
        start: progress in [0, 1] at which the objective wakes; before that it is not called at all.
        stop: progress in [0, 1] from which it sleeps again.
    """

    name = "koleo"

    def __init__(self, weight: float | Schedule = 0.1, eps: float = 1e-8, start: float = 0.0, stop: float = 1.0):
        super().__init__(weight=weight, start=start, stop=stop)
        self.eps = eps

    @hookimpl
    def views(self) -> list[View]:
        return [IMAGE]

    def loss(self, step: Step) -> Tensor:
        """Returns the mean over images of -log distance to the nearest other image on any rank (L_KoLeo)."""
        z_bE = step.encode_image("image").embedding
        all_BE = gather(z_bE)  # [b, E] -> [B, E]: neighbours on other ranks count
        own = torch.arange(len(z_bE), device=z_bE.device) + rank() * len(z_bE)  # rows of this rank among all
        with torch.no_grad():  # which image is nearest has no gradient, only how far it is
            similarity = (z_bE @ all_BE.T).scatter(
                1, own[:, None], -2.0
            )  # below any cosine: nobody is its own neighbour
            nearest = similarity.argmax(dim=1)  # [b]
        return -(z_bE - all_BE[nearest]).norm(dim=1).clamp(min=self.eps).log().mean()


@hookimpl
def register_plugins() -> list[type[Objective]]:
    """Returns the plugins of this package."""
    return [KoLeo]
