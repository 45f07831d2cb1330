"""Photometric augmentation of all copies of a picture at once: colour jitter, grey, Gaussian blur."""

# C copies, H W pixels

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what "grey" means in torchvision and PIL
RGB_TO_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
BLUR_REACH = 3  # in sigmas; what lies beyond weighs 0.3 %


@dataclass(frozen=True)
class Photometric:
    """How colours are changed; the defaults are those of DINO's first global crop (github.com/facebookresearch/dino).

    SigLIP 2 does not publish its own. DINO's second global crop, which also solarises, has no counterpart there.

    Args:
        jitter: probability that brightness, contrast, saturation and hue of a copy change.
        grey: probability that a copy loses its colours.
        blur: probability that a copy is blurred.
        brightness: x of a factor in [1 - x, 1 + x].
        contrast: x of a factor in [1 - x, 1 + x].
        saturation: x of a factor in [1 - x, 1 + x].
        hue: largest rotation of the hue, in turns.
        sigma: smallest and largest standard deviation of the blur, in pixels.

    Raises:
        ValueError: if a probability or a strength is outside [0, 1], or not 0 < sigma[0] <= sigma[1].
    """

    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 1.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name != "sigma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"photometric: {name} is {getattr(self, name)}, expected a number in [0, 1]")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"photometric: sigma is {self.sigma}, expected 0 < smallest <= largest, in pixels")


DINO_GLOBAL = Photometric()
DINO_LOCAL = Photometric(blur=0.5)
UNCHANGED = Photometric(jitter=0.0, grey=0.0, blur=0.0)


class Draws(NamedTuple):
    """What was drawn for each of C copies, float64 [C] each; factor 1, hue 0 and sigma 0 change nothing."""

    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    """Distance from grey; 0 is grey."""
    hue: NDArray[np.float64]
    """In turns, from red towards yellow."""
    sigma: NDArray[np.float64]
    """Of the blur, in pixels."""


def draw(rng: np.random.Generator, copies: int, options: Photometric) -> Draws:
    """Draws the changes of `copies` copies, independently of one another.

    As many numbers are taken from `rng` whatever the options are, so that switching one change off leaves the
    others as they were.
    """
    chances = rng.random((3, copies))
    jittered = chances[0] < options.jitter
    strengths = (options.brightness, options.contrast, options.saturation)
    factors = [1 + jittered * x * rng.uniform(-1, 1, copies) for x in strengths]
    factors[2] *= chances[1] >= options.grey
    hue = jittered * options.hue * rng.uniform(-1, 1, copies)
    sigma = (chances[2] < options.blur) * rng.uniform(*options.sigma, copies)
    return Draws(factors[0], factors[1], factors[2], hue, sigma)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Changes the colours of each image, then blurs it.

    Brightness multiplies, contrast scales about the mean grey of the image, saturation scales the distance of each
    pixel from its grey. Hue rotates the chroma plane of YIQ, where torchvision goes through HSV: greys stay, and so
    does the grey of each pixel. All four are linear and commute as long as nothing is cut off at black or white
    between them, so no order is drawn, and the four are one 3 x 3 matrix and one offset per image. Values are cut
    off before the blur and rounded once, at the end.

    Args:
        images: [C, 3, H, W] uint8.
        draws: what to do with each of them.

    Returns:
        [C, 3, H, W] uint8.

    Raises:
        ValueError: if there are not as many draws as images.
    """
    if len(draws.sigma) != len(images):
        raise ValueError(f"expected draws for {len(images)} images, found {len(draws.sigma)}")
    coloured = _change_colours(images.float(), draws)
    return _blur(coloured, draws.sigma).round_().to(torch.uint8)


def _change_colours(pixels: Tensor, draws: Draws) -> Tensor:
    flat = pixels.flatten(2)  # [C, 3, H * W]
    matrix, share = _colour_matrices(draws)
    greys = flat.mean(dim=2) @ torch.tensor(LUMA)  # [C]
    changed = torch.baddbmm((share * greys)[:, None, None], matrix, flat)
    return changed.clamp_(0, 255).view_as(pixels)


def _colour_matrices(draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns matrices over RGB [C, 3, 3] and, per image, the share of its mean grey to add to all channels [C]."""
    angle = -2 * math.pi * draws.hue  # in the plane of I and Q, yellow lies clockwise of red
    yiq = np.zeros((len(angle), 3, 3))
    yiq[:, 0, 0] = 1
    yiq[:, 1, 1] = yiq[:, 2, 2] = draws.saturation * np.cos(angle)
    yiq[:, 2, 1] = draws.saturation * np.sin(angle)
    yiq[:, 1, 2] = -yiq[:, 2, 1]
    gain = draws.brightness * draws.contrast
    matrix = gain[:, None, None] * (YIQ_TO_RGB @ yiq @ RGB_TO_YIQ)
    return torch.from_numpy(matrix).float(), torch.from_numpy(draws.brightness * (1 - draws.contrast)).float()


def _blur(pixels: Tensor, sigma: NDArray[np.float64]) -> Tensor:
    """Blurs each image by its own sigma, rows and columns apart, mirrored at the edges."""
    if not sigma.any():
        return pixels
    reach = math.ceil(BLUR_REACH * sigma.max())
    for axis in (2, 3):
        # mirroring needs one pixel more than it reaches, so small pictures have shorter kernels
        pixels = _blur_axis(pixels, gaussian_kernels(sigma, min(reach, pixels.shape[axis] - 1)), axis)
    return pixels


def gaussian_kernels(sigma: NDArray[np.float64], reach: int) -> Tensor:
    """Returns one kernel per standard deviation, float32 [C, 2 * reach + 1], rows summing to 1; sigma 0 is identity."""
    distance = np.arange(-reach, reach + 1)
    safe = np.maximum(sigma, 1e-3)[:, None]  # next to nothing: all weight on the centre, without 0 / 0
    kernels = np.exp(-0.5 * (distance / safe) ** 2)
    return torch.from_numpy(kernels / kernels.sum(1, keepdims=True)).float()


def _blur_axis(pixels: Tensor, kernels: Tensor, axis: int) -> Tensor:
    # A sum of shifted copies: grouped convolutions of oneDNN take 10 times as long at 256 x 256 on one thread.
    reach, length = kernels.shape[1] // 2, pixels.shape[axis]
    padded = F.pad(pixels, (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0), mode="reflect")
    blurred = torch.zeros_like(pixels)
    for shift, weight in enumerate(kernels.T[..., None, None, None]):  # [C, 1, 1, 1]
        blurred.addcmul_(padded.narrow(axis, shift, length), weight)
    return blurred
