"""What the commands print: our own log lines, tables of scores, and nothing that a user cannot act on."""

import logging
import warnings
from collections.abc import Iterable

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from siglip2.core.report.data import ReferringRow, RetrievalRow, ZeroShotRow

CHATTER = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.seed",
)


def set_up_logging() -> None:
    """Sends log records to the terminal and leaves out what Lightning says at every start."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False)
    handler.addFilter(
        lambda record: "PJRT_DEVICE" not in record.getMessage()
    )  # torch_xla, on every machine without one
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    for name in CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Be aware that when using `ckpt_path`",  # callbacks of `fit` that other commands do not need
        "Checkpoint directory .* exists and is not empty",  # that is how a run is resumed
        "The '.*_dataloader' does not have many workers",  # their number changes nothing but speed
        "Precision .* is not supported by the model summary",
        "Experiment logs directory",
        "Found .* in eval mode at the start of training",  # teachers and references are, on purpose
    ):
        warnings.filterwarnings("ignore", message)


def print_scores(
    zero_shot: Iterable[ZeroShotRow], retrieval: Iterable[RetrievalRow], referring: Iterable[ReferringRow] = ()
) -> None:
    """Prints one table per kind of evaluation."""
    zero_shot, retrieval, referring = list(zero_shot), list(retrieval), list(referring)
    console = Console()
    if zero_shot:
        table = _table(
            "Zero-shot classification", ("set", "language"), ("images", "classes", "chance", "top-1", "top-5")
        )
        for row in zero_shot:
            numbers = (
                f"{row.num_images}",
                f"{row.num_classes}",
                f"{row.chance:.1%}",
                f"{row.top1:.1%}",
                f"{row.top5:.1%}",
            )
            table.add_row(row.dataset, row.language, *numbers)
        console.print(table)
    if retrieval:
        ways = ("text to image R@1", "R@5", "R@10", "image to text R@1", "R@5", "R@10")
        table = _table("Retrieval", ("set", "language"), ("pairs", *ways))
        for found in retrieval:
            recalls = [*found.text_to_image.values(), *found.image_to_text.values()]
            table.add_row(found.dataset, found.language, f"{found.num_texts}", *(f"{value:.1%}" for value in recalls))
        console.print(table)
    if referring:
        table = _table("Referring expressions", ("set", "language"), ("texts", "accuracy at IoU 0.5", "mean IoU"))
        for located in referring:
            table.add_row(
                located.dataset,
                located.language,
                f"{located.num_texts}",
                f"{located.accuracy:.1%}",
                f"{located.iou:.3f}",
            )
        console.print(table)


def _table(title: str, words: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
