"""`siglip2 predict`: pictures and free texts in, ranked probabilities out, on the terminal or in a file."""

import argparse
import glob
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader

from siglip2.api import load
from siglip2.cli.console import set_up_logging
from siglip2.cli.embedding import positive
from siglip2.cli.from_checkpoint import option, with_checkpoint
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.data.fields import Fields
from siglip2.core.interop.detect import is_foreign
from siglip2.core.module import SigLIP2Module
from siglip2.prediction.files import Predictions, open_predictions
from siglip2.prediction.inputs import pixels_of
from siglip2.prediction.model import Model, Ranked
from siglip2.prediction.pictures import Span, Spans, all_pictures, open_pictures

log = logging.getLogger(__name__)

OUT = (
    "Write all predictions to a .parquet or .npy file instead: pictures, folders, shards, tables, any number of them. "
    "A killed run starts again from the beginning: for large jobs there is `siglip2 embed`, which goes on."
)
IMAGES = "Image files, globs, folders with all folders in them; with --out also shards or a table."
EXPLAIN = "Show the grid that each picture is resized to instead; with a folder, also draw it there."
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMED = 20  # failures that the log names before they are only counted


class PredictCLI(SigLIP2CLI):
    """A recipe out of a checkpoint, and what `--help` is to say of the options that need none."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what `predict` takes without a recipe; `siglip2 predict --out --help` has more of that."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", help=f"{OUT} `siglip2 predict --out x.npy --help` lists its options.")
        parser.add_argument("--explain", help=EXPLAIN)


def predict(arguments: Sequence[str]) -> None:
    """Ranks the texts for every picture and prints a table or JSON, or writes a file.

    A recipe's options (`--trainer.precision` and so on) act on checkpoints of ours. Released weights, `--out` and
    `--explain` need no recipe, and have the few options of `without_recipe`.
    """
    path = option(arguments, "--ckpt_path")
    if any(option(arguments, flag) is not None for flag in ("--out", "--explain")) or (path and is_foreign(path)):
        without_recipe(arguments)
        return
    cli = PredictCLI(with_checkpoint(arguments, "predict"), command="predict")
    images = cli.config.images or cli.datamodule.predict.images
    texts = cli.config.texts or cli.datamodule.predict.texts
    if not images or not texts:
        raise ValueError(
            "predict needs pictures and texts: siglip2 predict --ckpt_path CKPT --images a.png --texts 'a cat' 'a dog'"
        )
    paths, embedded = run_on_pictures(cli, images, quiet=cli.config.json)
    rankings = rank(cli.model, torch.cat([e["image"] for e in embedded]), texts)
    for path, ranking in zip(paths, rankings, strict=True):
        _print(path, ranking, as_json=cli.config.json)


def run_on_pictures(cli: SigLIP2CLI, images: Sequence[str], *, quiet: bool) -> tuple[list[str], list[Any]]:
    """Sends pictures one by one through the model of `--ckpt_path`.

    Args:
        cli: built with the checkpoint.
        images: files, globs or folders, with the folders in them.
        quiet: show no progress bar: it draws on stdout, where each line is to be JSON.

    Returns:
        The path of every picture that can be read, and what `predict_step` returned for it.

    Raises:
        ValueError: if none can be read.
    """
    # each is decoded once more later: one that cannot be would end the loop, and with it what is known of the others
    good = [glob.escape(path) for path, _ in readable(all_pictures(images))]
    cli.datamodule.predict = replace(cli.datamodule.predict, images=good)
    if quiet and cli.trainer.progress_bar_callback:
        cli.trainer.progress_bar_callback.disable()
    outputs: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    dataset: Any = cli.datamodule.predict_dataloader().dataset
    return [str(path) for path in dataset.paths], outputs or []


def rank(module: SigLIP2Module, z_image_BE: torch.Tensor, texts: Sequence[str]) -> list[list[Ranked]]:
    """Returns, for every image embedding [B, E], the texts from best to worst."""
    model = Model(module.model.to(z_image_BE.device), module.patchifier, module.tokenizer)
    return model.ranked(z_image_BE, model.encode_text(texts), texts)


def without_recipe(arguments: Sequence[str]) -> None:
    """Predicts with `siglip2.load`: a checkpoint of ours or released weights, to the terminal or a file.

    Raises:
        ValueError: if options are missing or no picture can be read.
    """
    set_up_logging()
    args = _parser().parse_args(list(arguments))
    if args.explain is None and not args.texts and not args.out:
        raise ValueError("predict needs --texts to rank, or --out FILE to write embeddings, or --explain")
    model = load(args.ckpt_path, args.device, DTYPES[args.precision], seq_len=args.seq_len, tokenizer=args.tokenizer)
    if args.explain is not None:
        explain(model, args.images, args.explain)
    elif args.out:
        summary = predict_to_file(model, args)
        print(json.dumps(summary, ensure_ascii=False)) if args.json else _print_summary(summary)
    else:
        z_text_KE = model.encode_labels(args.texts, args.templates)
        for path, pixels in readable(all_pictures(args.images)):
            _print(path, model.ranked(model.encode_image(pixels), z_text_KE, args.texts)[0], as_json=args.json)


def readable(paths: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each picture with its pixels, uint8 [3, H, W]; one that cannot be read is named in the log and left out.

    Raises:
        ValueError: at the end, if none can be read.
    """
    skipped = 0
    for path in paths:
        try:
            pixels = pixels_of(path)
        except (OSError, ValueError) as error:
            log.warning("skipped: %s", error)
            skipped += 1
        else:
            yield path, pixels
    if skipped == len(paths):
        raise ValueError(f"none of the {skipped} pictures could be read; the log says why")
    if skipped:
        log.warning("%d of %d pictures were skipped", skipped, len(paths))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siglip2 predict", description="Predict without a recipe: released weights, or with --out or --explain."
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, help="A checkpoint, or released weights: a folder, an .npz, a hub id.")
    add("--images", nargs="+", required=True, help=IMAGES)
    add("--texts", nargs="+", default=[], help="Free texts; with --out and without them, embeddings are written.")
    add("--templates", nargs="+", default=["{}"], help="Prompts with {} for the text; a text is their mean.")
    add("--out", help=OUT)
    add("--explain", nargs="?", const="", metavar="FOLDER", help=EXPLAIN)
    add("--json", action="store_true", help="Print JSON instead of tables.")
    add("--batch-size", type=positive, default=32, help="Pictures at a time (default: 32).")
    add("--num-workers", type=int, default=2, help="Loader processes (default: 2).")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).")
    add("--precision", choices=DTYPES, default="fp32", help="Of the weights (default: fp32).")
    add("--seq-len", type=int, help="Patches per picture, where pictures keep their aspect ratio.")
    add("--tokenizer", help="Tokenizer file, where the weights bring none.")
    add("--image-field", default=Fields().image, help="Where the picture is in a sample of shards or a table.")
    return parser


