"""`siglip2 embed`: image and text embeddings of a data set, written beside its shards."""

import argparse
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from siglip2.api import load
from siglip2.cli.console import set_up_logging
from siglip2.core.batch import Patches
from siglip2.core.data.check import check_captions, check_source
from siglip2.core.data.embed_shards import Encode, Job, Shard, describe_encoder, embed_shards
from siglip2.core.data.embedding_file import EmbeddingFile
from siglip2.core.data.fields import Fields
from siglip2.core.data.source import FORMATS, open_source
from siglip2.core.data.storage import MAX_BYTES, is_local
from siglip2.prediction.packed import can_pack, pack

log = logging.getLogger(__name__)

STORED = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
COMPUTED: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
CHECKED = 8  # samples of the first and the last shard that are looked at before anything is embedded
NAMED = 20  # failures that the table lists before it only counts them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("checkpoint", help="A checkpoint, or released weights; tokenizer and patchifier are taken out of it.")
    add("data", help="Shards (brace notation, a glob, a folder of *.tar, `a::b`, any fsspec URL), a table, a folder.")
    add("--name", required=True, help="What to call the embeddings: 00000.tar gets a 00000.tar.NAME.safetensors.")
    add("--out", help="Folder for all files of embeddings, instead of beside each shard.")
    add("--only", choices=("image", "text"), help="Embed only pictures, or only captions.")
    add("--captions", nargs="+", default=["caption"], metavar="FIELD", help="Fields with captions; all are embedded.")
    add("--field", action="append", default=[], metavar="NAME=SPEC", help="Where a field is: caption=json.alt.")
    add("--format", choices=FORMATS, default="auto", help="Of the data.")
    add("--cache-dir", help="Folder that keeps local copies of remote shards.")
    add("--max-bytes", type=int, default=MAX_BYTES, help="Samples with a larger file are not embedded.")
    add("--precision", choices=STORED, default="fp16", help="Of the stored embeddings (default: fp16).")
    add("--compute", choices=COMPUTED, default="fp32", help="Of the towers: fp32, or autocast (default: fp32).")
    add("--accelerator", default="auto", help="Lightning's: cpu, cuda, ... (default: auto).")
    add("--devices", default="1", help="Processes, one device each, which share the shards (default: 1).")
    add("--batch-size", type=positive, default=64, help="Pictures, and captions, encoded at a time (default: 64).")
    add("--num-workers", type=int, default=2, help="Loader processes of each device (default: 2).")
    add(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="Only the I-th of N parts of the shards, from 1/N on."
    )
    add("--overwrite", action="store_true", help="Replace embeddings of this name that another checkpoint made.")
    add("--json", action="store_true", help="Print one JSON object instead of a table.")


def run(args: argparse.Namespace) -> None:
    """Embeds what is missing, then prints a table or JSON.

    Raises:
        ValueError: if options do not fit, embeddings of another checkpoint have the name, or a shard could not be
            embedded (after all others were, and the table).
    """
    set_up_logging()
    if not re.fullmatch(r"[\w-][\w.-]*", args.name):
        raise ValueError(f"--name is {args.name!r}, expected letters, digits, dots and dashes: it becomes a file name")
    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=COMPUTED[args.compute])
    fabric.launch()
    job, encode = _prepare(args, fabric)
    shards = job.shards(args.part)
    due = job.due(shards, overwrite=args.overwrite)
    fabric.barrier()  # every process has looked before one writes, so that they agree on who does what
    mine = due[fabric.global_rank :: fabric.world_size]
    begin = time.monotonic()
    with _progress(sum(s.stamp.num_samples for s in mine), shown=fabric.is_global_zero and bool(mine)) as advance:
        failed = embed_shards(job, mine, encode, num_workers=args.num_workers, progress=advance)
    for where, reason in failed.items():
        log.error("%s could not be embedded: %s", where, reason)
    fabric.barrier()
    seconds = time.monotonic() - begin
    missing = job.due(shards, overwrite=True)
    if fabric.is_global_zero:
        summary = summarise(job, shards, due, missing, seconds)
        print(json.dumps(summary, ensure_ascii=False)) if args.json else _print(summary)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards could not be embedded: {', '.join(s.where for s in missing[:3])}. "
            f"The log above says why; the same command goes on with them"
        )


