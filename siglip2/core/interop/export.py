"""Weights written for another library: its files, our contracts beside them, a comparison, and a model card."""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from siglip2.core.interop import big_vision, huggingface, open_clip, timm_trunk
from siglip2.core.interop.contracts import write_contract
from siglip2.core.interop.parity import CHECKS, Parity
from siglip2.core.interop.published import known_trunk
from siglip2.core.interop.weights import Weights
from siglip2.core.model.sizes import Shape


@dataclass(frozen=True)
class Target:
    """A format that weights are written in.

    Args:
        write: writes the files into a folder and returns notes.
        library: as model cards name it.
        load: Python that loads a folder, with `{folder}`.
        task: the hub's word for what the model is for.
    """

    write: Callable[[Weights, Path], list[str]]
    library: str
    load: str
    task: str = "zero-shot-image-classification"


TARGETS = {
    "hf": Target(
        huggingface.write,
        "transformers",
        'model, processor = AutoModel.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")',
    ),
    "open_clip": Target(
        open_clip.write,
        "open_clip",
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")',
    ),
    "timm": Target(
        timm_trunk.write,
        "timm",
        'model = timm.create_model("local-dir:{folder}", pretrained=True)',
        "image-feature-extraction",
    ),
    "big_vision": Target(big_vision.write, "big_vision", 'params = numpy.load("{folder}/model.npz")'),
}


@dataclass(frozen=True)
class Written:
    """What an export left behind.

    Args:
        folder: that was written.
        files: in it, by name.
        parity: with the library it was written for; None where that could not be asked.
        notes: what the library does otherwise, or was left out.
        load: Python that loads the folder.
    """

    folder: Path
    files: tuple[str, ...]
    parity: Parity | None
    notes: tuple[str, ...]
    load: str


def write(weights: Weights, format: str, out: str | Path, *, check: bool = True) -> Written:
    """Writes weights as another library stores them. No network is touched.

    Args:
        weights: of any origin.
        format: hf, open_clip, timm or big_vision.
        out: folder to write, made if it does not exist.
        check: load the result with the library, if it is installed, and compare embeddings and logits with ours.

    Raises:
        ValueError: if there is no such format, the folder is not empty, or the library has no such model.
    """
    if format not in TARGETS:
        close = difflib.get_close_matches(format, TARGETS, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"no format called '{format}', {hint}expected one of {', '.join(TARGETS)}")
    return write_target(weights, TARGETS[format], out, check=CHECKS[format] if check else None)


def write_target(
    weights: Weights, target: Target, out: str | Path, *, check: Callable[[Weights, Path], Parity | None] | None
) -> Written:
    """Writes weights as a target has them, our contracts and a model card.

    Args:
        weights: of any origin.
        target: how its files are written and loaded.
        out: folder to write, made if it does not exist.
        check: compares what was written with our towers; None does not.

    Raises:
        ValueError: if the folder is not empty, or the target has no such model.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give one of its own to each export")
    folder.mkdir(parents=True, exist_ok=True)
    notes = [*weights.notes, *target.write(weights, folder)]
    write_contract(folder, weights)
    parity = check(weights, folder) if check else None
    load = target.load.format(folder=folder)
    (folder / "README.md").write_text(card(weights, target, parity, notes, load), encoding="utf-8")
    files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    return Written(folder, files, parity, tuple(notes), load)


def card(weights: Weights, target: Target, parity: Parity | None, notes: list[str], load: str) -> str:
    """Returns the model card: what it is, how to load it, how near it is to what was trained, and both contracts."""
    vision, text = weights.vision, weights.text
    known = known_trunk(vision, patch_size=weights.patch_size, grid=weights.grid, native=weights.native)
    rows = {
        "vision tower": _said(vision),
        "patches": f"{weights.patch_size} px, position table {weights.grid[0]} x {weights.grid[1]}",
        "pictures": "keep their aspect ratio (NaFlex)" if weights.native else f"squares of {weights.image_size} px",
    }
    if text is not None:
        rows["text tower"] = _said(text)
        rows["texts"] = f"{weights.context_length} ids of {weights.vocab_size}"
    contract = weights.tokenizer.contract.to_dict() if weights.tokenizer else None
    checked = (
        f"Largest differences from the trained towers on random inputs, float32: {parity}."
        if parity
        else ("The files were not compared with another library's model.")
    )
    lines = [
        "---",
        f"library_name: {target.library}",
        f"pipeline_tag: {target.task}",
        "license: other  # choose one before you publish",
        "tags: [siglip2]",
        "---",
        "",
        "# Image-text encoder trained by the SigLIP 2 recipe",
        "",
        "```python",
        load,
        "```",
        "",
        "| part | shape |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        *([f"The vision tower has the shape of {known.huggingface}.", ""] if known else []),
        "## Parity",
        "",
        checked,
        *(f"\n- {note}" for note in notes),
        "",
        "## Contracts",
        "",
        "What the weights were trained on. Texts:",
        "",
        _json(contract),
        "",
        "Pixels:",
        "",
        _json(weights.pixels),
        "",
    ]
    return "\n".join(lines)


def _said(shape: Shape) -> str:
    gelu = "exact GELU" if shape.gelu == "exact" else "tanh approximation of the GELU"
    return f"width {shape.width}, depth {shape.depth}, MLP {shape.mlp_dim}, heads {shape.num_heads}, {gelu}"


def _json(values: object) -> str:
    return f"```json\n{json.dumps(values, indent=1, ensure_ascii=False)}\n```"
