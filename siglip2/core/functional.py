"""Pure tensor mathematics: the sigmoid loss, pair scores, patches, and position grids."""

# B batch, D width, N patches, P patch values, H W pixels, p patch size

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_logits(z_image_BD: Tensor, z_text_BD: Tensor, *, scale: Tensor, bias: Tensor) -> Tensor:
    """Logits of all image-text pairs, [B images, B' texts] float32: exp(scale) x.y + bias.

    Args:
        z_image_BD: unit-norm image embeddings.
        z_text_BD: unit-norm text embeddings.
        scale: log of the temperature factor, shape [1].
        bias: logit bias, shape [1].
    """
    with torch.autocast(z_image_BD.device.type, enabled=False):  # a bf16 dot product loses the small logits
        return z_image_BD.float() @ z_text_BD.float().T * scale.float().exp() + bias.float()


def sigmoid_loss(z_image_BD: Tensor, z_text_BD: Tensor, *, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """Sigmoid loss over all image-text pairs, summed over texts and averaged over images.

    Source: Zhai et al., https://arxiv.org/abs/2303.15343, eq. 1, with logits = exp(scale) x.y + bias as in its
    pseudocode. -log sigmoid(z a) = softplus(a) - a for the positives (z = 1) and softplus(a) elsewhere.

    Args:
        z_image_BD: unit-norm image embeddings, [B, D].
        z_text_BD: unit-norm text embeddings, [B', D] with B' >= B; row offset + i is the caption of image i.
        scale: log of the temperature factor, shape [1].
        bias: logit bias, shape [1]; -10 in the paper, where B is 32 768.
        offset: row of the first image's caption: rank * B when the texts were gathered over ranks, else 0.

    Returns:
        Scalar float32, in nats per image.

    Raises:
        ValueError: if there are too few texts for the images.
    """
    num_images, num_texts = z_image_BD.shape[0], z_text_BD.shape[0]
    if num_texts < offset + num_images:
        raise ValueError(
            f"expected a text for each of {num_images} images from row {offset} on, found {num_texts} texts"
        )
    logits = pair_logits(z_image_BD, z_text_BD, scale=scale, bias=bias)
    positives = logits.diagonal(offset)
    return (F.softplus(logits).sum() - positives.sum()) / num_images


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cuts images [..., 3, H, W] into patches [..., N, P], row-major, each in the order row, column, channel.

    Pixels beyond the last whole patch are dropped, as a convolution without padding does (384 px at patch 14 gives
    27 x 27).
    """
    *lead, channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    image = image[..., : rows * patch_size, : columns * patch_size]
    blocks = image.reshape(*lead, channels, rows, patch_size, columns, patch_size)
    n = len(lead)
    order = [*range(n), n + 1, n + 3, n + 2, n + 4, n]  # C h p w q -> h w p q C
    return blocks.permute(order).reshape(*lead, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """Puts patches [..., N, P] of a full grid back together as images [..., 3, H, W]: the inverse of `patchify`."""
    *lead, _, values = patches.shape
    side = int((values // channels) ** 0.5)
    n = len(lead)
    blocks = patches.reshape(*lead, *grid, side, side, channels)
    order = [*range(n), n + 4, n, n + 2, n + 1, n + 3]  # h w p q C -> C h p w q
    return blocks.permute(order).reshape(*lead, channels, grid[0] * side, grid[1] * side)


def grid_coords(rows: int, columns: int) -> Tensor:
    """Returns the (y, x) of each cell of a grid in row-major order, int16 [rows * columns, 2]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([y, x], dim=-1).reshape(-1, 2).to(torch.int16)


def resize_weights(coord: Tensor, *, size: Tensor | int, source: int, corners: bool = False) -> Tensor:
    """Weights of a bilinear resize along one axis, [..., source] float32, each row summing to 1.

    Antialiased, the triangle filter of `F.interpolate(mode="bilinear", antialias=True, align_corners=False)`: output
    cell c of `size` sees input cell i with weight max(0, 1 - |i + 1/2 - (c + 1/2) s| / max(s, 1)), s = source / size.

    With `corners`, that of `F.interpolate(mode="bilinear", align_corners=True)` and `scipy.ndimage.zoom(order=1)`:
    weight max(0, 1 - |i - c (source - 1) / (size - 1)|).

    Args:
        coord: output cells, integer [...].
        size: number of output cells, an int or a tensor that broadcasts with `coord`.
        source: number of input cells.
        corners: whether the first and last cells stay where they are, and nothing is antialiased.
    """
    size = torch.as_tensor(size, dtype=torch.float32, device=coord.device)[..., None]
    cells = torch.arange(source, device=coord.device, dtype=torch.float32)
    cell = coord.float()[..., None]
    # numerator and denominator are whole numbers, exact in float32: the weights are right to the last bit
    if corners:
        steps = (size - 1).clamp(min=1)  # a single cell stands on the first
        distance = (cells * steps - cell * (source - 1)).abs() / steps
    else:
        distance = ((2 * cells + 1) * size - (2 * cell + 1) * source).abs() / (2 * size.clamp(min=source))
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def resample_grid(
    table: Tensor, coords: Tensor, *, grid: tuple[Tensor | int, Tensor | int], corners: bool = False
) -> Tensor:
    """Position embeddings of the cells `coords` of a grid: the table resized (bilinear) and looked up.

    Args:
        table: [rows, columns, D], the learned positions.
        coords: [..., N, 2], integer (y, x).
        grid: (rows, columns) that the coordinates live in; ints, or tensors that broadcast with [..., N].
        corners: aligns the corners and does not antialias, see `resize_weights`.

    Returns:
        [..., N, D] in the dtype of the table.
    """
    rows = resize_weights(coords[..., 0], size=grid[0], source=table.shape[0], corners=corners)
    columns = resize_weights(coords[..., 1], size=grid[1], source=table.shape[1], corners=corners)
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(-2)  # [..., N, rows * columns]
    with torch.autocast(table.device.type, enabled=False):  # bf16 weights would blur the grid
        return (weights @ table.float().flatten(0, 1)).to(table.dtype)
