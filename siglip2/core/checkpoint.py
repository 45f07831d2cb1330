"""What a checkpoint must share with a recipe, and what may differ.

`model.*` is the product and must match. `plugins.<name>.*` is scaffolding: what a recipe has beyond the file starts
fresh, what the file has beyond the recipe is dropped, both are reported by name.
"""

import contextlib
import logging
import os
import pickle
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

log = logging.getLogger(__name__)
NEVER_EXECUTED = "and nothing but tensors and plain values is ever loaded: what else a file holds could run any code"
ABANDONED_S = 3600.0  # a half-written file that nobody has written to for so long was left by a killed run


def reconcile(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with the names of `current`: the product from `saved`, plugins as far as they are there.

    Raises:
        ValueError: if `model.*` differs in names or shapes; the first differences are listed.
    """
    differences = _differences(_product(saved), _product(current))
    if differences:
        more = f"\n  ... and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise ValueError(
            "the checkpoint holds another model than this recipe builds:\n  "
            + "\n  ".join(differences[:6])
            + more
            + "\nUse the recipe it was trained with (it is stored in the file), "
            + "or set model.size and the patchifier to match."
        )
    fresh = fresh_plugins(saved, current)
    for name in sorted(fresh):
        log.warning("plugin '%s' is not in the checkpoint as this recipe builds it: it starts fresh", name)
    for name, part in _dropped({n for n in saved if _plugin_of(n) not in fresh}, set(current)):
        if part:
            log.warning("plugin '%s' goes on without its part '%s', which only the checkpoint has", name, part)
        else:
            log.warning("plugin '%s' is in the checkpoint but not in this recipe: it is dropped", name)
    return {n: t if _plugin_of(n) in fresh else saved[n] for n, t in current.items()}


def reopen(loops: dict[str, Any]) -> None:
    """Lets a run that had come to its end go on, in place; Lightning would take its one epoch for over.

    Args:
        loops: state of Lightning's loops, as a checkpoint of a fit holds it.
    """
    fit = loops["fit_loop"]
    fit["epoch_progress"]["current"].update(processed=0, completed=0)
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False


def fresh_plugins(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> set[str]:
    """Returns the plugins that start fresh: `saved` lacks one of their tensors, or has it in another shape."""
    return {_plugin_of(n) for n, t in current.items() if n not in saved or saved[n].shape != t.shape} - {""}


def _dropped(saved: set[str], current: set[str]) -> list[tuple[str, str]]:
    """What only `saved` has, as (plugin, the outermost part of it that is gone), with "" for a whole plugin."""
    kept = {".".join(words[:i]) for words in (n.split(".") for n in current) for i in range(2, len(words) + 1)}
    gone = set()
    for words in (n.split(".") for n in saved if _plugin_of(n) and n not in current):
        length = next(i for i in range(2, len(words) + 1) if ".".join(words[:i]) not in kept)
        gone.add((words[1], ".".join(words[2:length])))
    return sorted(gone)


def _product(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n.startswith("model.")}


def _plugin_of(name: str) -> str:
    """The plugin that a tensor belongs to; "" for those of the product."""
    head, _, rest = name.partition(".")
    return rest.split(".")[0] if head == "plugins" else ""


def _differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    lines = []
    for name in [*current, *(n for n in saved if n not in current)]:
        a, b = saved.get(name), current.get(name)
        if a is None or b is None or a.shape != b.shape:
            found = "absent" if a is None else f"{list(a.shape)}"
            expected = "absent" if b is None else f"{list(b.shape)}"
            lines.append(f"{name}: found {found}, expected {expected}")
    return lines


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads one of our checkpoint files, at a local path or fsspec URL, onto the CPU, with `weights_only`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not a checkpoint of this project.
    """
    local = _local(path)
    try:
        if local is not None:
            checkpoint: dict[str, Any] = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
        else:
            with fsspec.open(path, "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}: give the .ckpt file that `siglip2 fit` wrote") from None
    except Exception as error:
        if name := refused_class(error):
            raise ValueError(f"{path} is refused: it is a pickle that holds {name}, {NEVER_EXECUTED}") from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason_of(error)}): it may be cut short; try an earlier one"
        ) from error
    if "siglip2" not in checkpoint:
        raise ValueError(f"{path} was not written by siglip2 (it holds {', '.join(map(str, list(checkpoint)[:5]))})")
    return checkpoint


