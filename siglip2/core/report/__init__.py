"""A self-contained HTML page that shows what a training run learned: one file, no network."""

from siglip2.core.report.data import (
    BoxExample,
    CaptionExample,
    Curve,
    Heatmap,
    ImageExample,
    ReferringRow,
    RetentionRow,
    RetrievalExample,
    RetrievalRow,
    RunReport,
    ZeroShotRow,
)
from siglip2.core.report.render import render, write_report

__all__ = [
    "BoxExample",
    "CaptionExample",
    "Curve",
    "Heatmap",
    "ImageExample",
    "ReferringRow",
    "RetentionRow",
    "RetrievalExample",
    "RetrievalRow",
    "RunReport",
    "ZeroShotRow",
    "render",
    "write_report",
]
