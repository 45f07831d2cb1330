"""What objectives see during one training step: views in, features out, each computed at most once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from siglip2.core.batch import Batch
from siglip2.core.model.two_towers import ImageFeatures, TextFeatures, TwoTowers, image_features

STUDENT = "student"


class Step:
    """One training step on one rank.

    Args:
        model: the towers that are trained, encoder `student`.
        batch: the views of this rank.
        progress: optimizer steps done / max_steps, in [0, 1).
        encoders: further image encoders by name (`teacher`, `reference`), run without gradient.
        heads: the student's heads by name, those that objectives registered in `setup`.
    """

    def __init__(
        self,
        model: TwoTowers,
        batch: Batch,
        *,
        progress: float,
        encoders: Mapping[str, nn.Module] | None = None,
        heads: Mapping[str, nn.Module] | None = None,
    ):
        self.model, self.batch, self.progress = model, batch, progress
        self.encoders, self.heads = dict(encoders or {}), dict(heads or {})
        self.scalars: dict[str, Tensor] = {}
        self._features: dict[tuple[str, str], Any] = {}

    def view(self, name: str) -> Any:
        """Returns the view called `name`: `Patches` or a tensor with C * B rows.

        Raises:
            ValueError: if no awake plugin declared that view.
        """
        if name not in self.batch.views:
            made = ", ".join(self.batch.views)
            raise ValueError(f"no view called '{name}' in this batch (it has {made}): return it from your `views` hook")
        return self.batch.views[name]

    def encode_image(self, view: str = "image", by: str = STUDENT) -> ImageFeatures:
        """Returns the features of an image view; computed on the first request, read on later ones.

        Args:
            view: name of an image view.
            by: `student`, or an encoder that a plugin offers; those run without gradient.

        Raises:
            ValueError: if there is no such view or encoder.
        """
        key = (view, by)
        if key not in self._features:
            self._features[key] = self._encode_image(view, by)
        features: ImageFeatures = self._features[key]
        return features

    def _encode_image(self, view: str, by: str) -> ImageFeatures:
        if by == STUDENT:
            return self.model.encode_image(self.view(view))
        with torch.no_grad():
            return image_features(self._encoder(by), self.view(view))

    def _encoder(self, by: str) -> nn.Module:
        if by not in self.encoders:
            known = ", ".join([STUDENT, *self.encoders])
            raise ValueError(f"no encoder called '{by}' is awake (there is {known}): enable the plugin that offers it")
        return self.encoders[by]

    def head(self, name: str, by: str = STUDENT) -> Any:
        """Returns a head that was registered in `setup`: the student's own, or the copy that another encoder keeps.

        Args:
            name: the name it was registered under.
            by: `student`, or an encoder that follows the student with its heads, such as `teacher`.

        Raises:
            ValueError: if there is no such head or encoder.
        """
        heads = self.heads if by == STUDENT else getattr(self._encoder(by), "heads", {})
        if name not in heads:
            known = ", ".join(heads) or "none"
            raise ValueError(f"the encoder '{by}' has no head called '{name}' (it has {known}): register it in `setup`")
        return heads[name]

    def log(self, name: str, value: Tensor) -> None:
        """Notes a scalar that is logged as `train/<name>` beside the loss terms; nothing is read back from a device."""
        self.scalars[name] = value.detach()

    def encode_text(self, view: str = "caption") -> TextFeatures:
        """Returns the features of a text view; computed on the first request, read on later ones."""
        key = (view, STUDENT)
        if key not in self._features:
            self._features[key] = self.model.encode_text(self.view(view))
        features: TextFeatures = self._features[key]
        return features

    def select(self, kept: Tensor) -> "Step":
        """Returns the step on the rows `kept` ([B'] int64), with nothing computed yet.

        What was logged stays, and what either step logs from here on is logged in both.
        """
        selected = type(self)(
            self.model, self.batch.select(kept), progress=self.progress, encoders=self.encoders, heads=self.heads
        )
        selected.scalars = self.scalars
        return selected
