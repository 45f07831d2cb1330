"""Decoding writes the likeliest tokens, the same with and without a cache, and what was trained is what it writes."""

# B images, T tokens, N image tokens, M their width, V vocabulary

import pytest
import torch

from siglip2.core.batch import Batch, collate
from siglip2.core.layout import Layout
from siglip2.core.model.sizes import Shape
from siglip2.core.step import Step
from siglip2.core.views import Context
from siglip2.plugins.locca import LocCa, Prefixes
from siglip2.plugins.locca.decoder import Decoder
from siglip2.plugins.locca.decoding import FREE, forced, greedy
from siglip2.testing import TinySource, tiny_model, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER

SHAPE = Shape(width=16, depth=2, mlp_dim=24, num_heads=4)
V, T, B, N, M = 11, 9, 5, 6, 20
EOS, PAD = 1, 3


def make_decoder(*, fused=True):
    torch.manual_seed(0)
    decoder = Decoder(SHAPE, vocab_size=V, length=T, memory_width=M, fused_attention=fused)
    torch.nn.init.normal_(decoder.out.weight)
    return decoder


def images(valid=False):
    memory = torch.randn(B, N, M, generator=torch.Generator().manual_seed(1))
    return memory, torch.arange(N) < torch.tensor([[6], [3], [1], [5], [2]]) if valid else None


PROMPTS = [[4, 5], [6], [], [7, 8, 9, 2], [4, 5, 6]]


def one_by_one(decoder, memory, prompt, *, valid=None, eos=EOS):
    """The same by whole forward passes, each over all that is written so far."""
    written, closed = list(prompt), False
    while len(written) < T and not closed:
        inputs = torch.tensor([[0, *written]])
        with torch.no_grad():
            hidden = decoder(inputs, memory[None], parallel_R=torch.tensor([False]), valid_BN=valid)
        written.append(int(decoder.out(hidden[0, -1]).argmax()))
        closed = written[-1] == eos
    return written + [PAD] * (T - len(written))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_decoding_with_a_cache_is_the_argmax_of_whole_passes(fused, padded):
    decoder, (memory, valid) = make_decoder(fused=fused), images(padded)
    found = greedy(decoder, memory, forced(PROMPTS, T), eos_id=EOS, pad_id=PAD, valid_BN=valid).tolist()
    rows = range(B)
    expected = [
        one_by_one(decoder, memory[i], PROMPTS[i], valid=None if valid is None else valid[i : i + 1]) for i in rows
    ]
    assert found == expected
    assert len({tuple(row) for row in found}) == B


