"""Pictures of the report are those that the model saw, and what is said of them is said of the same picture."""

import json

import pytest
import torch
from pointer import Pointer, true_box
from torch.nn.functional import interpolate

from siglip2.core.batch import Batch
from siglip2.core.callbacks.examples import (
    SHOWN,
    box_examples,
    caption_examples,
    embed_some,
    patch_similarity,
    picture_examples,
    text_examples,
)
from siglip2.core.data.datamodule import caption_name, region_names
from siglip2.core.data.loader import EvalBatches, Maker
from siglip2.core.data.settings import ZeroShotSet
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.regions import RegionBox, RegionText
from siglip2.core.report import RunReport, write_report
from siglip2.core.views import CAPTION, IMAGE, LabelView, TextView
from siglip2.plugins.naflex import NaFlex
from siglip2.testing import TinySource, tiny_module, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER


@pytest.fixture
def module():
    return tiny_module([Pointer()]).eval()


def batches_of(*views, patchifier=PATCHIFIER):
    """All of `TinySource` in batches of six, the last one partly filled up."""
    return EvalBatches(Maker(TinySource(), patchifier, tiny_tokenizer(), 0), views, batch_size=6)


def test_box_examples_are_spread_over_the_set_with_languages_in_turn(module):
    names = {x: region_names(x) for x in ("en", "de")}
    views = [v for x, (text, box) in names.items() for v in (RegionText(text, x), RegionBox(box, x))]
    examples = box_examples(module, module.plugins["pointer"], batches_of(IMAGE, *views), ["en", "de"])
    assert len(examples) == SHOWN
    for turn, example in enumerate(examples):
        number = 2 * turn
        assert example.language == ("en", "de")[turn % 2]
        assert example.text.endswith(f"{'nummer' if turn % 2 else 'number'} {number}")
        assert example.true == pytest.approx(true_box(number))
        assert example.predicted == (None if number % 3 == 0 else pytest.approx(true_box(number)))
        assert example.image.shape == (32, 32, 3)


def test_caption_examples_hold_what_was_written_and_the_caption_of_that_picture(module):
    views = [TextView(caption_name(x), language=x) for x in ("en", "de")]
    examples = caption_examples(module, module.plugins["pointer"], batches_of(IMAGE, *views), ["en", "de"])
    assert [e.generated for e in examples] == SHOWN // 2 * ["en 4 tokens", "de 4 tokens"]
    source = TinySource()
    for turn, example in enumerate(examples):
        assert example.truth == source.read(2 * turn).captions()[example.language][0].lower()


# At their own aspect ratio.

BUDGET = 14
NATIVE = NaFlex(seq_lens=[BUDGET], batch_size=8, table=2, eval_seq_len=BUDGET)


def native_batches(*views):
    return batches_of(*views, patchifier=NATIVE.patchifier())


def picture(number):
    return TinySource().read(number).image()


def grid_of_sample(number):
    return native_grid(*picture(number).shape[1:], patch_size=16, max_patches=BUDGET)


class Careful(Pointer):
    """Writes how many tokens it may read, and can read nothing where padding is not marked."""

    name = "careful"

    def caption(self, tokens_BND, tokenizer, *, language="", valid=None):
        return [f"{int(row.sum())} of {len(row)}" for row in valid]

    def locate(self, tokens_BND, texts, tokenizer, *, language="", valid=None):
        assert valid.shape == tokens_BND.shape[:2]
        return super().locate(tokens_BND, texts, tokenizer, language=language)


