"""Crop views against torchvision: where crops lie, their pixels, and nothing but the context's random numbers."""

import io
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from siglip2.core.augment import UNCHANGED, Photometric
from siglip2.core.crops import GLOBAL, LOCAL, CropView, draw_boxes
from siglip2.core.data.fields import Sample
from siglip2.core.functional import unpatchify
from siglip2.core.views import IMAGE, Context
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.testing.tiny import PATCHIFIER, TinySource, fake_batch, same, tiny_tokenizer

SMALL_LOCAL = replace(LOCAL, size=16)
PLAIN = CropView("plain", 4, (0.05, 0.4), size=24, flip=0.0, photometric=UNCHANGED)


def sample_of(height, width, seed=0):
    return sample_with(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample_with(pixels_HW3):
    stored = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stored, "PNG")
    return Sample("0", "here", {"png": stored.getvalue()})


def context(position=0, patchifier=PATCHIFIER):
    return Context((0, position, 3), patchifier, patchifier.layout(0), tiny_tokenizer())


@dataclass(frozen=True)
class Oblong(FixedPatchifier):
    """A patchifier whose grid is not square."""

    @property
    def grid(self):
        return 2, 3


def test_global_and_local_views_are_those_of_silc():
    assert (GLOBAL.name, GLOBAL.copies, GLOBAL.scale, GLOBAL.size) == ("global", 1, (0.4, 1.0), None)
    assert (LOCAL.name, LOCAL.copies, LOCAL.scale, LOCAL.size) == ("local", 8, (0.05, 0.4), None)
    assert GLOBAL.photometric == Photometric(blur=1.0)
    assert LOCAL.photometric == Photometric(blur=0.5)


@pytest.mark.parametrize(
    ("view", "copies", "grid"), [(GLOBAL, 1, (2, 2)), (LOCAL, 8, (1, 1)), (SMALL_LOCAL, 8, (1, 1))]
)
def test_view_is_uint8_patches_of_one_grid(view, copies, grid):
    made = view(sample_of(50, 70), context())
    num_patches = grid[0] * grid[1]
    assert made.patches.shape == (copies, num_patches, 16 * 16 * 3)
    assert made.patches.dtype == torch.uint8
    assert made.coords.shape == (1, num_patches, 2)
    assert made.coords[0, -1].tolist() == [grid[0] - 1, grid[1] - 1]
    assert (made.grid, made.valid) == (grid, None)


