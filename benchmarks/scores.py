"""Scores one checkpoint of the ablation on held-out pictures, as JSON.

Zero-shot and retrieval as they are; referring by the decoder where there is one; referring and segmentation by probes
on frozen tokens. Run: OMP_NUM_THREADS=1 python benchmarks/scores.py runs/ablation/sigmoid-0/last.ckpt
"""

# M images, N patches, D width, E embedding dimension, K classes, R regions of an image at most, H W pixels

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from probes import NOTHING, Scenes, hit_rate, referring_accuracy, segmentation_miou
from torch import Tensor

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.batch import Patches
from siglip2.core.callbacks.referring import grounder_of
from siglip2.core.callbacks.retrieval import match_ranks
from siglip2.core.callbacks.zero_shot import class_vectors, read_classes
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.fields import Fields, Sample
from siglip2.core.data.source import Source, open_source
from siglip2.core.layout import Layout, Patchifier
from siglip2.core.module import SigLIP2Module
from siglip2.core.views import IMAGE

FIELDS = Fields(caption="json.captions", extra={"kind": "json.kind", "mask": "mask.png"})
LANGUAGE = "en"
MOST = 5  # regions of a scene of the emoji world
BATCH = 100
TRAIN_SCENES = 3000  # that probes are trained on


@dataclass(frozen=True)
class Embedded:
    """A split as a trained model sees it.

    Args:
        embedding_ME: of the pictures.
        captions: of each picture, in English.
        scenes: tokens, regions and masks.
    """

    embedding_ME: Tensor
    captions: list[str]
    scenes: Scenes


def load(checkpoint: str) -> SigLIP2Module:
    """Returns the trained module of a checkpoint, with its plugins, in evaluation mode."""
    module: SigLIP2Module = SigLIP2CLI(["--ckpt_path", checkpoint], command="validate").model
    stored = read_checkpoint(checkpoint)
    module.on_load_checkpoint(stored)
    module.load_state_dict(stored["state_dict"])
    return module.eval()


def of_kind(source: Source, kind: str) -> Iterator[Sample]:
    """Yields the samples of a source that are `single` or `scene`, in order."""
    samples = (source.read(number) for number in range(len(source)))
    return (sample for sample in samples if sample.get("kind") == kind)


@torch.no_grad()
def embed(module: Any, samples: Iterator[Sample]) -> Embedded:
    """Encodes pictures, with what is stored of their regions and masks."""
    parts = []
    while chunk := list(islice(samples, BATCH)):
        seen = module.model.encode_image(stacked(chunk, module.patchifier))
        truth = [regions(sample) for sample in chunk]
        labels, boxes = (torch.stack([t[i] for t in truth]) for i in range(2))
        masks = torch.stack([class_mask(s, module.patchifier.image_size) for s in chunk])
        parts.append((seen.embedding, seen.tokens, labels, boxes, masks, [s.captions()[LANGUAGE][0] for s in chunk]))
    *tensors, captions = zip(*parts, strict=True)
    embedding, *rest = (torch.cat(t) for t in tensors)
    return Embedded(embedding, [text for texts in captions for text in texts], Scenes(*rest))


def stacked(samples: Sequence[Sample], patchifier: Patchifier) -> Patches:
    """Returns the pictures as one batch of patches."""
    layout = Layout(patchifier.layout(0).seq_len, 1)
    made = [patchifier(sample.image(), IMAGE, layout) for sample in samples]
    return Patches(torch.cat([p.patches for p in made]), made[0].coords, None, made[0].grid)


def regions(sample: Sample) -> tuple[Tensor, Tensor]:
    """Returns classes [R] and boxes [R, 4] of a sample, filled up to `MOST`."""
    stored = sample.get("regions")
    labels = torch.tensor([region["label"] for region in stored])
    boxes = torch.tensor([region["box"] for region in stored])
    missing = MOST - len(stored)
    return F.pad(labels, (0, missing), value=NOTHING), F.pad(boxes, (0, 0, 0, missing))


def class_mask(sample: Sample, side: int) -> Tensor:
    """Returns the class of each pixel + 1, 0 for background, uint8 [side, side]; squashed as the picture is."""
    stored = Image.open(io.BytesIO(sample.get("mask"))).resize((side, side), Image.Resampling.NEAREST)
    class_of = [0, *(region["label"] + 1 for region in sample.get("regions"))]
    return torch.tensor(class_of, dtype=torch.uint8)[torch.from_numpy(np.array(stored)).long()]


