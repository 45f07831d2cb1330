"""Pictures for the report: what texts find, what pictures find, and where in a picture a text is."""

# M images, K texts, N patches, E embedding dimension

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.callbacks.zero_shot import class_vectors, read_classes
from siglip2.core.functional import unpatchify
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.model.vision import VisionTower
from siglip2.core.report.data import Heatmap, ImageExample, RetrievalExample

SHOWN = 8  # examples of each kind
POOL = 256  # images among which texts are searched
TOP = 5


@dataclass(frozen=True)
class Embedded:
    """Images of an evaluation set.

    Args:
        pictures: uint8 [M, H, W, 3].
        patches: of each picture, with a leading dimension of 1.
        embedding: [M, E].
        others: embeddings [M, E] of text views, and labels [M], by view.
        ids: token ids [M, T] of text views, by view.
    """

    pictures: Any
    patches: list[Patches]
    embedding: Tensor
    others: dict[str, Tensor]
    ids: dict[str, Tensor]


@torch.no_grad()
def embed_some(module: Any, batches: Any, limit: int) -> Embedded:
    """Embeds the first `limit` images of an evaluation set, with its other views."""
    pictures: list[Any] = []
    patches: list[Patches] = []
    rows: list[dict[str, Any]] = []
    for index in range(len(batches)):
        batch = batches[index].to(module.device)
        images: Patches = batch.views["image"]
        if images.grid is None or sum(len(p) for p in pictures) >= limit:
            break
        ids = {f"ids/{name}": view for name, view in batch.views.items() if isinstance(view, Tensor) and view.ndim == 2}
        rows.append({**module.embed(batch), **ids, "real": batch.real})
        pictures.append(unpatchify(images.patches.cpu(), images.grid).permute(0, 2, 3, 1).numpy())
        patches += [images.rows(torch.tensor([i], device=module.device)) for i in range(batch.size)]
    kept = torch.cat([r["real"] for r in rows])[:limit].cpu()
    joined = {k: torch.cat([r[k] for r in rows])[:limit].cpu()[kept] for k in rows[0] if k != "real"}
    chosen = kept.nonzero().flatten().tolist()
    ids = {name.removeprefix("ids/"): joined.pop(name) for name in list(joined) if name.startswith("ids/")}
    return Embedded(np.concatenate(pictures)[chosen], [patches[i] for i in chosen], joined.pop("image"), joined, ids)


def text_examples(module: Any, batches: Any, language: str | None, view: str) -> list[RetrievalExample]:
    """Returns texts of one language with the pictures they find, best first."""
    found = embed_some(module, batches, POOL)
    logits_KM = module.model.logits(found.others[view].to(module.device), found.embedding.to(module.device)).cpu()
    chosen = range(0, len(logits_KM), max(1, len(logits_KM) // SHOWN))
    examples = []
    for row in list(chosen)[:SHOWN]:
        best = logits_KM[row].topk(min(TOP, len(found.pictures)))
        examples.append(
            RetrievalExample(
                query=module.tokenizer.decode(found.ids[view][row]),
                language=language or "",
                images=[found.pictures[i] for i in best.indices.tolist()],
                scores=best.values.sigmoid().tolist(),
                correct=[i == row for i in best.indices.tolist()],
            )
        )
    return examples


@torch.no_grad()
def picture_examples(module: Any, batches: Any, settings: Any) -> tuple[list[ImageExample], list[Heatmap]]:
    """Returns pictures with the class names they find, in several languages, and where each name is in its picture."""
    found = embed_some(module, batches, POOL)
    languages = list(read_classes(settings.classes, settings.languages).items())
    step = max(1, len(found.pictures) // SHOWN)
    examples, heatmaps = [], []
    for turn, row in enumerate(list(range(0, len(found.pictures), step))[:SHOWN]):
        language, names = languages[turn % len(languages)]
        vectors_KE = class_vectors(module, names, settings.templates)
        label = int(found.others["label"][row])
        logits = module.model.logits(found.embedding[row : row + 1].to(module.device), vectors_KE)[0].cpu()
        best = logits.topk(min(TOP, len(names)))
        order = best.indices.tolist()
        picture = found.pictures[row]
        examples.append(
            ImageExample(
                picture, [names[i] for i in order], best.values.sigmoid().tolist(), [i == label for i in order]
            )
        )
        if isinstance(module.model.vision, VisionTower):
            similarity = patch_similarity(module.model.vision, found.patches[row], vectors_KE[label]).cpu().numpy()
            heatmaps.append(Heatmap(picture, names[label], language, similarity))
    return examples, heatmaps


def patch_similarity(vision: VisionTower, image: Patches, vector_E: Tensor) -> Tensor:
    """Cosine of a text with every patch of one image, float32 [rows, columns].

    Each token goes through the MAP head alone, as if all attention were on it: its value path, output projection and
    MLP, which lands in the space that texts live in.

    Args:
        vision: the vision tower.
        image: patches [1, N, P] of a full grid.
        vector_E: unit-norm text embedding.
    """
    assert image.grid is not None
    tokens = vision(image).tokens[0]  # [N, D]
    alone = vision.pool(tokens[:, None])  # [N, 1, D] -> [N, D]
    return (unit_norm(alone) @ vector_E.float()).reshape(image.grid)
