"""Two towers for use: pictures and texts in, embeddings and probabilities out, under the contracts of training."""

# B pictures or texts, K labels, E embedding dimension, N patches

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

import torch
from torch import Tensor

from siglip2.core.batch import Patches, collate
from siglip2.core.callbacks.zero_shot import class_vectors
from siglip2.core.data.text import Tokenizer
from siglip2.core.functional import unpatchify
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.views import IMAGE
from siglip2.prediction.inputs import Explanation, Picture, by_length, each, equally_long, pixels_of, trimmed

SORTED = 8  # batches whose pictures are sorted by length, so that those of one batch have little padding


@dataclass(frozen=True)
class Ranked:
    """One text for one picture.

    Args:
        text: as the user wrote it.
        match: the model's own probability that the two belong together, sigmoid of the logit.
        share: softmax of the logit among the given texts.
    """

    text: str
    match: float
    share: float


class Model:
    """Two towers for use, with the contracts they were trained under; `siglip2.load` makes one.

    Args:
        model: the towers; they are put into evaluation mode.
        patchifier: with the pixel contract.
        tokenizer: with the text contract; None if it is not known, then texts are refused.
        name: what messages call it.
    """

    def __init__(self, model: TwoTowers, patchifier: Patchifier, tokenizer: Tokenizer | None, *, name: str = "model"):
        self.model = model.eval().requires_grad_(False)
        self.patchifier, self.name, self._tokenizer = patchifier, name, tokenizer

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return self.model.logit_scale.device

    @property
    def embed_dim(self) -> int:
        """E, the dimension of the shared embedding space."""
        return self.model.embed_dim

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids; ValueError if the weights came without one."""
        if self._tokenizer is None:
            raise ValueError(
                f"{self.name} came without a tokenizer: give load(..., tokenizer=) the tokenizer.json or SentencePiece "
                f"model that it was trained with"
            )
        return self._tokenizer

    @cached_property
    def layout(self) -> Layout:
        """The layout that pictures are encoded in."""
        return self.patchifier.eval_layout(1)

    def patches(self, image: Picture) -> Patches:
        """Returns a picture as the vision tower reads it, [1, N, P] uint8."""
        return self.patchifier(pixels_of(image), IMAGE, self.layout)

    @torch.inference_mode()
    def encode_image(self, images: Picture | Sequence[Picture], *, batch_size: int = 32) -> Tensor:
        """Returns unit-norm embeddings [B, E], float32 on the model's device.

        Args:
            images: paths, whole image files as bytes, PIL pictures, uint8 tensors [3, H, W] or arrays [H, W, 3], of
                any sizes; one of them, a list, or a tensor [B, 3, H, W].
            batch_size: pictures that are encoded at a time.

        Raises:
            ValueError: if a picture cannot be read, or is no such tensor, or `batch_size` is below 1.
        """
        _check(batch_size)
        pictures = each(images)
        z_BE = torch.empty(len(pictures), self.embed_dim, device=self.device)
        for first in range(0, len(pictures), SORTED * batch_size):
            rows = [self.patches(picture) for picture in pictures[first : first + SORTED * batch_size]]
            order = sorted(range(len(rows)), key=lambda i: by_length(rows[i]))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                joined = collate([{IMAGE.name: rows[i]} for i in chosen])[IMAGE.name]
                z_BE[torch.tensor(chosen) + first] = self.encode_patches(joined)
        return z_BE

    @torch.inference_mode()
    def encode_patches(self, images: Patches) -> Tensor:
        """Returns unit-norm embeddings [B, E] of patches that lie on the host; what all pad is not computed.

        On a CPU, where a large batch is hardly faster than a small one, no padding is: each length has its own.
        """
        parts = equally_long(images) if self.device.type == "cpu" else [torch.arange(images.num_images)]
        z_BE = torch.empty(images.num_images, self.embed_dim, device=self.device)
        for rows in parts:
            there = trimmed(images.images(rows)).apply(lambda t: t.to(self.device, non_blocking=True))
            z_BE[rows] = self.model.encode_image(there).embedding
        return z_BE

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Returns unit-norm embeddings [B, E], float32 on the model's device.

        Args:
            texts: one or several, of any length; cleaned, cut and padded as in training.
            batch_size: texts that are encoded at a time.

        Raises:
            ValueError: if the tokenizer is not known, one of them is no text, or `batch_size` is below 1.
        """
        _check(batch_size)
        ids_BT = self.tokenizer.encode(_listed(texts, "text"))
        none = torch.empty(0, self.embed_dim, device=self.device)
        return torch.cat([none, *(self.encode_ids(ids) for ids in ids_BT.split(batch_size) if len(ids))])

    @torch.inference_mode()
    def encode_ids(self, ids_BT: Tensor) -> Tensor:
        """Returns unit-norm embeddings [B, E] of texts that the tokenizer has made ids of, integer [B, T]."""
        return self.model.encode_text(ids_BT.to(self.device, non_blocking=True)).embedding

    def encode_labels(self, labels: str | Sequence[str], templates: str | Sequence[str] = "{}") -> Tensor:
        """Returns a unit-norm vector for each label, [K, E]: the mean over prompts, normalised.

        Args:
            labels: what may be in a picture, one or several.
            templates: prompts with `{}` for the label, one or several.

        Raises:
            ValueError: if there are no labels, or a template has no place for one.
        """
        labels, templates = _listed(labels, "label"), _listed(templates, "template")
        if not labels or not templates:
            raise ValueError("expected at least one label and one template, found none")
        if wrong := [template for template in templates if not _takes_label(template)]:
            raise ValueError(
                f"the template {wrong[0]!r} has no place for the label, or other braces: expected one {{}} in it, such "
                f"as 'a photo of a {{}}'"
            )
        with torch.inference_mode():
            return class_vectors(self, labels, templates, batch_size=64, alone=True)

    @torch.inference_mode()
    def probabilities(self, z_image_BE: Tensor, z_text_KE: Tensor) -> Tensor:
        """Returns the probability of each pair of embeddings, [B, K] float32: sigmoid(temperature x.y + bias)."""
        return self.model.logits(z_image_BE, z_text_KE).sigmoid()

    def rank(
        self, image: Picture, labels: str | Sequence[str], *, templates: str | Sequence[str] = "{}"
    ) -> list[Ranked]:
        """Returns the labels from best to worst, with the model's probabilities.

        Args:
            image: one picture.
            labels: free texts, one or several.
            templates: prompts with `{}` for the label, such as "a photo of a {}"; one or several.

        Raises:
            ValueError: if the picture cannot be read, or there are no labels.
        """
        labels = _listed(labels, "label")
        if len(pictures := each(image)) != 1:
            raise ValueError(f"rank() takes one picture, found {len(pictures)}")
        return self.ranked(self.encode_image(image), self.encode_labels(labels, templates), labels)[0]

    @torch.inference_mode()
    def ranked(self, z_image_BE: Tensor, z_text_KE: Tensor, texts: Sequence[str]) -> list[list[Ranked]]:
        """Returns, for every image embedding, the texts from best to worst."""
        logits_BK = self.model.logits(z_image_BE, z_text_KE)
        rows = zip(logits_BK.sigmoid().tolist(), logits_BK.softmax(1).tolist(), strict=True)
        found = [[Ranked(*r) for r in zip(texts, match, share, strict=True)] for match, share in rows]
        return [sorted(row, key=lambda r: -r.share) for row in found]

    def explain(self, image: Picture) -> Explanation:
        """Returns what the vision tower sees of a picture: the resized grid, and the pixels in it."""
        pixels = pixels_of(image)
        patches = self.patchifier(pixels, IMAGE, self.layout)
        sizes = patches.grid if patches.sizes is None else patches.sizes.flatten()[:2].tolist()
        assert sizes is not None  # either all images have one grid, or each has its own
        rows, columns = sizes
        resized = unpatchify(patches.patches[0, : rows * columns], (rows, columns))
        _, height, width = pixels.shape
        side, seq_len = self.patchifier.patch_size, patches.patches.shape[1]
        return Explanation((height, width), (rows, columns), side, seq_len, resized)


def _check(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")


def _listed(texts: str | Sequence[str], kind: str) -> list[str]:
    """The texts of what may be one or several; a single one is not taken apart into its letters."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise ValueError(f"{kind}s are {type(texts).__name__}, expected a text or several")
    found = list(texts)
    if wrong := [(i, text) for i, text in enumerate(found) if not isinstance(text, str)]:
        i, text = wrong[0]
        raise ValueError(f"{kind} {i} is {type(text).__name__}, expected a text")
    return found


def _takes_label(template: str) -> bool:
    """Whether `template.format(label)` puts the label in one place; {{ and }} stand for braces."""
    try:
        return [field[1:] for field in Formatter().parse(template) if field[1] is not None] == [("", "", None)]
    except ValueError:  # a single brace
        return False