@pytest.fixture
def native_module():
    module = tiny_module([NATIVE, Careful()]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def resized(number):
    """A picture at its grid in exact arithmetic, [H, W, 3]."""
    rows, columns = grid_of_sample(number)
    floats = picture(number)[None].double()
    return interpolate(floats, (16 * rows, 16 * columns), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def test_each_picture_is_shown_at_its_own_grid_without_padding(native_module):
    found = embed_some(native_module, native_batches(IMAGE, CAPTION), limit=100)
    assert len(found.pictures) == len(found.patches) == len(found.embedding) == 16  # no row that only fills up
    assert len({shown.shape for shown in found.pictures}) > 3
    for number, shown in enumerate(found.pictures):
        exact = resized(number)
        assert shown.shape == exact.shape
        assert (torch.from_numpy(shown.copy()) - exact).abs().max() <= 1


def test_only_as_many_pictures_are_embedded_as_are_asked_for(native_module):
    asked = []

    class Counted(EvalBatches):
        def __getitem__(self, index: int) -> Batch:
            asked.append(index)
            return super().__getitem__(index)

    batches = native_batches(IMAGE)
    found = embed_some(native_module, Counted(batches.maker, batches.views, batch_size=6), limit=6)
    assert asked == [0]
    assert len(found.patches) == 6


def test_decoder_is_told_which_tokens_are_padding(native_module):
    views = [TextView(caption_name("en"), language="en")]
    grounder = native_module.plugins["careful"]
    examples = caption_examples(native_module, grounder, native_batches(IMAGE, *views), ["en"])
    numbers = [2 * turn for turn in range(SHOWN)]
    expected = [f"{rows * columns} of {BUDGET}" for rows, columns in map(grid_of_sample, numbers)]
    assert [example.generated for example in examples] == expected
    assert len(set(expected)) > 1


def test_boxes_are_shares_of_a_picture_of_any_shape(native_module):
    text, box = region_names("en")
    views = [RegionText(text, "en"), RegionBox(box, "en")]
    examples = box_examples(native_module, native_module.plugins["careful"], native_batches(IMAGE, *views), ["en"])
    assert len(examples) == SHOWN
    for turn, example in enumerate(examples):
        rows, columns = grid_of_sample(2 * turn)
        assert example.image.shape == (16 * rows, 16 * columns, 3)
        assert example.true == pytest.approx(true_box(2 * turn))


def test_similarity_with_every_patch_has_the_grid_of_the_image_and_no_padding(native_module):
    vision = native_module.model.vision
    vector = torch.randn(vision.width, generator=torch.Generator().manual_seed(1))
    vector = vector / vector.norm()
    for number in (0, 7, 15):
        grid = grid_of_sample(number)
        alone = native_patches(picture(number), grid, 16)
        with torch.no_grad():
            tokens = vision(alone).tokens[0]
            expected = torch.stack(
                [torch.cosine_similarity(vision.pool(t[None, None])[0], vector, dim=0) for t in tokens]
            )
            found = patch_similarity(vision, padded(alone, BUDGET + 5), vector)
        assert found.shape == grid
        torch.testing.assert_close(found, expected.reshape(grid), rtol=0, atol=1e-5)


def test_report_holds_pictures_of_several_shapes(native_module, tmp_path):
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": [{"names": {"en": f"thing {i}"}} for i in range(8)]}))
    settings = ZeroShotSet(path="", classes=str(classes))
    images, heatmaps = picture_examples(native_module, native_batches(IMAGE, LabelView()), settings)
    texts = text_examples(native_module, native_batches(IMAGE, CAPTION), None, "caption")
    assert len(images) == len(heatmaps) == len(texts) == SHOWN
    for turn, (example, heatmap) in enumerate(zip(images, heatmaps, strict=True)):
        grid = grid_of_sample(2 * turn)
        assert example.image.shape == heatmap.image.shape == (16 * grid[0], 16 * grid[1], 3)
        assert heatmap.similarity.shape == grid
    assert len({shown.shape for example in texts for shown in example.images}) > 1
    report = RunReport("title", "subtitle", image_to_text=images, heatmaps=heatmaps, text_to_image=texts)
    path = write_report(report, tmp_path / "report.html")
    pictures = SHOWN + 2 * SHOWN + sum(len(example.images) for example in texts)
    assert path.read_text().count("data:image/webp") == pictures
