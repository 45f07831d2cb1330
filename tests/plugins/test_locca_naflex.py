"""`locca` on images at their own aspect ratio: padding is not read, and boxes stay where they are."""

# B images, R = 3 B sequences, T tokens, N image tokens

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from siglip2.core.data.fields import Sample
from siglip2.core.data.loader import Maker, join
from siglip2.core.functional import unpatchify
from siglip2.core.native import native_grid, native_patches
from siglip2.core.step import Step
from siglip2.core.views import IMAGE, Context
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.locca import LocCa
from siglip2.plugins.naflex import NaFlex
from siglip2.testing import tiny_model, tiny_tokenizer

BUDGET = 20
NATIVE = NaFlex(seq_lens=[BUDGET], batch_size=4, table=4, eval_seq_len=BUDGET).patchifier()
SIZES = [(64, 64), (40, 250), (300, 36), (50, 90)]  # height, width
BOXES = [(0.25, 0.25, 0.75, 0.5), (0.5, 0.2, 0.9, 0.8), (0.2, 0.6, 0.8, 0.9), (0.1, 0.1, 0.4, 0.9)]


class Shapes:
    """One white box on black per picture: square, wide, tall and in between."""

    name = "shapes"

    def __len__(self):
        return len(SIZES)

    def read(self, i):
        (height, width), box = SIZES[i], BOXES[i]
        picture = Image.new("RGB", (width, height))
        corners = [round(share * side) for share, side in zip(box, (width, height) * 2, strict=True)]
        ImageDraw.Draw(picture).rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill="white")
        stored = io.BytesIO()
        picture.save(stored, "PNG")
        meta = {"caption": f"a picture, number {i}", "regions": [{"box": box, "caption": f"a white box, number {i}"}]}
        return Sample(str(i), self.name, {"png": stored.getvalue(), "json": json.dumps(meta).encode()})


@pytest.fixture
def towers():
    return stirred(tiny_model(grid=(4, 4)), 1).eval()


@pytest.fixture
def plugin(towers):
    torch.manual_seed(3)
    plugin = LocCa(length=64)
    plugin.setup(towers)
    return stirred(plugin, 2)


def stirred(module, seed):
    """Moves every parameter off its start, so that nothing is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def batch_of(plugin, patchifier=NATIVE):
    maker = Maker(Shapes(), patchifier, tiny_tokenizer(), seed=0)
    layout = patchifier.layout(0)
    rows = [maker.row(i, position=i, views=plugin.views(), layout=layout) for i in range(len(SIZES))]
    return join(rows, size=len(SIZES), index=0)


def alone(batch, number):
    """One sample as a batch of its own, its image without padding and without mask."""
    picture = Shapes().read(number).image()
    grid = native_grid(*picture.shape[1:], patch_size=16, max_patches=BUDGET)
    selected = batch.select(torch.tensor([number]))
    return replace(selected, views={**selected.views, "image": native_patches(picture, grid, 16)})


def loss_and_gradients(plugin, towers, batch):
    loss = plugin.loss(Step(towers, batch, progress=0.0))
    read = [*plugin.decoder.parameters(), *towers.vision.embed.parameters(), *towers.vision.blocks.parameters()]
    return loss, torch.autograd.grad(loss, [*read, towers.vision.pos_embed])


def test_loss_and_gradients_of_a_padded_batch_are_the_mean_of_its_images_alone(plugin, towers):
    batch = batch_of(plugin)
    assert len(set(batch.views["image"].valid.sum(1).tolist())) > 2
    assert batch.views["locca"][:, 1].any(1).all()  # every image has all three sequences
    loss, gradients = loss_and_gradients(plugin, towers, batch)
    singles = [loss_and_gradients(plugin, towers, alone(batch, i)) for i in range(len(SIZES))]
    assert len({round(single.item(), 4) for single, _ in singles}) == len(SIZES)
    expected = sum(single.double() for single, _ in singles) / len(SIZES)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for found, *parts in zip(gradients, *(g for _, g in singles), strict=True):
        wanted = sum(parts) / len(SIZES)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def test_what_padding_holds_moves_neither_loss_nor_gradients(plugin, towers):
    batch = batch_of(plugin)
    images = batch.views["image"]
    noise = torch.randint(0, 256, images.patches.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    patches = torch.where(images.valid[..., None], images.patches, noise)
    assert not torch.equal(patches, images.patches)
    other = replace(batch, views={**batch.views, "image": replace(images, patches=patches)})
    (loss, gradients), (again, others) = (loss_and_gradients(plugin, towers, b) for b in (batch, other))
    assert loss.item() == again.item()
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_white_box_lies_at_the_same_shares_of_the_image_after_the_resize(number):
    picture = Shapes().read(number).image()
    images = NATIVE(picture, IMAGE, NATIVE.layout(0))
    rows, columns = images.sizes[0, 0].tolist()
    seen = unpatchify(images.patches[0, images.valid[0]], (rows, columns)).float().mean(0) > 127
    (ys, xs), (height, width) = np.nonzero(seen.numpy()), seen.shape
    found = (xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height)
    assert found == pytest.approx(BOXES[number], abs=0.02)


def test_sequences_about_boxes_are_the_same_at_any_aspect_ratio(plugin):
    views = batch_of(plugin).views
    squashed = batch_of(plugin, Fixed(image_size=64, batch_size=4).patchifier()).views
    assert torch.equal(views["locca"], squashed["locca"])
    assert torch.equal(views["locca_parallel"], squashed["locca_parallel"])


def test_boxes_that_are_learned_are_shares_of_wide_and_tall_images(plugin):
    tokenizer = tiny_tokenizer()
    (view,) = (v for v in plugin.views() if v.name == "locca")
    for number, box in enumerate(BOXES):
        context = Context((0, number), NATIVE, NATIVE.layout(0), tokenizer)
        refer = view(Shapes().read(number), context)[1]  # [2, T]: a text, then its box
        counted = refer[0][refer[1] == 1]
        assert plugin.prompts.boxes.read(tokenizer.decode(counted.tolist())) == pytest.approx(box, abs=1 / 500)


@torch.no_grad()
def test_decoder_writes_the_same_about_padded_and_unpadded_images(plugin, towers):
    batch, tokenizer = batch_of(plugin), tiny_tokenizer()
    together = towers.encode_image(batch.views["image"])
    captions = plugin.caption(together.tokens, tokenizer, valid=together.valid)
    singles = [towers.encode_image(alone(batch, i).views["image"]) for i in range(len(SIZES))]
    assert captions == [plugin.caption(image.tokens, tokenizer)[0] for image in singles]
    assert len(set(captions)) > 1
