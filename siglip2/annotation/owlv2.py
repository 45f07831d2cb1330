"""OWLv2 as a detector: transformers' implementation, with weights from a local folder.

Source: Minderer et al., https://arxiv.org/abs/2306.09683.
"""

# B pictures, N boxes of a picture, Q queries, P prompt templates, D width of the embeddings

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import resize

from siglip2.annotation.detector import Detections, Question, plain

# The seven best templates of CLIP's notebook Prompt_Engineering_for_ImageNet, over which OWL-ViT and OWLv2 average
CLIP_BEST = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
TEMPLATES = {"clip-7": CLIP_BEST, "none": ("{}",)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 4096  # pixels of a long side: the square that a picture is padded to takes 200 MB then; ours
TEXTS_AT_ONCE = 1024  # sequences of 16 tokens; ours


class Owlv2:
    """Scores every box that OWLv2 predicts against every query, and keeps the best query of each box.

    A score is the sigmoid of the logit averaged over the templates; objectness is not used, as in transformers'
    post-processing and in the reference evaluator. Prompts lose their punctuation before they are tokenized, as there.

    Args:
        path: folder with the model and its processor, as `save_pretrained` writes it.
        device: as torch names it.
        templates: a key of TEMPLATES.
        dtype: of the two towers; boxes and logits are made in float32. A key of DTYPES.
        fixed: texts that many pictures are asked for; embedded once.

    Raises:
        ImportError: if transformers is not installed.
        OSError, ValueError: if the folder holds no such model.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        templates: str = "clip-7",
        dtype: str = "float32",
        fixed: Sequence[str] = (),
    ) -> None:
        try:
            from transformers import Owlv2ForObjectDetection, Owlv2Processor
        except ImportError as error:
            raise ImportError("owlv2 needs transformers: pip install 'siglip2[hf]'") from error
        self.device, self.templates, self.dtype = torch.device(device), TEMPLATES[templates], DTYPES[dtype]
        processor = Owlv2Processor.from_pretrained(path, local_files_only=True)
        self.preprocess, self.tokenize = processor.image_processor, processor.tokenizer
        # typed loosely: transformers' own annotations do not tell what its methods return
        self.model: Any = Owlv2ForObjectDetection.from_pretrained(path, local_files_only=True)
        self.model.float().eval().to(self.device)
        self._fixed: dict[str, Tensor] = {}
        with torch.inference_mode():
            self._fixed = self._embed(dict.fromkeys(map(plain, fixed)))

    @torch.inference_mode()
    def detect(self, questions: Sequence[Question]) -> list[Detections]:
        """Returns all predicted boxes of each picture, one per patch of the model's input."""
        images = [_bounded(question.image) for question in questions]
        pixels = self.preprocess(images, return_tensors="pt", input_data_format="channels_first", device=self.device)
        with self._towers():
            feature_map, _ = self.model.image_embedder(pixels["pixel_values"])
        feature_map = feature_map.float()
        features_BND = feature_map.flatten(1, 2)
        boxes_BN4 = box_convert(self.model.box_predictor(features_BND, feature_map), "cxcywh", "xyxy")
        asked = [[plain(query.text) for query in question.queries] for question in questions]
        embedded = self._fixed | self._embed(dict.fromkeys(t for ts in asked for t in ts if t not in self._fixed))
        found = []
        for b, (question, texts) in enumerate(zip(questions, asked, strict=True)):
            query_PQD = torch.stack([embedded[text] for text in texts], dim=1)
            scores_NQ = self._scores(features_BND[b : b + 1], query_PQD)
            weights = torch.tensor([query.weight for query in question.queries], device=self.device)
            scores_NQ = torch.where(torch.tensor([bool(t) for t in texts], device=self.device), scores_NQ * weights, -1)
            best = scores_NQ.max(dim=-1)
            # pictures are padded to a square at the right and the bottom, and boxes are shares of that square
            boxes_N4 = boxes_BN4[b] * max(question.image.shape[1:])
            found.append(Detections(boxes_N4.cpu(), best.values.cpu(), best.indices.cpu()))
        return found

    def _towers(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _scores(self, features_1ND: Tensor, query_PQD: Tensor) -> Tensor:
        """How well each query fits each box, in [0, 1], [N, Q]."""
        logits = [self.model.class_predictor(features_1ND, query_QD[None])[0] for query_QD in query_PQD]
        return (sum(logits[1:], logits[0]) / len(logits))[0].sigmoid()

    def _embed(self, texts: dict[str, None]) -> dict[str, Tensor]:
        """Text -> its embeddings in each template [P, D], float32, not normalised."""
        if not texts:
            return {}
        prompts = [plain(template.format(text)) for text in texts for template in self.templates]
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenize(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        parts = []
        for start in range(0, len(prompts), TEXTS_AT_ONCE):
            part = {name: ids[name][start : start + TEXTS_AT_ONCE] for name in ("input_ids", "attention_mask")}
            with self._towers():
                encoded = self.model.owlv2.get_text_features(**{k: v.to(self.device) for k, v in part.items()})
            parts.append(encoded.pooler_output.float())
        return dict(zip(texts, torch.cat(parts).unflatten(0, (len(texts), -1)), strict=True))


def _bounded(image: Tensor) -> Tensor:
    """A picture with a long side of at most LARGEST pixels: a narrow one would be padded to a very large square."""
    height, width = image.shape[1:]
    shrink = LARGEST / max(height, width)
    if shrink >= 1:
        return image
    return resize(image, [max(1, round(height * shrink)), max(1, round(width * shrink))], antialias=True)


def fingerprint(path: str) -> str:
    """Returns the sha256 of all files in a folder, in the order of their names: two models never look the same.

    Raises:
        FileNotFoundError: if it is no folder with a config.json.
    """
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(
            f"no config.json in {path!r}: expected a local folder with an OWLv2 model and its processor, as "
            f"`save_pretrained` or a download of google/owlv2-large-patch14-ensemble leaves it"
        )
    total = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        file = os.path.join(path, name)
        if os.path.isfile(file) and not name.startswith("."):
            with open(file, "rb") as content:
                total.update(name.encode(errors="surrogateescape") + b"\0")
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()
