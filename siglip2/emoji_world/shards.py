"""Scenes as bytes and bytes as WebDataset tar shards; nothing in them depends on the time, the user or the machine."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from PIL import Image

from siglip2.emoji_world.scene import Scene


def describe(scene: Scene, labels: Mapping[str, int]) -> dict:
    """The JSON of a sample.

    Args:
        scene: what was composed.
        labels: class index by emoji id.

    Returns:
        Plain types only; boxes are [xmin, ymin, xmax, ymax] in shares of width and height.
    """
    height, width = scene.instance_mask.shape
    regions = [
        {
            "box": [round(edge, 5) for edge in region.box],
            "captions": {language: region.emoji.names[language] for language in scene.captions},
            "emoji": region.emoji.id,
            "label": labels[region.emoji.id],
            "z": round(region.z, 4),
            "visible": round(region.visible, 4),
        }
        for region in scene.regions
    ]
    record: dict = {"kind": scene.kind, "captions": scene.captions}
    if scene.kind == "single":
        record["label"] = regions[0]["label"]
    return record | {
        "emoji": [region["emoji"] for region in regions],
        "regions": regions,
        "width": width,
        "height": height,
        "relation": scene.relation,
        "attributes": {"background": scene.background},
    }


def encode(scene: Scene, record: dict) -> dict[str, bytes]:
    """Files of one sample by extension: the picture, its description, its instance mask."""
    # full colour resolution: at this size half of it would smear whole emoji
    jpeg = _image_bytes(scene.image, "JPEG", quality=90, subsampling=0)
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return {"jpg": jpeg, "json": text, "mask.png": _image_bytes(scene.instance_mask, "PNG", compress_level=1)}


def write_shards(
    folder: Path, samples: Iterable[tuple[str, dict[str, bytes]]], samples_per_shard: int
) -> Iterator[int]:
    """Write `folder/000000.tar` and so on; yields after each sample the bytes that it takes up in the tar file.

    Args:
        folder: made if there are samples.
        samples: key, which must hold no dot, and files by extension.
        samples_per_shard: samples in each tar file but the last.
    """
    remaining = iter(samples)
    for shard in count():
        first = next(remaining, None)
        if first is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, payload in chain((first,), islice(remaining, samples_per_shard - 1)):
                yield sum(_add(archive, f"{key}.{extension}", data) for extension, data in payload.items())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # time 0 and no user, so that equal samples give equal files
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
    return 512 + -(-len(data) // 512) * 512


def _image_bytes(pixels: np.ndarray, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()