def zero_shot_hits(z_image_ME: Tensor, vectors_KE: Tensor, labels_MR: Tensor) -> float:
    """Returns the share of pictures whose best class is one of those that are in it."""
    best_M = (z_image_ME @ vectors_KE.T).argmax(1)
    return float((best_M[:, None] == labels_MR).any(1).float().mean())


def recall_at_1(z_image_ME: Tensor, z_text_ME: Tensor) -> dict[str, float]:
    """Returns R@1 in both directions and their mean; equal scores count as misses."""
    found = {
        "text_to_image": match_ranks(z_text_ME, z_image_ME),
        "image_to_text": match_ranks(z_image_ME, z_text_ME),
    }
    recalls = {way: float((ranks <= 1).float().mean()) for way, ranks in found.items()}
    return {**recalls, "retrieval": sum(recalls.values()) / 2}


@torch.no_grad()
def decoder_accuracy(module: Any, scenes: Scenes, names: Sequence[str]) -> float | None:
    """Returns the share of regions that the module's own decoder finds by name; None if it has no decoder."""
    grounder = grounder_of(module)
    if grounder is None:
        return None
    image_Q, region_Q = (scenes.labels_MR != NOTHING).nonzero(as_tuple=True)
    found = []
    for picture, region in zip(image_Q.split(BATCH), region_Q.split(BATCH), strict=True):
        texts = [names[label] for label in scenes.labels_MR[picture, region].tolist()]
        found.append(grounder.locate(scenes.tokens_MND[picture], texts, module.tokenizer, language=LANGUAGE))
    return hit_rate(torch.cat(found), scenes.boxes_MR4[image_Q, region_Q])


def chance(train_on: Scenes, test_on: Scenes, num_classes: int) -> dict[str, float]:
    """Returns what is scored without looking: a class at random, the typical box everywhere, background everywhere."""
    typical_4 = train_on.boxes_MR4[train_on.labels_MR != NOTHING].median(0).values
    boxes_Q4 = test_on.boxes_MR4[test_on.labels_MR != NOTHING]
    unseeing = hit_rate(typical_4.expand_as(boxes_Q4), boxes_Q4)
    background = (test_on.masks_MHW == 0).float().mean()
    return {
        "zero_shot_single": 1 / num_classes,
        "zero_shot_scene": float((test_on.labels_MR != NOTHING).float().sum(1).mean()) / num_classes,
        "retrieval": 1 / len(test_on.labels_MR),
        **dict.fromkeys(("referring_probe", "referring_placed", "referring_decoder"), unseeing),
        "segmentation": float(background) / (1 + int(test_on.masks_MHW.unique().count_nonzero())),
    }


def score(checkpoint: str, world: Path, *, seed: int) -> dict[str, dict[str, float]]:
    """Returns the scores of a checkpoint, and those of chance, as shares in [0, 1].

    Args:
        checkpoint: written by `siglip2 fit`.
        world: folder of the emoji world.
        seed: of the probes.
    """
    module = load(checkpoint)
    names = read_classes(str(world / "classes.json"), [LANGUAGE])[LANGUAGE]
    train, scenes, singles = (open_source(str(world / s), fields=FIELDS) for s in ("train", "val-scene", "val-single"))
    seen = embed(module, islice(of_kind(train, "scene"), TRAIN_SCENES)).scenes
    held_out, alone = embed(module, of_kind(scenes, "scene")), embed(module, of_kind(singles, "single"))
    with torch.no_grad():
        vectors_KE = class_vectors(module, names, ["{}"])
        z_text_ME = module.model.encode_text(module.tokenizer.encode(held_out.captions)).embedding
    found = {
        "zero_shot_single": zero_shot_hits(alone.embedding_ME, vectors_KE, alone.scenes.labels_MR),
        "zero_shot_scene": zero_shot_hits(held_out.embedding_ME, vectors_KE, held_out.scenes.labels_MR),
        **recall_at_1(held_out.embedding_ME, z_text_ME),
        "referring_probe": referring_accuracy(seen, held_out.scenes, len(names), seed=seed),
        "referring_placed": referring_accuracy(seen, held_out.scenes, len(names), seed=seed, placed=True),
        "segmentation": segmentation_miou(seen, held_out.scenes, len(names), module.patchifier.grid, seed=seed),
    }
    decoded = decoder_accuracy(module, held_out.scenes, names)
    if decoded is not None:
        found["referring_decoder"] = decoded
    return {"scores": found, "chance": chance(seen, held_out.scenes, len(names))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--world", type=Path, default=Path("runs/ablation/world"))
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file to write")
    args = parser.parse_args()
    found = json.dumps(score(args.checkpoint, args.world, seed=args.seed), indent=1)
    print(found)
    if args.out:
        args.out.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
