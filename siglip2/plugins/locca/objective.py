"""The objective: a decoder learns to caption pictures, to find what a text names, and to name what a box holds."""

# B images, R = 3 B sequences (copies-major), T decoder tokens, N image tokens, D their width

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from siglip2.core.chunked import linear_cross_entropy
from siglip2.core.hooks import hookimpl
from siglip2.core.model.two_towers import TwoTowers
from siglip2.core.plugin import Objective
from siglip2.core.regions import Box
from siglip2.core.schedules import Schedule
from siglip2.core.step import Step
from siglip2.core.views import IMAGE, View
from siglip2.plugins.locca.decoder import Decoder, decoder_inputs, mean_weights
from siglip2.plugins.locca.decoding import forced, greedy
from siglip2.plugins.locca.sequences import BoxText, CoinView, LocCaView, Prefixes, Prompts

if TYPE_CHECKING:
    from siglip2.core.data.text import Tokenizer


class LocCa(Objective):
    """Captions, referring expressions and grounded captions through a decoder (SigLIP 2, section 2.2; LocCa).

    For each picture three sequences are predicted: its caption; a region's text and then its box; a region's box and
    then its text. The decoder reads the vision tower's un-pooled tokens and is not part of the product.

    Args:
        weight: factor of the loss term: a number, or a schedule over progress. 1 in SigLIP 2.
        length: tokens of a sequence, prefix and end included; 64 in LocCa, not published for SigLIP 2.
        depth: decoder layers; null takes half the text tower's (SigLIP 2), rounded down.
        bins: boxes are whole numbers from 0 to this; 500 in LocCa, not published for SigLIP 2.
        order: of a box's numbers: xyxy, yxyx or left-bottom-right-top, y downwards. Not published; xyxy is ours.
        box_template: the text around the four numbers of a box. Not published; the brackets are ours.
        prefixes: what each task begins with; {language} in it becomes the language code of the text.
        parallel: probability in [0, 1] that a caption is predicted with all tokens hidden at once; 0.5 in SigLIP 2.
        min_score: regions with a lower detector score are not used, in [0, 1]; 0.3 in LocCa. Those without a score are.
            Boxes of `siglip2 annotate` with a lower --threshold need a lower value here, too.
        location_languages: only region texts in these languages are used to find and to name boxes; null takes all.
            SigLIP 2 does not say; the detectors that make boxes are asked in English.
        start: progress in [0, 1] at which the objective wakes; before that it is not called at all.
        stop: progress in [0, 1] from which it sleeps again.

    Raises:
        ValueError: if an option is out of its range.
    """

    name = "locca"
    accumulates = True  # a mean over sequences, always divided by their number
    decoder: Decoder

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        length: int = 64,
        depth: int | None = None,
        bins: int = 500,
        order: str = "xyxy",
        box_template: str = "[{}, {}, {}, {}]",
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
        parallel: float = 0.5,
        min_score: float = 0.3,
        location_languages: list[str] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(weight=weight, start=start, stop=stop)
        shares_good = 0 <= parallel <= 1 and 0 <= min_score <= 1
        if length < 2 or not shares_good or (depth is not None and depth < 1):
            raise ValueError(
                f"locca: expected length >= 2, depth >= 1 or null, parallel and min_score in [0, 1], found "
                f"length={length}, depth={depth}, parallel={parallel}, min_score={min_score}"
            )
        self.length, self.depth, self.parallel, self.min_score = length, depth, parallel, min_score
        self.location_languages = None if location_languages is None else tuple(location_languages)
        self.prompts = Prompts(prefixes, BoxText(bins, order, box_template))

    @hookimpl
    def views(self) -> list[View]:
        sequences = LocCaView(self.length, self.prompts, self.min_score, self.location_languages)
        return [IMAGE, sequences, CoinView(self.parallel)]

    @hookimpl
    def setup(self, model: TwoTowers) -> None:
        shape = model.text.shape
        self.decoder = Decoder(
            replace(shape, depth=self.depth or max(shape.depth // 2, 1)),
            vocab_size=model.text.token_embed.num_embeddings,
            length=self.length,
            memory_width=model.vision.width,
            fused_attention=model.fused_attention,
        )

    def loss(self, step: Step) -> Tensor:
        """Returns the cross-entropy in nats per token, mean over the tokens of a sequence, then over 3 B sequences."""
        image = step.encode_image("image")
        ids_RT, targets_RT = step.view("locca").unbind(1)  # [R, 2, T] -> two of [R, T]
        coin_B = step.view("locca_parallel")
        parallel_R = torch.cat([coin_B, torch.zeros_like(coin_B).repeat(2)])  # only captions
        inputs_RT = decoder_inputs(ids_RT, targets_RT, parallel_R, mask_id=self.decoder.mask_id)
        hidden_RTD = self.decoder(inputs_RT, image.tokens, parallel_R=parallel_R, valid_BN=image.valid)
        return linear_cross_entropy(
            hidden_RTD.flatten(0, 1),
            self.decoder.out.weight,
            self.decoder.out.bias,
            ids_RT.flatten(),
            mean_weights(targets_RT).flatten(),
        )

    def caption(
        self, tokens_BND: Tensor, tokenizer: "Tokenizer", *, language: str = "", valid: Tensor | None = None
    ) -> list[str]:
        """Returns a caption for each image.

        Args:
            tokens_BND: what the vision tower makes of the images, before pooling.
            tokenizer: the one that the decoder was trained with.
            language: code for the prefix; it counts only if the prefix has a place for it.
            valid: bool [B, N], false where an image token is padding; None where none is.
        """
        prefix = self.prompts.prefix("caption", language, tokenizer)
        return self._write([prefix] * len(tokens_BND), tokens_BND, tokenizer, valid)

    def locate(
        self,
        tokens_BND: Tensor,
        texts: Sequence[str],
        tokenizer: "Tokenizer",
        *,
        language: str = "",
        valid: Tensor | None = None,
    ) -> Tensor:
        """Returns the box of what each text names in its image, xmin, ymin, xmax, ymax in [0, 1], float32 [B, 4].

        A row is NaN where the decoder wrote nothing that can be read as a box, or the text left no room for one.

        Args:
            tokens_BND: image tokens before pooling; the image is repeated for each text about it.
            texts: one for each row.
            tokenizer: the one that the decoder was trained with.
            language: of the texts, for the prefix.
            valid: bool [B, N], false where an image token is padding; None where none is.

        Raises:
            ValueError: if there are not as many texts as images.
        """
        _check_pairs(tokens_BND, texts, "texts")
        prefix = self.prompts.prefix("refer", language, tokenizer)
        prompts = [prefix + self.prompts.until_box(text, tokenizer) for text in texts]
        written = self._write(prompts, tokens_BND, tokenizer, valid)
        boxes = [self.prompts.boxes.read(text) or (math.nan,) * 4 for text in written]
        return torch.tensor(boxes, dtype=torch.float32, device=tokens_BND.device).reshape(-1, 4)

    def describe(
        self,
        tokens_BND: Tensor,
        boxes_B4: Tensor,
        tokenizer: "Tokenizer",
        *,
        language: str = "",
        valid: Tensor | None = None,
    ) -> list[str]:
        """Returns a text for what is in each box of its image.

        Args:
            tokens_BND: image tokens before pooling; the image is repeated for each of its boxes.
            boxes_B4: xmin, ymin, xmax, ymax, shares of width and height in [0, 1].
            tokenizer: the one that the decoder was trained with.
            language: in which to write; it counts only if the prefix has a place for it.
            valid: bool [B, N], false where an image token is padding; None where none is.

        Raises:
            ValueError: if there are not as many boxes as images.
        """
        _check_pairs(tokens_BND, boxes_B4, "boxes")
        prefix = self.prompts.prefix("ground", language, tokenizer)
        boxes = [cast(Box, tuple(box)) for box in boxes_B4.tolist()]
        prompts = [prefix + self.prompts.until_text(box, tokenizer) for box in boxes]
        return self._write(prompts, tokens_BND, tokenizer, valid)

    def _write(
        self, prompts: list[list[int]], tokens: Tensor, tokenizer: "Tokenizer", valid: Tensor | None
    ) -> list[str]:
        if not prompts:
            return []
        given = forced(prompts, self.length).to(tokens.device)
        contract = tokenizer.contract
        ids = greedy(
            self.decoder, tokens, given, eos_id=contract.eos_id, pad_id=contract.pad_id, valid_BN=valid
        ).tolist()
        return [tokenizer.decode(row[len(prompt) :]).strip() for row, prompt in zip(ids, prompts, strict=True)]


def _check_pairs(tokens: Tensor, others: Sequence[str] | Tensor, what: str) -> None:
    if len(tokens) != len(others):
        raise ValueError(
            f"expected one image for each of the {len(others)} {what}, found {len(tokens)}: repeat an image's tokens"
        )
