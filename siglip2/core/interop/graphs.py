"""Both towers as functions of plain tensors, for programs that run graphs and know nothing of us.

Inputs and outputs are named and shaped as transformers' processors and models have them, so that their processors feed
the graphs.
"""

# B images or texts, N patches, P patch values, T text tokens, E embedding dimension, H W pixels

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, pair_logits, patchify
from siglip2.core.interop.contracts import write_tokenizer_files
from siglip2.core.interop.files import write_json
from siglip2.core.interop.parity import Inputs, Parity, random_inputs
from siglip2.core.interop.weights import Weights
from siglip2.core.model.text import TextTower
from siglip2.core.model.two_towers import unit_norm
from siglip2.core.model.vision import VisionTower, to_unit_range

DESCRIPTION = "model.json"
TWICE = 2  # rows of an example: one row would be taken for a constant


class ConstantQuery(nn.Module):
    """The query of a pool [1, 1, D], which depends on no input, for as many rows as there are.

    A trace that sees the projection of an expanded vector forbids batches of one.

    Args:
        query_11D: projected.
    """

    query: Tensor

    def __init__(self, query_11D: Tensor):
        super().__init__()
        self.register_buffer("query", query_11D)

    def forward(self, latent_BQD: Tensor) -> Tensor:
        return self.query.expand(latent_BQD.shape[0], latent_BQD.shape[1], -1)


class SquareImages(nn.Module):
    """Pixel values [B, 3, H, W] of squares to unit-norm embeddings [B, E].

    Args:
        tower: the vision tower.
    """

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows, columns, _ = self.tower.pos_embed.shape
        patches = patchify(grey_levels(pixel_values), self.tower.patch_size)
        images = Patches(patches, grid_coords(rows, columns)[None], None, (rows, columns))
        return unit_norm(self.tower(images).pooled)


