"""Tensors in files of other programs: safetensors, torch's own, npz. Nothing that a file holds is ever executed."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip2.core.checkpoint import NEVER_EXECUTED, reason_of, refused_class

CUT_SHORT = "it may be half-written or damaged; copy or download it again"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file.

    Raises:
        ValueError: if it is not JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {CUT_SHORT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON, for people to read as well."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): {CUT_SHORT}") from error


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Returns the tensors that a `*.index.json` says are spread over several files.

    Raises:
        ValueError: if a file or a tensor of it is missing.
    """
    places: dict[str, str] = read_json(index).get("weight_map", {})
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        part = index.parent / Path(name).name  # a name with folders in it would lead out of the checkpoint
        if not part.is_file():
            raise ValueError(f"{index} names {name}, which is not beside it: the download is not complete")
        tensors |= read_safetensors(part) if part.suffix == ".safetensors" else read_pickle(part)
    if missing := sorted(set(places) - set(tensors)):
        raise ValueError(f"{index} names {len(missing)} tensors that are in none of its files ({missing[0]}, ...)")
    return tensors


def read_pickle(path: Path) -> dict[str, Any]:
    """Returns what `torch.save` wrote, tensors and plain values only.

    Raises:
        ValueError: if it holds anything else (code, objects of classes), which is refused unread; or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch finds some pickles unusual before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = refused_class(error) or f"something else than tensors ({reason_of(error)})"
        raise ValueError(
            f"{path} is refused: it is a pickle that holds {held}, {NEVER_EXECUTED}. Have its owner save the state "
            "dict as safetensors"
        ) from error
    except Exception as error:  # zipfile, RuntimeError or EOFError, as torch's reader happens to stumble
        raise ValueError(f"{path} cannot be read as a torch file ({reason_of(error)}): {CUT_SHORT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def state_dict_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a file of torch: the `state_dict` of a training checkpoint, or all, without `module.`."""
    inner = content.get("state_dict", content.get("model", content))
    named = inner if isinstance(inner, Mapping) else content
    tensors = {str(n): t for n, t in named.items() if isinstance(t, Tensor)}
    return {n.removeprefix("module."): t for n, t in tensors.items()}


def read_npz(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of an npz file as tensors.

    Raises:
        ValueError: if it is damaged, or holds Python objects, which are refused.
    """
    try:
        with path.open("rb") as file:  # which numpy would leave open if it is no archive
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, AttributeError) as error:  # the last: a bare .npy
        refused = "allow_pickle" in str(error) or "pickled" in str(error)
        what = "it holds Python objects, which are never executed" if refused else CUT_SHORT
        raise ValueError(f"{path} cannot be read as npz ({error}): {what}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" and not _is_bfloat16(array):
            raise ValueError(f"{path}: the array '{name}' has the type {array.dtype}, expected numbers")
    return {name: _tensor(array) for name, array in arrays.items()}


def _is_bfloat16(array: Any) -> bool:
    return bool(array.dtype.kind == "V" and array.dtype.itemsize == 2)  # JAX saves it so


def _tensor(array: Any) -> Tensor:
    if _is_bfloat16(array):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as PyTorch's; transformers refuses files that do not say so."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as an npz file; bfloat16, which numpy does not know, becomes float32 of the same value."""
    arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
