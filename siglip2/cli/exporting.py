"""`siglip2 export`: a checkpoint, or anybody's weights, as another library or a runtime loads them."""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from siglip2.core.interop import export, onnx, open_clip, torch_export
from siglip2.core.interop.contracts import CONTRACT_FILE
from siglip2.core.interop.detect import read_weights
from siglip2.core.interop.export import TARGETS, Target, Written
from siglip2.core.interop.parity import Parity
from siglip2.core.interop.weights import Weights


@dataclass(frozen=True)
class Runtime:
    """A program that runs graphs.

    Args:
        target: how its files are written and loaded.
        parity: compares them with our towers.
    """

    target: Target
    parity: Callable[[Weights, Path], Parity | None]


RUNTIMES = {
    "onnx": Runtime(
        Target(onnx.write, "onnx", 'image = onnxruntime.InferenceSession("{folder}/image.onnx")'), onnx.parity
    ),
    "torch_export": Runtime(
        Target(torch_export.write, "pytorch", 'image = torch.export.load("{folder}/image.pt2").module()'),
        torch_export.parity,
    ),
}
FORMATS = (*TARGETS, *RUNTIMES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Write the towers for another library or runtime, with tokenizer, contracts and a model card, and compare what "
        "it computes with what was trained. With a local path no network is touched."
    )
    parser.add_argument("weights", help="A checkpoint of ours, or released weights: a folder, a file, a hub id.")
    parser.add_argument("--to", required=True, choices=FORMATS, help="Who is to load them.")
    parser.add_argument("--out", required=True, help="Folder to write; it appears when all of it is there.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export in that folder.")
    parser.add_argument("--no-check", action="store_true", help="Do not load the result to compare it.")


def run(args: argparse.Namespace) -> None:
    """Writes the export and prints the folder, notes, how to load it, and last how near it is.

    Raises:
        ValueError: if the weights cannot be read or written so, or the folder is taken.
    """
    done = export_to(args.weights, args.to, args.out, overwrite=args.overwrite, check=not args.no_check)
    print(f"{done.folder}: {', '.join(done.files)}")
    for note in done.notes:
        print(f"{'warning' if note == open_clip.TIED else 'note'}: {note}")
    print(f"load: {done.load}")
    if done.parity is None:
        print("parity: not compared" + ("" if args.no_check else f", for nothing that loads {args.to} is installed"))
    else:
        print(f"parity: {done.parity}")


def export_to(path: str, format: str, out: str | Path, *, overwrite: bool = False, check: bool = True) -> Written:
    """Writes weights for a library or runtime into a folder, which appears when all of it is there.

    Args:
        path: what `read_weights` reads.
        format: one of `FORMATS`.
        out: folder, not there yet, or empty.
        overwrite: replace an earlier export that lies there.
        check: load the result and compare it with our towers.

    Raises:
        ValueError: if the folder is taken, or by anything but an export; or the weights cannot be read or written so.
    """
    final = Path(out).expanduser().resolve()
    _refuse_taken(final, overwrite=overwrite)
    weights = read_weights(path)  # before anything is made; it may come from the very folder that is replaced
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as beside:
        folder = Path(beside) / final.name
        done = _write(weights, format, folder, check=check)
        _say_final_place(folder, final)
        if final.exists():
            final.rename(Path(beside) / "replaced")
        folder.rename(final)
    load = done.load.replace(str(folder), str(final))
    return replace(done, folder=final, load=load)


def _write(weights: Weights, format: str, folder: Path, *, check: bool) -> Written:
    if format not in RUNTIMES:
        return export.write(weights, format, folder, check=check)
    runtime = RUNTIMES[format]
    return export.write_target(weights, runtime.target, folder, check=runtime.parity if check else None)


def _refuse_taken(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{folder} is taken: give the export a folder of its own, or --overwrite an earlier export")
    if not (folder / CONTRACT_FILE).is_file():
        raise ValueError(f"{folder} holds no earlier export (there is no {CONTRACT_FILE}), so it is not overwritten")


def _say_final_place(folder: Path, final: Path) -> None:
    """Files that name the folder they were written in, such as the card, name the one they will lie in."""
    for path in folder.rglob("*"):
        if path.name == "README.md" or path.name == "open_clip_config.json":
            text, here, there = path.read_text(encoding="utf-8"), str(folder), str(final)
            if path.suffix == ".json":
                here, there = (json.dumps(place, ensure_ascii=False)[1:-1] for place in (here, there))
            path.write_text(text.replace(here, there), encoding="utf-8")