class NativeImages(nn.Module):
    """Patches [B, N, P] of pictures that keep their aspect ratio to unit-norm embeddings [B, E].

    Args:
        tower: the vision tower.
    """

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        valid_BN = pixel_attention_mask != 0
        place_N = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        columns_B1 = spatial_shapes[:, 1:2]
        coords_BN2 = torch.stack([place_N // columns_B1, place_N % columns_B1], dim=-1)
        # padding stands at (0, 0), as in training: beyond the grid a position would be 0 / 0
        coords_BN2 = torch.where(valid_BN[..., None], coords_BN2, 0)
        images = Patches(grey_levels(pixel_values), coords_BN2, valid_BN, sizes=spatial_shapes[:, None])
        return unit_norm(self.tower(images).pooled)


class Texts(nn.Module):
    """Token ids [B, T] to unit-norm embeddings [B, E].

    Args:
        tower: the text tower.
    """

    def __init__(self, tower: TextTower):
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> Tensor:
        return unit_norm(self.tower(input_ids).projected)


@torch.no_grad()
def traceable(tower: VisionTower) -> VisionTower:
    """Returns the tower, its own no more, with what depends on no input computed."""
    tower.pool.q = ConstantQuery(tower.pool.q(tower.pool.latent))  # type: ignore[assignment]  # a Linear in timm
    return tower


def grey_levels(pixel_values: Tensor) -> Tensor:
    """Returns pixels of [-1, 1] as grey levels of 0 to 255, which the tower maps back, in float32."""
    return (pixel_values + 1) * 127.5


@dataclass(frozen=True)
class Graph:
    """A tower with what is needed to trace it.

    Args:
        name: of its file: image or text.
        module: of tensors alone.
        inputs: an example of each input, by name; dimensions that may vary are not 1 in it.
        varying: the names of those dimensions, by input and axis.
        said: each input in words.
        output: name of the output, [B, E].
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    varying: dict[str, dict[int, str]]
    said: dict[str, str]
    output: str


def graphs_of(weights: Weights) -> list[Graph]:
    """Returns the vision tower and, if there is one, the text tower, in float32."""
    graphs = [_native(weights) if weights.native else _square(weights)]
    if weights.text is not None:
        length = weights.context_length
        said = {"input_ids": f"int64 [batch, {length}]: as many, ended by EOS, padded on the right, without a mask"}
        example = {"input_ids": torch.ones(TWICE, length, dtype=torch.long)}
        tower = weights.towers().text
        graphs.append(Graph("text", Texts(tower).eval(), example, {"input_ids": {0: "batch"}}, said, "text_embeds"))
    return graphs


def _square(weights: Weights) -> Graph:
    side = weights.image_size
    return Graph(
        "image",
        SquareImages(traceable(weights.vision_tower())).eval(),
        {"pixel_values": torch.zeros(TWICE, 3, side, side)},
        {"pixel_values": {0: "batch"}},
        {"pixel_values": f"float32 [batch, 3, {side}, {side}], RGB, uint8 / 127.5 - 1"},
        "image_embeds",
    )


def _native(weights: Weights) -> Graph:
    rows, columns = weights.grid
    length, values = rows * columns + 3, weights.patch_size**2 * 3  # another length than that of the comparison
    mask = (torch.arange(length) < rows * columns).long().expand(TWICE, -1).clone()
    inputs = {
        "pixel_values": torch.zeros(TWICE, length, values),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[rows, columns]] * TWICE),
    }
    sequence = {0: "batch", 1: "patches"}
    return Graph(
        "image",
        NativeImages(traceable(weights.vision_tower())).eval(),
        inputs,
        {"pixel_values": sequence, "pixel_attention_mask": sequence, "spatial_shapes": {0: "batch"}},
        {
            "pixel_values": f"float32 [batch, patches, {values}], each (row, column, channel), uint8 / 127.5 - 1",
            "pixel_attention_mask": "int64 [batch, patches], 0 where padded",
            "spatial_shapes": "int64 [batch, 2], (rows, columns) of each picture's grid, patches row by row",
        },
        "image_embeds",
    )


def write_description(weights: Weights, folder: Path, graphs: list[Graph], suffix: str) -> list[str]:
    """Writes `model.json`, with all that the graphs do not know, and the tokenizer files; returns notes.

    Args:
        weights: both contracts, temperature and bias are taken from them.
        folder: to write into.
        graphs: that lie there.
        suffix: of their files.
    """
    contract = weights.tokenizer.contract.to_dict() if weights.tokenizer else None
    content: dict[str, Any] = {
        g.name: {"file": f"{g.name}{suffix}", "inputs": g.said, "output": f"{g.output}, float32 [batch, {_width(g)}]"}
        for g in graphs
    }
    if weights.text is not None:
        content |= {
            "logits": "temperature * image_embeds @ text_embeds.T + bias; sigmoid: probability of each pair",
            "temperature": weights.state["logit_scale"].float().exp().item(),
            "bias": weights.state["logit_bias"].float().item(),
        }
    write_json(folder / DESCRIPTION, {**content, "text_contract": contract, "pixel_contract": weights.pixels})
    if weights.tokenizer is None:
        return ["there is no tokenizer beside the text tower"] if weights.text else ["the vision tower alone"]
    return write_tokenizer_files(folder, weights.tokenizer)


def _width(graph: Graph) -> int:
    tower: Any = graph.module.tower
    return int(tower.head.out_features if graph.name == "text" else tower.width)


@torch.no_grad()
def graph_parity(library: str, weights: Weights, folder: Path, open_graph: Callable[[str], Any]) -> Parity:
    """Compares what lies in a folder with our towers, for another batch and sequence length than it was traced with.

    Args:
        library: name and version of what runs the graphs.
        weights: that were written.
        folder: where they are.
        open_graph: file name -> a function of named tensors that returns the output.
    """
    inputs = random_inputs(weights)
    z_image = unit_norm(weights.vision_tower()(inputs.images).pooled)
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    image = open_graph(description["image"]["file"])(image_inputs(inputs))
    if inputs.ids is None:
        return Parity(library, _apart(image, z_image))
    text = open_graph(description["text"]["file"])({"input_ids": inputs.ids})
    towers = weights.towers()
    z_text = towers.encode_text(inputs.ids).embedding
    ours = pair_logits(z_image, z_text, scale=towers.logit_scale, bias=towers.logit_bias)
    theirs = description["temperature"] * image @ text.T + description["bias"]
    return Parity(library, _apart(image, z_image), _apart(text, z_text), _apart(theirs, ours))


def image_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Returns the pictures of a comparison under the names that the image graph takes."""
    if inputs.pixels is not None:
        return {"pixel_values": inputs.pixels}
    images = inputs.images
    assert images.valid is not None
    assert images.sizes is not None
    return {
        "pixel_values": to_unit_range(images.patches),
        "pixel_attention_mask": images.valid.long(),
        "spatial_shapes": images.sizes[:, 0].long(),
    }


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