def refused_class(error: Exception) -> str | None:
    """Returns the class or function for which torch refused a pickle, None if an error says of none."""
    found = re.search(r"\bGLOBAL (\S+)|`add_safe_globals`,? but got (?:<class ')?([\w.]+)", str(error))
    return found[1] or found[2] if found else None


def reason_of(error: Exception) -> str:
    """Returns the first line of an error of `torch.load`, without torch's advice to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        said = str(error).partition("WeightsUnpickler error:")[2]
        return next(iter(said.split("\n\nCheck the")[0].strip().splitlines()), "no pickle of tensors and plain values")
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def newest_checkpoint(folders: Iterable[str]) -> str | None:
    """Returns the checkpoint that was written last and is whole, None if there is none.

    Local files are opened to see that they are whole. Folders (sharded checkpoints) and objects behind a URL get their
    name only when they are.

    Args:
        folders: local paths or fsspec URLs; those that do not exist hold nothing.
    """
    found = {path: when for folder in folders for path, when in _checkpoints_in(folder).items()}
    for path in sorted(found, key=lambda p: found[p], reverse=True):
        if _local(path) is None or Path(path).is_dir():
            return path
        try:
            read_checkpoint(path)
        except ValueError as error:
            log.warning("passed over a checkpoint: %s", error)
        else:
            return path
    return None


def _checkpoints_in(folder: str) -> dict[str, Any]:
    """Path or URL of each checkpoint in a folder, and when it was written."""
    system, place = fsspec.core.url_to_fs(folder)
    if not system.isdir(place):
        return {}
    names = [
        n for n in system.ls(place, detail=False) if n.endswith(".ckpt") and not n.rpartition("/")[2].startswith(".")
    ]
    return {n if _local(folder) is not None else system.unstrip_protocol(n): system.modified(n) for n in names}


def _local(path: str) -> str | None:
    """A path without `file://`; None for any other URL."""
    path = path.removeprefix("file://")
    return None if "://" in path else path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a file under its final name is always whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves `checkpoint` to `path`; local paths are written atomically, URLs as Lightning does, in one piece.

        Raises:
            OSError: if it cannot be written, saying what is lost (nothing saved before) and what to do.
        """
        local = _local(str(path))
        try:
            if local is None:
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                _write_atomically(checkpoint, Path(local))
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise OSError(_not_written(str(path), checkpoint, error)) from error


def _write_atomically(checkpoint: Mapping[str, Any], final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    for other in final.parent.glob(f".{final.name}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > ABANDONED_S:
                other.unlink()
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _not_written(path: str, checkpoint: Mapping[str, Any], error: Exception) -> str:
    kept = newest_checkpoint([path.rpartition("/")[0] or "."])
    resume = f"the last whole one is {kept}; resume with --ckpt_path {kept}" if kept else "there is no earlier one"
    return (
        f"the checkpoint of step {checkpoint.get('global_step', '?')} could not be written to {path}: "
        f"{str(error).splitlines()[0]}. Earlier checkpoints are untouched: {resume}. Free space there, or set "
        f"trainer.default_root_dir to another place"
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], of_a: str, of_b: str) -> list[str]:
    """Returns a line for each key under which two mappings of plain values differ, with the words for each."""
    keys = [*a, *(k for k in b if k not in a)]
    return [f"{k}: {of_a} {a.get(k)}, {of_b} {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
