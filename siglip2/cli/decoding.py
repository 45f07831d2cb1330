"""`siglip2 caption | locate | describe`: what a trained decoder writes about pictures."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from siglip2.cli.from_checkpoint import with_checkpoint
from siglip2.cli.predicting import run_on_pictures
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.batch import Batch
from siglip2.core.callbacks.referring import Grounder, grounder_of, run_precision
from siglip2.core.data.image_io import decode_image
from siglip2.core.data.text import Tokenizer
from siglip2.core.report.data import Box

Question = Callable[[Grounder, Tensor, Tokenizer, dict[str, Any]], Any]
OPTIONS = {  # what each command must be given: its help, and an example
    "images": ("Pictures: files, globs, folders.", "a.png"),
    "texts": ("Texts to find in every picture.", "'red car'"),
    "boxes": ("Boxes to describe: xmin,ymin,xmax,ymax, shares of width and height in [0, 1].", "0.1,0.2,0.5,0.6"),
}
NEEDED = {"caption": ["images"], "locate": ["images", "texts"], "describe": ["images", "boxes"]}


class DecodingCLI(SigLIP2CLI):
    """A recipe out of a checkpoint, with the pictures to write about and what is asked of each.

    Args:
        arguments: what follows the subcommand.
        command: caption, locate or describe.

    Raises:
        ValueError: if pictures, texts or boxes are missing, or the checkpoint has no decoder.
    """

    def __init__(self, arguments: Sequence[str], *, command: str):
        super().__init__(with_checkpoint(arguments, command), command=command)
        needed = NEEDED[command]
        if not all(self.config[option] for option in needed):
            usage = " ".join(f"--{option} {OPTIONS[option][1]}" for option in needed)
            raise ValueError(f"{command} needs {' and '.join(needed)}: siglip2 {command} --ckpt_path CKPT {usage}")
        if not any(isinstance(plugin, Grounder) for plugin in self.model.plugins.values()):
            raise ValueError(
                f"this checkpoint has no plugin that can caption or locate (its plugins: "
                f"{', '.join(self.model.plugins)}): train with `locca`"
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds to what every command takes the pictures, and what is asked of them."""
        super().add_arguments_to_parser(parser)
        for option in NEEDED[self.command]:
            parser.add_argument(f"--{option}", nargs="+", help=OPTIONS[option][0])
        parser.add_argument("--language", default="", help="Code of the language of the texts, such as en.")
        parser.add_argument("--json", action="store_true", help="Print one JSON object per picture.")

    def ask(self, question: Question, repeats: int = 1) -> Iterator[tuple[str, Any]]:
        """Yields the path of each picture and what `question` returns for it.

        Args:
            question: called with the grounder, image tokens [repeats, N, D], the tokenizer, and the keywords `language`
                and `valid` that every method of a grounder takes.
            repeats: how often each picture is asked about.
        """
        asking = Asking(question, self.config.language, repeats)
        self.trainer.callbacks.append(asking)  # type: ignore[attr-defined]
        paths, _ = run_on_pictures(self, self.config.images, quiet=self.config.json)
        yield from zip(paths, asking.answers, strict=True)


class Asking(Callback):
    """Asks the decoder about each picture that the prediction loop sends through the model.

    Args:
        question: see `DecodingCLI.ask`.
        language: code of the language of the texts, or empty.
        repeats: how often each picture is asked about.
    """

    def __init__(self, question: Question, language: str, repeats: int):
        self.question, self.language, self.repeats = question, language, repeats
        self.answers: list[Any] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        grounder = grounder_of(pl_module)
        if grounder is None:
            raise ValueError(
                "the decoder in this checkpoint had not been awake yet, so it is untrained: take a later one"
            )
        self.grounder = grounder

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        with torch.no_grad(), run_precision(pl_module):
            image = pl_module.model.encode_image(batch.views["image"])
            tokens_BND = repeat(image.tokens, self.repeats)
            valid = None if image.valid is None else repeat(image.valid, self.repeats)
            more = {"language": self.language, "valid": valid}
            self.answers.append(self.question(self.grounder, tokens_BND, pl_module.tokenizer, more))