def test_one_image_is_decoded_as_in_a_batch():
    decoder, (memory, _) = make_decoder(), images()
    together = greedy(decoder, memory, forced(PROMPTS, T), eos_id=EOS, pad_id=PAD)
    alone = [
        greedy(decoder, memory[i : i + 1], forced([prompt], T), eos_id=EOS, pad_id=PAD)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("eos", range(V))
def test_after_its_eos_a_row_is_padding_and_decoding_ends_with_the_last_row(eos, monkeypatch):
    decoder, (memory, _) = make_decoder(), images()
    steps = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    found = greedy(decoder, memory, forced(PROMPTS, T), eos_id=eos, pad_id=PAD).tolist()
    monkeypatch.undo()
    expected = [one_by_one(decoder, memory[i], PROMPTS[i], eos=eos) for i in range(B)]
    assert found == expected
    lengths = [
        next((t + 1 for t in range(len(p), T) if row[t] == eos), T) for row, p in zip(found, PROMPTS, strict=True)
    ]
    assert len(steps) == max(lengths)


def test_a_given_eos_does_not_end_a_row():
    decoder, (memory, _) = make_decoder(), images()
    row = greedy(decoder, memory[:1], forced([[4, EOS, 5]], T), eos_id=EOS, pad_id=PAD)[0].tolist()
    assert row[:3] == [4, EOS, 5]
    assert row == one_by_one(decoder, memory[0], [4, EOS, 5])


def test_prompts_are_given_and_the_rest_is_free():
    assert forced([[5, 6], [], [1, 2, 3, 4]], 3).tolist() == [[5, 6, FREE], [FREE] * 3, [1, 2, 3]]
    assert forced([], 3).shape == (0, 3)


# A decoder that knows eight pictures by heart.

PREFIXES = Prefixes("{language} cap: ", "{language} find: ", "{language} name: ")
PICTURES = 8


@pytest.fixture(scope="module")
def learned():
    """The plugin, the pictures' tokens and their texts, after training until it knows them."""
    torch.manual_seed(0)
    plugin, model = LocCa(length=40, bins=100, parallel=0.0, prefixes=PREFIXES), tiny_model()
    plugin.setup(model)
    samples = [TinySource().read(i) for i in range(PICTURES)]
    rows = []
    for i, sample in enumerate(samples):
        context = Context((0, i), PATCHIFIER, Layout(4, PICTURES), tiny_tokenizer(), {"en": 1.0})
        rows.append({view.name: view(sample, context) for view in plugin.views()})
    step = Step(model.requires_grad_(False), Batch(collate(rows), PICTURES, 0), progress=0.0)
    optimizer = torch.optim.Adam(plugin.parameters(), lr=5e-3)
    for _ in range(120):
        plugin.loss(step).backward()
        torch.nn.utils.clip_grad_norm_(plugin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    regions = [sample.get("regions")[0] for sample in samples]
    texts = [sample.captions()["en"][0] for sample in samples]
    return plugin, step.encode_image("image").tokens, texts, torch.tensor([region["box"] for region in regions])


def test_captions_are_those_of_the_pictures(learned):
    plugin, tokens, texts, _ = learned
    assert plugin.caption(tokens, tiny_tokenizer(), language="en") == texts
    assert plugin.caption(tokens.flip(0), tiny_tokenizer(), language="en") == texts[::-1]


def test_boxes_are_found_for_texts(learned):
    plugin, tokens, texts, boxes = learned
    found = plugin.locate(tokens, texts, tiny_tokenizer(), language="en")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, boxes, rtol=0, atol=0.5 / 100 + 1e-6)


def test_texts_are_found_for_boxes(learned):
    plugin, tokens, texts, boxes = learned
    assert plugin.describe(tokens, boxes, tiny_tokenizer(), language="en") == texts


def test_one_image_may_be_asked_for_several_texts(learned):
    plugin, tokens, texts, boxes = learned
    found = plugin.locate(tokens[3].expand(2, -1, -1), [texts[3], texts[3]], tiny_tokenizer(), language="en")
    torch.testing.assert_close(found, boxes[3].expand(2, 4), rtol=0, atol=0.5 / 100 + 1e-6)


def test_where_no_box_was_written_its_row_is_nan(learned):
    plugin, tokens, texts, _ = learned
    endless = "a red disc " * 40  # leaves no room for a box
    found = plugin.locate(tokens[:2], [texts[0], endless], tiny_tokenizer(), language="en")
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_an_untrained_decoder_writes_no_box_and_fails_nowhere():
    plugin, model = LocCa(length=40), tiny_model()
    plugin.setup(model)
    tokens, boxes = torch.zeros(2, 4, 64), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
    assert plugin.locate(tokens, ["a", "b"], tiny_tokenizer()).isnan().all()
    assert plugin.caption(tokens, tiny_tokenizer()) == plugin.describe(tokens, boxes, tiny_tokenizer()) == ["", ""]


def test_nothing_is_decoded_for_no_images(learned):
    plugin, tokens, _, boxes = learned
    assert plugin.caption(tokens[:0], tiny_tokenizer()) == []
    assert plugin.locate(tokens[:0], [], tiny_tokenizer()).shape == (0, 4)
    assert plugin.describe(tokens[:0], boxes[:0], tiny_tokenizer()) == []


def test_decoding_takes_tokens_of_lower_precision(learned):
    plugin, tokens, texts, _ = learned
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = plugin.caption(tokens, tiny_tokenizer(), language="en")
    assert under_autocast == plugin.caption(tokens.bfloat16(), tiny_tokenizer(), language="en") == texts


def test_as_many_texts_and_boxes_as_images_are_asked_for(learned):
    plugin, tokens, texts, boxes = learned
    with pytest.raises(ValueError, match="expected one image for each of the 3 texts, found 2: repeat"):
        plugin.locate(tokens[:2], texts[:3], tiny_tokenizer())
    with pytest.raises(ValueError, match="expected one image for each of the 8 boxes, found 2: repeat"):
        plugin.describe(tokens[:2], boxes, tiny_tokenizer())


def test_decoding_keeps_no_graph(learned):
    plugin, tokens, texts, _ = learned
    given = tokens.clone().requires_grad_()
    assert not plugin.locate(given, texts, tiny_tokenizer(), language="en").requires_grad
