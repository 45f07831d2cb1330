"""Both towers as ONNX files, for onnxruntime and whatever else reads them."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from siglip2.core.interop.graphs import graph_parity, graphs_of, write_description
from siglip2.core.interop.parity import Parity
from siglip2.core.interop.torch_export import exported
from siglip2.core.interop.weights import Weights

SUFFIX, WRITERS, READER = ".onnx", ("onnx", "onnxscript"), "onnxruntime"


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes `image.onnx`, `text.onnx`, their weights (`.onnx.data`), description and tokenizer; returns notes.

    Raises:
        ValueError: if the packages that write ONNX are not installed.
    """
    if missing := [name for name in WRITERS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ONNX files are written by {' and '.join(missing)}: pip install {' '.join(missing)}")
    graphs = graphs_of(weights)
    for graph in graphs:
        with _silence():
            program: Any = torch.onnx.export(
                exported(graph),
                input_names=list(graph.inputs),
                output_names=[graph.output],
                dynamic_shapes=graph.varying,
                dynamo=True,
                verbose=False,
            )
            # weights of their own file: one of ONNX may have 2 GB at most
            program.save(folder / f"{graph.name}{SUFFIX}", external_data=True)
    return write_description(weights, folder, graphs, SUFFIX)


def parity(weights: Weights, folder: Path) -> Parity | None:
    """Compares what onnxruntime makes of the files of a folder with our towers; None if it is not installed."""
    if importlib.util.find_spec(READER) is None:
        return None
    import onnxruntime

    def open_graph(file: str) -> Any:
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])

        return run

    return graph_parity(f"{READER} {importlib.metadata.version(READER)}", weights, folder, open_graph)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's remarks on operators of torchvision and on torch's own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