def repeat(rows: Tensor, repeats: int) -> Tensor:
    """Returns the one row of a tensor `repeats` times, without a copy."""
    return rows.expand(repeats, *rows.shape[1:])


def caption(arguments: Sequence[str]) -> None:
    """Prints a caption of every picture."""
    cli = DecodingCLI(arguments, command="caption")

    def question(grounder: Grounder, tokens_BND: Tensor, tokenizer: Tokenizer, more: dict[str, Any]) -> list[str]:
        return grounder.caption(tokens_BND, tokenizer, **more)

    for path, (text,) in cli.ask(question):
        if cli.config.json:
            print_json(path, caption=text)
        else:
            print(f"{path}: {text}")


def locate(arguments: Sequence[str]) -> None:
    """Prints the box of every text in every picture, in shares and in pixels."""
    cli = DecodingCLI(arguments, command="locate")
    texts: list[str] = cli.config.texts

    def question(grounder: Grounder, tokens_BND: Tensor, tokenizer: Tokenizer, more: dict[str, Any]) -> Tensor:
        return grounder.locate(tokens_BND, texts, tokenizer, **more).float().cpu()

    for path, boxes_B4 in cli.ask(question, len(texts)):
        boxes = [
            [round(side, 4) for side in box] if all(map(math.isfinite, box)) else None for box in boxes_B4.tolist()
        ]
        pixels = [box and in_pixels(box, path) for box in boxes]
        if cli.config.json:
            rows = zip(texts, boxes, pixels, strict=True)
            print_json(path, texts=[{"text": text, "box": box, "pixels": pixel} for text, box, pixel in rows])
            continue
        shares = ["no readable box" if box is None else " ".join(f"{side:.3f}" for side in box) for box in boxes]
        places = ["" if pixel is None else " ".join(map(str, pixel)) for pixel in pixels]
        print_table(path, {"text": texts, "xmin ymin xmax ymax": shares, "in pixels": places})


def describe(arguments: Sequence[str]) -> None:
    """Prints a text for every box of every picture."""
    cli = DecodingCLI(arguments, command="describe")
    specs: list[str] = cli.config.boxes
    boxes = [read_box(spec) for spec in specs]

    def question(grounder: Grounder, tokens_BND: Tensor, tokenizer: Tokenizer, more: dict[str, Any]) -> list[str]:
        return grounder.describe(tokens_BND, torch.tensor(boxes, device=tokens_BND.device), tokenizer, **more)

    for path, texts in cli.ask(question, len(boxes)):
        if cli.config.json:
            rows = zip(boxes, texts, strict=True)
            print_json(path, boxes=[{"box": box, "text": text} for box, text in rows])
        else:
            print_table(path, {"box": specs, "text": texts})


def read_box(spec: str) -> Box:
    """Returns the box that a user wrote as `xmin,ymin,xmax,ymax`.

    Raises:
        ValueError: if it is not four numbers, or not 0 <= min < max <= 1.
    """
    try:
        xmin, ymin, xmax, ymax = (float(side) for side in spec.split(","))
    except ValueError:
        raise ValueError(
            f"--boxes: found '{spec}', expected four numbers xmin,ymin,xmax,ymax, for example 0.1,0.2,0.5,0.6"
        ) from None
    if not (0 <= xmin < xmax <= 1 and 0 <= ymin < ymax <= 1):
        raise ValueError(
            f"--boxes: found '{spec}', expected 0 <= min < max <= 1, shares of width and height: divide pixels by these"
        )
    return xmin, ymin, xmax, ymax


def in_pixels(box: Sequence[float], path: str) -> list[int]:
    """Returns a box in shares as whole pixels of the picture at `path`."""
    _, height, width = decode_image(Path(path).read_bytes()).shape
    return [round(side * scale) for side, scale in zip(box, (width, height, width, height), strict=True)]


def print_json(path: str, **answers: Any) -> None:
    """Prints the answers for one picture as a line of JSON."""
    print(json.dumps({"image": path, **answers}, ensure_ascii=False))


def print_table(path: str, columns: dict[str, Sequence[str]]) -> None:
    """Prints the answers for one picture as columns."""
    table = Table(*columns, title=escape(path), title_justify="left")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))
    Console().print(table)