def _prepare(args: argparse.Namespace, fabric: Fabric) -> tuple[Job, Encode]:
    """Opens checkpoint and data."""
    loaded = load(args.checkpoint, fabric.device, packed=False)  # the weights are described first
    source = open_source(
        args.data, format=args.format, fields=_fields(args.field), cache_dir=args.cache_dir, max_bytes=args.max_bytes
    )
    try:
        check_source(source, () if args.only == "text" else ("image",))
        check_captions(source, () if args.only == "image" else args.captions, num=CHECKED)
    except ValueError as error:
        error.add_note("here data.fields.NAME: SPEC is written --field NAME=SPEC")
        raise
    if args.out and is_local(args.out):
        os.makedirs(args.out, exist_ok=True)
    job = Job(
        source,
        loaded.patchifier,
        loaded.tokenizer,
        describe_encoder(
            loaded.model, loaded.tokenizer, loaded.patchifier, checkpoint=args.checkpoint, compute=args.compute
        ),
        args.name,
        folder=args.out,
        captions=tuple(args.captions),
        images=args.only != "text",
        texts=args.only != "image",
        dtype=STORED[args.precision],
        batch_size=args.batch_size,
    )
    model = loaded.model
    if loaded.device.type == "cpu" and args.compute == "fp32" and can_pack(torch.float32):
        pack(model)

    @torch.inference_mode()
    def encode(inputs: Patches | Tensor) -> Tensor:
        with fabric.autocast():
            if isinstance(inputs, Patches):
                return model.encode_image(inputs.apply(lambda t: t.to(fabric.device, non_blocking=True))).embedding
            return model.encode_text(inputs.to(fabric.device, non_blocking=True)).embedding

    return job, encode


def _fields(given: Sequence[str]) -> Fields:
    """The fields out of `NAME=SPEC`; those that `Fields` does not name are extra ones."""
    specs = dict(word.partition("=")[::2] for word in given)
    if empty := [name for name, spec in specs.items() if not (name and spec)]:
        raise ValueError(f"--field {empty[0]!r}: expected NAME=SPEC, for example caption=json.alt")
    own: dict[str, Any] = {name: specs.pop(name) for name in ("image", "caption", "label", "regions") if name in specs}
    return Fields(**own, extra=specs)


def positive(word: str) -> int:
    """Reads an option's number; argparse's error if it is none of 1 or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of 1 or more")
    return int(word)


def _part(word: str) -> tuple[int, int]:
    """`2/8` as (1, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{word!r} is no part such as 1/8 or 8/8")
    return int(match[1]) - 1, int(match[2])


class _Speed(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f}/s" if task.speed else "")


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, so that stdout is the table's or JSON's."""
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("embed", total=total)
        yield lambda done: bar.advance(task, done)


def summarise(
    job: Job, shards: Sequence[Shard], due: Sequence[Shard], missing: Sequence[Shard], seconds: float
) -> dict[str, Any]:
    """Returns what was done, as plain values; counts are those of all shards, the speed that of this run.

    Args:
        job: what was embedded.
        shards: all of this part.
        due: those that had no embeddings before.
        missing: those that have none now.
        seconds: that this run took.
    """
    files = [EmbeddingFile(shard.path) for shard in shards if shard not in missing]
    done = [shard for shard in due if shard not in missing]
    return {
        "name": job.name,
        "checkpoint": job.encoder.checkpoint,
        "digest": job.encoder.digest,
        "shards": len(shards),
        "embedded": len(done),
        "kept": len(shards) - len(due),
        "missing": [shard.where for shard in missing],
        "samples": sum(file.head.stamp.num_samples for file in files),
        "images": sum(file.head.num_images for file in files),
        "texts": sum(file.head.num_texts for file in files),
        "failures": [
            {"shard": file.head.shard, "key": keys[row], "reason": reason}
            for file in files
            if (failures := file.failures)
            for keys in [file.keys]
            for row, reason in failures
        ],
        "seconds": round(seconds, 2),
        "samples_per_second": round(sum(shard.stamp.num_samples for shard in done) / max(seconds, 1e-9), 1),
    }


def _print(summary: dict[str, Any]) -> None:
    counts = {
        "shards": f"{summary['shards']}: {summary['embedded']} embedded now, {summary['kept']} kept",
        "samples": summary["samples"],
        "pictures": summary["images"],
        "captions": summary["texts"],
        "failures": len(summary["failures"]),
        "speed": f"{summary['samples_per_second']:.0f} samples/s",
    }
    table = Table(title=f"embeddings '{summary['name']}' of {summary['checkpoint']}", show_header=False)
    for name, value in counts.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    if not summary["failures"]:
        return
    failed = Table(title="not embedded", title_justify="left")
    for column in ("shard", "sample", "reason"):
        failed.add_column(column, overflow="fold")
    for failure in summary["failures"][:NAMED]:
        failed.add_row(failure["shard"], failure["key"], failure["reason"])
    console.print(failed)
    if len(summary["failures"]) > NAMED:
        console.print(f"and {len(summary['failures']) - NAMED} more; --json lists all")
