"""`siglip2 search`: the pictures of a data set that a text, or a picture, finds in its embeddings."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from siglip2.api import load
from siglip2.cli.console import set_up_logging
from siglip2.core.data.embed_shards import describe_encoder
from siglip2.core.data.fields import BadSample
from siglip2.core.data.image_io import decode_image
from siglip2.core.data.storage import write_file
from siglip2.prediction.model import Model
from siglip2.search.index import Hit, Index, open_index
from siglip2.search.page import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("index", help="Embeddings that `siglip2 embed` wrote: a file, a glob, their folder, or the shard or table.")
    add("texts", nargs="*", help="What to look for, each text by itself.")
    add("--image", nargs="+", default=[], metavar="FILE", help="Pictures to look for others like them.")
    add("--k", type=int, default=20, help="Pictures per query (default: 20).")
    add("--name", help="Of the embeddings, where several lie beside one another.")
    add("--html", metavar="FILE", help="Write a page with the pictures found.")
    add("--json", action="store_true", help="Print one JSON object per query instead of tables.")
    add("--ckpt_path", help="The checkpoint that embedded, if it is no longer where it was.")
    add("--device", help="Of the towers: cpu, cuda, ... (default: a GPU if there is one).")


def run(args: argparse.Namespace) -> None:
    """Prints what every query finds, and writes a page if one is asked for.

    Raises:
        ValueError: if there is no query, `--k` is below 1, or the checkpoint is not the one that embedded.
    """
    set_up_logging()
    if not args.texts and not args.image:
        raise ValueError('search needs a text or a picture: siglip2 search INDEX "a red car", or --image a.png')
    if args.k < 1:
        raise ValueError(f"--k is {args.k}, expected 1 or more")
    index = open_index(args.index, args.name)
    model = _model(index, args.ckpt_path, args.device)
    found = _search(index, model, args.texts, args.image, args.k)
    for query, hits in found:
        _print(query, hits, as_json=args.json)
    if args.html:
        head = index.head
        subtitle = f"{index.num_images:,} pictures, embedded as '{head.name}' by {head.encoder.checkpoint}"
        shown = [(query, [(hit, _picture(index, hit)) for hit in hits]) for query, hits in found]
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_file(args.html, render(shown, subtitle=subtitle).encode())


def _search(
    index: Index, model: Model, texts: Sequence[str], images: Sequence[str], k: int
) -> list[tuple[str, list[Hit]]]:
    queries = [model.encode_text(texts)] if texts else []
    queries += [model.encode_image(images)] if images else []
    found = index.search(torch.cat(queries).float().cpu(), k)
    # temperature and bias were learned on pairs of a text and a picture: of two pictures they say nothing
    found[len(texts) :] = [[replace(hit, match=None) for hit in hits] for hits in found[len(texts) :]]
    return list(zip([*texts, *images], found, strict=True))


def _model(index: Index, path: str | None, device: str | None) -> Model:
    """The towers that made the index; queries of any others would find nothing that means anything."""
    encoder = index.head.encoder
    try:
        model = load(path or encoder.checkpoint, device, packed=False)  # described before it is used
    except FileNotFoundError as error:
        error.add_note("it made these embeddings: give its place as --ckpt_path")
        raise
    given = describe_encoder(model.model, model.tokenizer, model.patchifier, checkpoint=model.name, compute="fp32")
    if given.digest != encoder.digest:
        raise ValueError(
            f"{model.name} is not the checkpoint that made these embeddings: {given.digest}, and they are of "
            f"{encoder.digest} ({encoder.checkpoint}). Give that one as --ckpt_path, or embed again"
        )
    return model


def _picture(index: Index, hit: Hit) -> Any:
    """uint8 [H, W, 3], or None if it cannot be read any more."""
    try:
        return np.ascontiguousarray(decode_image(index.image(hit)).permute(1, 2, 0).numpy())
    except (BadSample, OSError, ValueError):
        return None


def _print(query: str, hits: Sequence[Hit], *, as_json: bool) -> None:
    if as_json:
        shown = [{name: value for name, value in vars(hit).items() if name not in ("file", "row")} for hit in hits]
        print(json.dumps({"query": query, "hits": shown}, ensure_ascii=False))
        return
    table = Table(title=escape(query), title_justify="left")
    for name in ("", "match", "cosine"):
        table.add_column(name, justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("in", overflow="fold")
    for hit in hits:
        match = "" if hit.match is None else f"{hit.match:.2%}"
        table.add_row(str(hit.rank), match, f"{hit.cosine:.3f}", escape(hit.key), escape(hit.where))
    Console().print(table)
