"""Our models in LAION's CLIP_benchmark: `python -m siglip2.clip_benchmark eval --model_type siglip2 ...`.

Source: LAION-AI/CLIP_benchmark 1.6.2, clip_benchmark/models/__init__.py: a loader returns (model, transform,
tokenizer), and what `transform` returns is stacked, moved to the device and handed to `model.encode_image`.
"""

# B pictures or texts, N patches, P patch values, T text tokens, E embedding dimension

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from siglip2.api import load
from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords
from siglip2.core.layout import Patchifier
from siglip2.core.views import IMAGE
from siglip2.prediction.inputs import pixels_of
from siglip2.prediction.model import Model

MODEL_TYPE = "siglip2"
BYTE = 256


class SquareTransform:
    """A PIL picture as the patches of one grid, uint8 [N, P].

    Args:
        patchifier: with the pixel contract.
    """

    def __init__(self, patchifier: Patchifier):
        self.patchifier, self.layout = patchifier, patchifier.eval_layout(1)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.patches(image).patches[0]

    def patches(self, image: Image.Image) -> Patches:
        """Returns the picture under the contract, [1, N, P]."""
        return self.patchifier(pixels_of(image), IMAGE, self.layout)


class NativeTransform(SquareTransform):
    """A PIL picture as uint8 [1 + N, P]: a row that says its grid, then its patches: one tensor is all that is kept.

    The first four bytes are rows and columns, each as its high and its low byte.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        made = self.patches(image)
        assert made.sizes is not None
        said_P = torch.zeros_like(made.patches[0, 0])
        for place, size in enumerate(made.sizes[0, 0].tolist()):
            said_P[2 * place], said_P[2 * place + 1] = divmod(size, BYTE)
        return torch.cat([said_P[None], made.patches[0]])


class Benchmarked(nn.Module):
    """Two towers with the methods that CLIP_benchmark calls.

    Args:
        model: as `siglip2.load` returns it.
        native: whether pictures come from `NativeTransform`.
    """

    def __init__(self, model: Model, *, native: bool):
        super().__init__()
        self.towers, self.grid, self.native = model.model, model.patchifier.grid, native

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns unit-norm embeddings [B, E] of pictures as their transform made them, uint8 [B, N, P]."""
        if not self.native:
            coords = grid_coords(*self.grid)[None].to(images.device)
            return self.towers.encode_image(Patches(images, coords, None, self.grid)).embedding
        said_B22 = images[:, 0, :4].long().unflatten(-1, (2, 2))
        sizes_B2 = said_B22[..., 0] * BYTE + said_B22[..., 1]
        places_N = torch.arange(images.shape[1] - 1, device=images.device)
        valid_BN = places_N < sizes_B2.prod(-1, keepdim=True)
        coords_BN2 = torch.stack([places_N // sizes_B2[:, 1:], places_N % sizes_B2[:, 1:]], dim=-1)
        coords_BN2 = torch.where(valid_BN[..., None], coords_BN2, 0)
        return self.towers.encode_image(Patches(images[:, 1:], coords_BN2, valid_BN, sizes=sizes_B2[:, None])).embedding

    def encode_text(self, ids_BT: Tensor) -> Tensor:
        """Returns unit-norm embeddings [B, E] of token ids, integer [B, T]."""
        return self.towers.encode_text(ids_BT).embedding


def load_siglip2(
    model_name: str = MODEL_TYPE, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Benchmarked, Callable[[Image.Image], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Returns model, transform and tokenizer, as CLIP_benchmark asks a loader for them.

    Args:
        model_name: any; it is only written into the results.
        pretrained: what `siglip2.load` takes: a checkpoint, a folder, an npz, a hub id.
        cache_dir: not used.
        device: where the model runs.

    Raises:
        FileNotFoundError: if there is nothing at `pretrained`.
        ValueError: if it cannot be read, or has no tokenizer.
    """
    model = load(pretrained, device)
    native = model.patches(np.zeros((32, 32, 3), np.uint8)).grid is None
    transform = NativeTransform(model.patchifier) if native else SquareTransform(model.patchifier)
    return Benchmarked(model, native=native), transform, model.tokenizer.encode


def register() -> None:
    """Makes CLIP_benchmark, which must be installed, know `--model_type siglip2`."""
    from clip_benchmark import models

    models.TYPE2FUNC[MODEL_TYPE] = load_siglip2
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)  # the list that its command line holds, too


def repair_accuracy() -> None:
    """Gives CLIP_benchmark, whose own makes floats of arrays with one element, an accuracy that numpy 2.4 takes."""
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output_BK: Tensor, target_B: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
        hits_Bk = output_BK.topk(max(topk), dim=1).indices == target_B[:, None]
        return [hits_Bk[:, :k].any(dim=1).double().mean().item() for k in topk]

    zeroshot_classification.accuracy = accuracy


def main() -> None:
    """Runs CLIP_benchmark's command line with our models in it."""
    register()
    repair_accuracy()
    from clip_benchmark.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
