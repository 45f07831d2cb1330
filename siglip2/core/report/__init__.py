"""A self-contained HTML page that shows what a training run learned: one file, no network."""

from siglip2.core.report.data import (
    Curve,
    Heatmap,
    ImageExample,
    RetrievalExample,
    RetrievalRow,
    RunReport,
    ZeroShotRow,
)
from siglip2.core.report.render import render, write_report

__all__ = [
    "Curve",
    "Heatmap",
    "ImageExample",
    "RetrievalExample",
    "RetrievalRow",
    "RunReport",
    "ZeroShotRow",
    "render",
    "write_report",
]
