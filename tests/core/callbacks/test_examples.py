"""What a decoder wrote, beside the truth of the same picture."""

import pytest
from pointer import Pointer, true_box

from siglip2.core.callbacks.examples import SHOWN, box_examples, caption_examples
from siglip2.core.data.datamodule import caption_name, region_names
from siglip2.core.data.loader import EvalBatches, Maker
from siglip2.core.regions import RegionBox, RegionText
from siglip2.core.views import IMAGE, TextView
from siglip2.testing import TinySource, tiny_module, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER


@pytest.fixture
def module():
    return tiny_module([Pointer()]).eval()


def batches_of(*views):
    """All of `TinySource` in batches of six, the last one partly filled up."""
    return EvalBatches(Maker(TinySource(), PATCHIFIER, tiny_tokenizer(), 0), views, batch_size=6)


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
