"""Weights from a path or a hub id, of whatever format is there."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.hub import download, is_hub_id
from siglip2.core.data.text import Tokenizer
from siglip2.core.interop import big_vision, huggingface, open_clip, timm_trunk
from siglip2.core.interop.contracts import CONTRACT_FILE
from siglip2.core.interop.files import read_json, read_npz, read_pickle, read_safetensors, state_dict_in
from siglip2.core.interop.published import nearest_to
from siglip2.core.interop.weights import Weights, assemble
from siglip2.core.model.sizes import ShapeOptions, size_named

OURS = ".ckpt"
FOREIGN = (".npz", ".safetensors", ".bin", ".pt", ".pth", ".json")
SMALL, LARGE = ["*.json", "*.safetensors", "*.model"], ["*.bin", "*.npz"]
MALFORMED = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError)
READABLE = (
    "a checkpoint of ours, a folder or hub id of transformers (SiglipModel, Siglip2Model) or open_clip, a trunk of "
    "timm, or an npz file of big_vision"
)


def is_foreign(path: str) -> bool:
    """Says whether a path or hub id is not one of our checkpoints: a folder, another program's file, a hub id."""
    place = Path(path).expanduser()
    if "://" in path:
        return False
    return place.is_dir() or place.suffix in FOREIGN or is_hub_id(path)


def read_weights(path_or_id: str) -> Weights:
    """Returns the weights at a path or hub id, with their contracts. A local path touches no network.

    Args:
        path_or_id: a `.ckpt` of ours (also an fsspec URL); a folder or hub id with a `config.json` of transformers, an
            `open_clip_config.json` or a `config.json` of timm; a state dict or training checkpoint of open_clip or
            timm; an `.npz` of big_vision.

    Raises:
        FileNotFoundError: if there is nothing at a local path.
        ValueError: if it is damaged, incomplete, of another architecture, or a pickle that holds more than tensors and
            plain values, which is never executed; or the hub cannot be read.
    """
    if is_hub_id(path_or_id):
        return read_folder(from_hub(path_or_id))
    place = Path(path_or_id.removeprefix("local-dir:")).expanduser()
    if "://" in path_or_id or place.suffix == OURS:
        return of_checkpoint(read_checkpoint(path_or_id), path_or_id)
    if place.is_dir():
        return read_folder(place)
    if not place.is_file():
        raise FileNotFoundError(f"there is nothing at {path_or_id}: expected {READABLE}")
    return read_file(place)


def from_hub(name: str) -> Path:
    """Returns the folder into which a repository of the Hugging Face hub was downloaded, or lay before.

    Raises:
        ValueError: if the hub cannot be reached, or has no such repository.
    """
    folder = download(name, SMALL)
    return folder if any(folder.glob("*.safetensors")) else download(name, SMALL + LARGE)


def read_folder(folder: Path) -> Weights:
    """Returns the weights in a folder of any library.

    Raises:
        ValueError: if it holds none, or they cannot be read.
    """
    with _understanding(folder):
        return _read_folder(folder)


def read_file(path: Path) -> Weights:
    """Returns the weights in a file of any library.

    Raises:
        ValueError: if it is damaged, or of another architecture.
    """
    with _understanding(path):
        return _read_file(path)


@contextlib.contextmanager
def _understanding(place: Path) -> Iterator[None]:
    """Turns what a value of the wrong kind in a configuration raises, wherever it is read, into one ValueError."""
    unclear = f"{place}: its configuration cannot be understood"
    try:
        yield
    except MALFORMED as error:
        raise ValueError(f"{unclear} ({type(error).__name__}: {error})") from error
    except ValueError as error:  # ours name the place, or the folder that it lies in
        if str(place) in str(error) or (place.is_file() and str(place.parent) in str(error)):
            raise
        raise ValueError(f"{unclear} ({error})") from error


def _read_folder(folder: Path) -> Weights:
    if (folder / open_clip.CONFIG_FILE).is_file():
        return open_clip.read_folder(folder)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if "architecture" not in config:
            return huggingface.read(folder)
        file = folder / timm_trunk.MODEL_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has a config.json of timm but no {file.name}")
        return timm_trunk.read(folder, read_safetensors(file), str(folder))
    arrays = sorted(folder.glob("*.npz"))
    if len(arrays) == 1:
        return _read_file(arrays[0])
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise ValueError(f"{folder} holds no weights that can be read (it holds {found}): expected {READABLE}")


def _read_file(path: Path) -> Weights:
    beside = path.parent
    if path.suffix == ".npz":
        return big_vision.read(read_npz(path), str(path), beside if (beside / CONTRACT_FILE).is_file() else None)
    if path.name.endswith(".index.json"):
        return _read_folder(beside)
    content: Mapping[str, Any] = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if "siglip2" in content:
        return of_checkpoint(content, str(path))
    tensors = state_dict_in(content)
    if open_clip.holds(tensors):
        described = beside / open_clip.CONFIG_FILE
        config = read_json(described) if described.is_file() else None
        return open_clip.read(tensors, str(path), folder=beside if config else None, config=config)
    if any(n.startswith(("vision_model.", "text_model.")) for n in tensors):
        if not (beside / "config.json").is_file():
            raise ValueError(f"{path} is of transformers, whose config.json is not beside it: give the whole folder")
        return huggingface.read(beside)
    if any(n.startswith(("patch_embed.", "embeds.", "blocks.")) for n in tensors):
        described = beside / "config.json"
        ours = described.is_file() and "architecture" in read_json(described)
        return timm_trunk.read(beside if ours else None, tensors, str(path))
    first = ", ".join(list(tensors)[:4]) or "no tensors"
    raise ValueError(f"{path} holds another architecture ({first}, ...): expected {READABLE}. {nearest_to(tensors)}")


def of_checkpoint(checkpoint: Mapping[str, Any], place: str) -> Weights:
    """Returns the product of one of our checkpoints, without plugins and optimizer.

    Raises:
        ValueError: if its vision tower is one of timm's, or it does not carry its recipe.
    """
    ours = checkpoint["siglip2"]
    model = (ours.get("recipe") or {}).get("model")
    if model is None:
        raise ValueError(f"{place} does not carry its recipe, so nothing says how many attention heads it has")
    if model.get("timm"):
        raise ValueError(
            f"{place} has a vision tower of timm's own ({model['timm']}), and only SigLIP towers can be exported or "
            f"doctored. siglip2.load, predict and embed take it as it is; for other programs it is "
            f"timm.create_model('{model['timm']}', num_classes=0) with the tensors under model.vision.trunk, and with "
            f"the img_size of the run"
        )
    size, pixels = size_named(model["size"]), ours["pixels"]
    vision = ShapeOptions(**(model.get("vision") or {})).applied_to(size.vision)
    text = ShapeOptions(**(model.get("text") or {})).applied_to(size.text)
    state = {n.removeprefix("model."): t for n, t in checkpoint["state_dict"].items() if n.startswith("model.")}
    scaffolding = sorted({n.split(".")[1] for n in checkpoint["state_dict"] if n.startswith("plugins.")})
    notes = (f"plugins were left out ({', '.join(scaffolding)})",) if scaffolding else ()
    return assemble(
        "siglip2",
        state,
        place=place,
        heads={"vision": vision.num_heads, "text": text.num_heads},
        native="table" in pixels,
        gelus={"vision": vision.gelu, "text": text.gelu},
        pixels=pixels,
        tokenizer=Tokenizer.from_state(ours["text"]),
        notes=notes,
    )
