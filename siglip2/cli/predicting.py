"""`siglip2 predict`: pictures and free texts in, ranked probabilities out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from siglip2.cli.from_checkpoint import with_checkpoint
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.module import SigLIP2Module


@dataclass(frozen=True)
class Ranked:
    """One text for one picture.

    Args:
        text: as the user wrote it.
        match: the model's own probability that the two belong together, sigmoid of the logit.
        share: softmax of the logit among the given texts.
    """

    text: str
    match: float
    share: float


def predict(arguments: Sequence[str]) -> None:
    """Ranks the texts for every picture and prints a table or JSON."""
    cli = SigLIP2CLI(with_checkpoint(arguments, "predict"), command="predict")
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
        images: files, globs or folders.
        quiet: show no progress bar: it draws on stdout, where each line is to be JSON.

    Returns:
        The path of every picture, and what `predict_step` returned for it.
    """
    cli.datamodule.predict = replace(cli.datamodule.predict, images=list(images))
    if quiet and cli.trainer.progress_bar_callback:
        cli.trainer.progress_bar_callback.disable()
    outputs: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    dataset: Any = cli.datamodule.predict_dataloader().dataset
    return [str(path) for path in dataset.paths], outputs or []


@torch.no_grad()
def rank(module: SigLIP2Module, z_image_BE: torch.Tensor, texts: Sequence[str]) -> list[list[Ranked]]:
    """Returns, for every image embedding [B, E], the texts from best to worst."""
    ids = torch.as_tensor(module.tokenizer.encode(list(texts))).to(z_image_BE.device)
    towers = module.model.to(z_image_BE.device)
    logits = towers.logits(z_image_BE, towers.encode_text(ids).embedding)
    rows = zip(logits.sigmoid().tolist(), logits.softmax(1).tolist(), strict=True)
    ranked = [[Ranked(*r) for r in zip(texts, match, share, strict=True)] for match, share in rows]
    return [sorted(row, key=lambda r: -r.match) for row in ranked]


def _print(path: str, ranking: list[Ranked], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"image": path, "texts": [vars(r) for r in ranking]}, ensure_ascii=False))
        return
    table = Table(title=path, title_justify="left")
    for name, justify in (("text", "left"), ("match", "right"), ("among these", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for r in ranking:
        table.add_row(r.text, f"{r.match:.2%}", f"{r.share:.1%}")
    Console().print(table)
