"""Pictures for the report: what texts find, what pictures find, where in a picture a text is, and what is written."""

# M images, K texts, N patches, D width, E embedding dimension

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siglip2.core.batch import Patches
from siglip2.core.callbacks.referring import Grounder
from siglip2.core.callbacks.zero_shot import class_vectors, read_classes
from siglip2.core.data.datamodule import caption_name, region_names
from siglip2.core.functional import unpatchify
from siglip2.core.model.two_towers import ImageFeatures, unit_norm
from siglip2.core.model.vision import VisionTower
from siglip2.core.report.data import Box, BoxExample, CaptionExample, Heatmap, ImageExample, Picture, RetrievalExample

SHOWN = 8  # examples of each kind
POOL = 256  # images among which texts are searched
POOL_TO_DECODE = 64  # images out of which those to write about are taken
TOP = 5


@dataclass(frozen=True)
class Embedded:
    """Images of an evaluation set.

    Args:
        pictures: M of them, uint8 [H, W, 3]; sizes differ where images keep their aspect ratio.
        patches: of each picture, with a leading dimension of 1.
        embedding: [M, E].
        others: embeddings [M, E] of text views, labels [M], and boxes [M, 4], by view.
        ids: token ids [M, T] of text views, by view.
    """

    pictures: list[Picture]
    patches: list[Patches]
    embedding: Tensor
    others: dict[str, Tensor]
    ids: dict[str, Tensor]


@torch.no_grad()
def embed_some(module: Any, batches: Any, limit: int) -> Embedded:
    """Embeds the first `limit` images of an evaluation set, with its other views."""
    patches: list[Patches] = []
    rows: list[dict[str, Any]] = []
    for index in range(len(batches)):
        if len(patches) >= limit:
            break
        batch = batches[index].to(module.device)
        images: Patches = batch.views["image"]
        ids = {f"ids/{name}": view for name, view in batch.views.items() if _is_text(view)}
        rows.append({**module.embed(batch), **ids, "real": batch.real})
        patches += [images.images(torch.tensor([i], device=module.device)) for i in range(batch.size)]
    kept = torch.cat([r["real"] for r in rows])[:limit].cpu()
    joined = {k: torch.cat([r[k] for r in rows])[:limit].cpu()[kept] for k in rows[0] if k != "real"}
    chosen = [patches[i] for i in kept.nonzero().flatten().tolist()]
    ids = {name.removeprefix("ids/"): joined.pop(name) for name in list(joined) if name.startswith("ids/")}
    return Embedded([picture_of(image) for image in chosen], chosen, joined.pop("image"), joined, ids)


def picture_of(image: Patches) -> Picture:
    """Returns the pixels of one image [1, N, P] without its padding, uint8 [H, W, 3]."""
    return unpatchify(_present(image, image.patches), grid_of(image)).permute(1, 2, 0).cpu().numpy()


def grid_of(image: Patches) -> tuple[int, int]:
    """Returns (rows, columns) of one image [1, N, P], whether all share a grid or each has its own."""
    if image.grid is not None:
        return image.grid
    assert image.sizes is not None
    rows, columns = image.sizes[0, 0].tolist()
    return rows, columns


def _present(image: Patches, values_1N: Tensor) -> Tensor:
    """Returns what values [1, N, ...] say of the patches of one image, its padding left out: [rows * columns, ...]."""
    return values_1N[0] if image.valid is None else values_1N[0, image.valid[0]]


def _is_text(view: Any) -> bool:
    return isinstance(view, Tensor) and view.ndim == 2 and not view.is_floating_point()


def text_examples(module: Any, batches: Any, language: str | None, view: str) -> list[RetrievalExample]:
    """Returns texts of one language with the pictures they find, best first."""
    found = embed_some(module, batches, POOL)
    logits_KM = module.model.logits(found.others[view].to(module.device), found.embedding.to(module.device)).cpu()
    examples = []
    for row in spread(len(logits_KM)):
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
    examples, heatmaps = [], []
    for turn, row in enumerate(spread(len(found.pictures))):
        language, names = languages[turn % len(languages)]
        vectors_KE = class_vectors(module, names, settings.templates, alone=True)
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


@torch.no_grad()
def box_examples(module: Any, grounder: Grounder, batches: Any, languages: Sequence[str | None]) -> list[BoxExample]:
    """Returns texts with their true box and the one that the decoder writes, the languages in turn."""
    found = embed_some(module, batches, POOL_TO_DECODE)
    examples = []
    for row, language, image in decoded_rows(module, found, languages):
        text_view, box_view = region_names(language)
        text = module.tokenizer.decode(found.ids[text_view][row])
        box = grounder.locate(image.tokens, [text], module.tokenizer, language=language or "", valid=image.valid)[0]
        examples.append(
            BoxExample(
                found.pictures[row],
                text,
                language or "",
                predicted=_box(box) if bool((box[:2] < box[2:]).all()) else None,  # NaN is less than nothing
                true=_box(found.others[box_view][row]),
            )
        )
    return examples


@torch.no_grad()
def caption_examples(
    module: Any, grounder: Grounder, batches: Any, languages: Sequence[str | None]
) -> list[CaptionExample]:
    """Returns pictures with the caption that the decoder writes beside a true one, the languages in turn."""
    found = embed_some(module, batches, POOL_TO_DECODE)
    examples = []
    for row, language, image in decoded_rows(module, found, languages):
        (written,) = grounder.caption(image.tokens, module.tokenizer, language=language or "", valid=image.valid)
        truth = module.tokenizer.decode(found.ids[caption_name(language)][row])
        examples.append(CaptionExample(found.pictures[row], written, truth, language or ""))
    return examples


def decoded_rows(
    module: Any, found: Embedded, languages: Sequence[str | None]
) -> Iterator[tuple[int, str | None, ImageFeatures]]:
    """Yields number, language and features (tokens [1, N, D]) of the pictures to write about."""
    for turn, row in enumerate(spread(len(found.pictures))):
        yield row, languages[turn % len(languages)], module.model.encode_image(found.patches[row])


def spread(total: int) -> list[int]:
    """Returns the numbers of the examples shown out of `total`, evenly spaced from the first on."""
    return list(range(0, total, max(1, total // SHOWN)))[:SHOWN]


def _box(values: Tensor) -> Box:
    xmin, ymin, xmax, ymax = values.tolist()
    return xmin, ymin, xmax, ymax


def patch_similarity(vision: VisionTower, image: Patches, vector_E: Tensor) -> Tensor:
    """Cosine of a text with every patch of one image, float32 [rows, columns].

    Each token goes through the MAP head alone, as if all attention were on it: its value path, output projection and
    MLP, which lands in the space that texts live in.

    Args:
        vision: the vision tower.
        image: patches [1, N, P] of one whole picture; padding is left out.
        vector_E: unit-norm text embedding.
    """
    tokens = _present(image, vision(image).tokens)  # [1, N, D] -> [rows * columns, D]
    alone = vision.pool(tokens[:, None])  # [rows * columns, 1, D] -> [rows * columns, D]
    return (unit_norm(alone) @ vector_E.float()).reshape(grid_of(image))
