"""Both towers as programs of `torch.export`: loaded by torch alone, without this package."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from siglip2.core.interop.graphs import Graph, graph_parity, graphs_of, write_description
from siglip2.core.interop.parity import Parity
from siglip2.core.interop.weights import Weights

SUFFIX = ".pt2"


@torch.no_grad()
def exported(graph: Graph) -> ExportedProgram:
    """Returns a tower traced by `torch.export`; batch and number of patches may vary."""
    # named, so that torch refuses to trace a graph that takes no batch of one rather than to forbid it quietly
    varying = {name: {axis: Dim(label) for axis, label in axes.items()} for name, axes in graph.varying.items()}
    return torch.export.export(graph.module, (), kwargs=graph.inputs, dynamic_shapes=varying)


def write(weights: Weights, folder: Path) -> list[str]:
    """Writes `image.pt2` and `text.pt2`, with their description and tokenizer; returns notes."""
    graphs = graphs_of(weights)
    for graph in graphs:
        torch.export.save(exported(graph), folder / f"{graph.name}{SUFFIX}")
    return write_description(weights, folder, graphs, SUFFIX)


def parity(weights: Weights, folder: Path) -> Parity:
    """Compares the programs of a folder with our towers."""

    def open_graph(file: str) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's own, of its own file
            module = torch.export.load(folder / file).module()
        return lambda inputs: module(**inputs)

    return graph_parity(f"torch.export {torch.__version__}", weights, folder, open_graph)