def predict_to_file(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Writes probabilities of `--texts`, or embeddings, of all pictures; returns what was done as plain values.

    Raises:
        ValueError: if none of the pictures could be read; then nothing is written.
    """
    source = open_pictures(args.images, fields=Fields(image=args.image_field))
    spans = Spans(source, model.patchifier, args.batch_size)
    workers = args.num_workers if len(spans) > 1 else 0
    loader = DataLoader(spans, batch_size=None, num_workers=workers, pin_memory=model.device.type == "cuda")
    z_text_KE = model.encode_labels(args.texts, args.templates) if args.texts else None
    about = {
        "checkpoint": args.ckpt_path,
        "pixels": dict(model.patchifier.contract()),
        "templates": args.templates,
        "logit_scale": float(model.model.logit_scale),
        "logit_bias": float(model.model.logit_bias),
    }
    width = len(args.texts) or model.embed_dim
    file = open_predictions(args.out, rows=len(source), width=width, texts=args.texts, about=about)
    begin, failed = time.monotonic(), 0
    try:
        with _progress(len(source)) as bar:
            task = bar.add_task("predict", total=len(source))
            for span in loader:
                failed += _write_span(model, file, span, z_text_KE, width, named=failed)
                bar.advance(task, len(span.places))
        if failed == len(source):
            raise ValueError(f"none of the {failed} pictures of {source.name} could be read; the log says why")
        file.close()
    except BaseException:
        file.abandon()
        raise
    seconds = time.monotonic() - begin
    speed = round(len(source) / max(seconds, 1e-9), 1)
    return {
        "out": args.out,
        "pictures": len(source) - failed,
        "skipped": failed,
        "seconds": round(seconds, 2),
        "pictures_per_second": speed,
    }


def _write_span(
    model: Model, file: Predictions, span: Span, z_text_KE: torch.Tensor | None, width: int, *, named: int
) -> int:
    """Writes the rows of a span; returns how many pictures of it could not be read."""
    values_bK = torch.full((len(span.places), width), torch.nan)
    if span.image is not None:
        found = model.encode_patches(span.image)
        if z_text_KE is not None:
            found = model.probabilities(found, z_text_KE)
        values_bK[list(span.seen)] = found.float().cpu()
    failures = dict(span.failures)
    for number, (row, reason) in enumerate(failures.items(), start=named):
        where, key = span.places[row]
        if number < NAMED:
            log.warning("skipped %s in %s: %s", key, where, reason)
        elif number == NAMED:
            log.warning("more pictures were skipped; the file names all of them")
    file.write(span.places, values_bK, failures)
    return len(failures)


def explain(model: Model, images: Sequence[str], folder: str) -> None:
    """Prints what the model sees of each picture, and draws it into a folder if one is given."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    for number, (path, pixels) in enumerate(readable(all_pictures(images))):
        found = model.explain(pixels)
        print(f"{path}: {found}")
        if folder:
            found.draw().save(Path(folder) / f"{number:04d}-{Path(path).stem}.png")


def _progress(total: int) -> Progress:
    """A bar on stderr, so that stdout is the table's or JSON's."""
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not total)


def _print_summary(summary: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    Console().print(table)


def _print(path: str, ranking: list[Ranked], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"image": path, "texts": [vars(r) for r in ranking]}, ensure_ascii=False))
        return
    table = Table(title=escape(path), title_justify="left")
    for name, justify in (("text", "left"), ("match", "right"), ("among these", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for r in ranking:
        table.add_row(escape(r.text), f"{r.match:.2%}", f"{r.share:.1%}")
    Console().print(table)