def test_size_of_none_is_the_grid_of_the_patchifier_even_if_it_is_not_square():
    oblong = Oblong(image_size=32, patch_size=16, batch_size=8, filter="bilinear", antialias=True)
    made = GLOBAL(sample_of(50, 70), context(patchifier=oblong))
    assert (made.grid, made.patches.shape[1]) == ((2, 3), 6)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "pixels"),
    [(256, 16, 96), (224, 16, 80), (384, 16, 144), (512, 16, 192), (224, 14, 84), (384, 14, 140), (256, 32, 96)],
)
def test_local_crops_are_three_eighths_of_the_image_in_whole_patches(image_size, patch_size, pixels):
    patchifier = FixedPatchifier(image_size, patch_size, 8, "bilinear", True)
    made = LOCAL(sample_of(50, 70), context(patchifier=patchifier))
    assert made.grid == (pixels // patch_size, pixels // patch_size)


def test_pixels_beyond_the_last_whole_patch_are_dropped():
    assert PLAIN(sample_of(50, 70), context()).grid == (1, 1)


def test_crops_depend_on_the_position_and_on_nothing_else():
    for view in (GLOBAL, SMALL_LOCAL):
        sample = sample_of(50, 70)
        first = view(sample, context())
        torch.manual_seed(1)
        np.random.seed(1)
        assert same(first, view(sample, context()))
        assert not same(first, view(sample, context(position=1)))


def test_copies_of_a_sample_differ():
    made = SMALL_LOCAL(sample_of(50, 70), context())
    assert len({copy.numpy().tobytes() for copy in made.patches}) == 8


@pytest.mark.parametrize("i", [0, 5, 15])
def test_whole_picture_without_changes_is_the_plain_image(i):
    whole = CropView("image", 1, (1.0, 1.0), flip=0.0, photometric=UNCHANGED)
    assert same(whole(TinySource().read(i), context()), IMAGE(TinySource().read(i), context()))


@pytest.mark.parametrize("size", [(50, 70), (300, 20), (1, 60)])
def test_pixels_are_those_of_torchvisions_resized_crop(size):
    sample, view = sample_of(*size), replace(PLAIN, size=32)
    made = unpatchify(view(sample, context()).patches, (2, 2))
    boxes = draw_boxes(context().rng, 4, height=size[0], width=size[1], scale=view.scale)
    for crop, box in zip(made, boxes.tolist(), strict=True):
        expected = resized_crop(
            sample.image(), *box, size=[32, 32], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        assert torch.equal(crop, expected)


def test_flip_mirrors_the_crop_and_nothing_else():
    sample, view = sample_of(50, 70), replace(PLAIN, size=32)
    straight = unpatchify(view(sample, context()).patches, (2, 2))
    mirrored = unpatchify(replace(view, flip=1.0)(sample, context()).patches, (2, 2))
    assert torch.equal(mirrored, straight.flip(-1))


def test_half_of_the_copies_are_flipped():
    dark_left = np.zeros((8, 8, 3), dtype=np.uint8)
    dark_left[:, 4:] = 255
    view = CropView("flips", 4000, (1.0, 1.0), size=16, photometric=UNCHANGED)
    flipped = unpatchify(view(sample_with(dark_left), context()).patches, (1, 1))[:, 0, 0, 0] > 128
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_boxes_have_the_areas_and_aspect_ratios_that_were_asked_for(scale):
    boxes = draw_boxes(np.random.default_rng(0), 5000, height=400, width=500, scale=scale)
    top, left, height, width = boxes.T
    share, ratio = height * width / (400 * 500), width / height
    assert scale[0] - 0.01 < share.min() < scale[0] + 0.05
    assert scale[1] - 0.05 < share.max() < scale[1] + 0.01
    assert 0.73 < ratio.min() < 0.78
    assert 1.30 < ratio.max() < 1.37
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 400
    assert (left + width).max() == 500


def test_upright_and_lying_boxes_are_equally_likely():
    boxes = draw_boxes(np.random.default_rng(0), 5000, height=400, width=400, scale=(0.05, 0.4))
    assert abs(np.log(boxes[:, 3] / boxes[:, 2]).mean()) < 0.01  # were the ratio itself uniform: 0.027


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_boxes_are_distributed_as_torchvisions(scale):
    count, size = 3000, (60, 90)
    picture = torch.zeros(3, *size)
    transform = RandomResizedCrop(8, scale=scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [transform.make_params([picture]) for _ in range(count)]
    theirs = np.array([[box[side] for side in ("top", "left", "height", "width")] for box in theirs])
    ours = draw_boxes(np.random.default_rng(0), count, height=size[0], width=size[1], scale=scale)
    for mine, other in zip(ours.T, theirs.T, strict=True):
        error = (mine.std() ** 2 / count + other.std() ** 2 / count) ** 0.5
        assert abs(mine.mean() - other.mean()) < 5 * error
        assert mine.std() == pytest.approx(other.std(), rel=0.1)


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 60), (60, 1), (1, 1)])
def test_box_that_cannot_fit_is_torchvisions_fallback(size):
    transform = RandomResizedCrop(8, scale=(0.9, 0.95))  # no aspect ratio of 3/4 to 4/3 has this area here
    box = transform.make_params([torch.zeros(3, *size)])
    expected = [box[side] for side in ("top", "left", "height", "width")]
    ours = draw_boxes(np.random.default_rng(0), 3, height=size[0], width=size[1], scale=(0.9, 0.95))
    assert ours.tolist() == [expected] * 3


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 60)])
def test_scale_of_one_is_the_whole_picture_of_any_aspect_ratio(size):
    boxes = draw_boxes(np.random.default_rng(0), 3, height=size[0], width=size[1], scale=(1.0, 1.0))
    assert boxes.tolist() == [[0, 0, *size]] * 3


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 1), (2, 3), (7, 5)])
@pytest.mark.parametrize("view", [GLOBAL, SMALL_LOCAL])
def test_tiny_pictures_give_whole_views(size, view):
    made = view(sample_of(*size), context())
    assert made.patches.shape[0] == view.copies
    assert made.patches.float().isfinite().all()


def test_views_are_made_in_batches_copies_first():
    batch = fake_batch([GLOBAL, SMALL_LOCAL], 3)
    assert batch.views["global"].patches.shape == (3, 4, 768)
    assert batch.views["local"].patches.shape == (24, 1, 768)
    alone = fake_batch([SMALL_LOCAL], 1, first=1).views["local"].patches
    assert torch.equal(batch.views["local"].patches[1::3], alone)


def test_crops_without_a_whole_patch_are_an_error():
    with pytest.raises(ValueError, match="view 'local': crops of 12 pixels hold no patch of 16"):
        replace(LOCAL, size=12)(sample_of(50, 70), context())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies is 0, expected at least 1"),
        ({"scale": (0.0, 0.4)}, "expected 0 < smallest <= largest <= 1"),
        ({"scale": (0.5, 0.4)}, "expected 0 < smallest <= largest <= 1"),
        ({"scale": (0.5, 1.4)}, "expected 0 < smallest <= largest <= 1"),
        ({"flip": 1.5}, "expected a probability"),
    ],
)
def test_view_that_cannot_be_made_is_an_error(changes, message):
    with pytest.raises(ValueError, match=f"view 'local': .*{message}"):
        replace(LOCAL, **changes)


def test_view_is_frozen_and_travels_to_a_worker():
    assert pickle.loads(pickle.dumps(LOCAL)) == LOCAL
    assert hash(LOCAL) == hash(replace(LOCAL))
    with pytest.raises(FrozenInstanceError):
        LOCAL.copies = 4
