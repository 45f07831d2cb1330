"""`locca`: the decoder is CapPa's, its loss is the equation, and its gradient reaches what it should and no more."""

# B images, R = 3 B sequences, T tokens, N image tokens, M their width, D width of the decoder, V vocabulary

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from siglip2.core.data.fields import Sample
from siglip2.core.data.loader import Maker, join
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Layout
from siglip2.core.model.sizes import Shape
from siglip2.core.step import Step
from siglip2.core.views import IMAGE
from siglip2.plugins.locca import LocCa, Prefixes
from siglip2.plugins.locca.decoder import Decoder, attend, attention_mask, decoder_inputs, mean_weights
from siglip2.plugins.locca.sequences import BoxText, CoinView, LocCaView, Prompts
from siglip2.registry import catalogue
from siglip2.testing import TinySource, fake_batch, tiny_model, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER

SHAPE = Shape(width=16, depth=2, mlp_dim=24, num_heads=4)
V, T, B, N, M = 11, 5, 2, 6, 20


def stirred(decoder, seed=1):
    """Fills what begins at zero or one, so that nothing is invisible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if "norm" in name or name.startswith("out"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def make_decoder(*, fused=True, length=T):
    torch.manual_seed(0)
    return stirred(Decoder(SHAPE, vocab_size=V, length=length, memory_width=M, fused_attention=fused))


def make_inputs(seed=2):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, V + 1, (3 * B, T), generator=generator)
    memory = torch.randn(B, N, M, generator=generator)
    parallel = torch.tensor([True, False, False, False, True, False])
    return inputs, memory, parallel


# The equations in float64, one sequence and one head at a time.


def doubles(decoder):
    """Its parameters by name in float64, for gradients that are not the decoder's own."""
    return {name: p.detach().double().requires_grad_() for name, p in decoder.named_parameters()}


def norm(x, weight, bias=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def attention(x, y, wq, wk, wv, wo, *, sees, num_heads):
    """Every query of x [T, D] looks at the rows of y [N, M] that `sees`, bool [T, N], allows."""
    d = wq.shape[0] // num_heads
    heads = []
    for h in range(num_heads):
        rows = slice(h * d, (h + 1) * d)
        e = ((x @ wq[rows].T) @ (y @ wk[rows].T).T / math.sqrt(d)).exp() * sees
        heads.append(e @ (y @ wv[rows].T) / e.sum(-1, keepdim=True))
    return torch.cat(heads, dim=-1) @ wo.T


def by_hand(w, ids, image, *, parallel, num_heads, valid=None):
    """One sequence [T] about one image [N, M] through the decoder whose parameters are w: [T, D]."""
    among = torch.ones(len(ids), len(ids), dtype=torch.float64)
    among = among if parallel else among.tril()
    at = torch.ones(len(ids), len(image), dtype=torch.float64) * (1 if valid is None else valid)
    x = w["token_embed.weight"][ids] + w["pos_embed"][: len(ids)]
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items()}
        y, o = norm(x, b["norm1.weight"]), b["self_attn.proj.weight"]
        x = x + attention(y, y, *b["self_attn.qkv.weight"].chunk(3), o, sees=among, num_heads=num_heads)
        y, q, o = norm(x, b["norm2.weight"]), b["cross_attn.q.weight"], b["cross_attn.proj.weight"]
        x = x + attention(y, image, q, *b["cross_attn.kv.weight"].chunk(2), o, sees=at, num_heads=num_heads)
        y = norm(x, b["norm3.weight"]) @ b["mlp.fc1.weight"].T
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ b["mlp.fc2.weight"].T
    return norm(x, w["norm.weight"], w["norm.bias"])


def assert_near(found, expected, *, rtol=1e-4):
    """Compares float32 with float64, to a share of the largest number: small ones are sums of large ones."""
    assert expected.abs().max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_decoder_and_all_of_its_gradients_are_those_of_cappa(fused, padded):
    decoder, (inputs, memory, parallel) = make_decoder(fused=fused), make_inputs()
    valid = torch.arange(N) < torch.tensor([[N], [2]]) if padded else None
    hidden = decoder(inputs, memory.requires_grad_(), parallel_R=parallel, valid_BN=valid)
    w, image = doubles(decoder), memory.detach().double().requires_grad_()
    rows = [  # row c * B + i is about image i
        by_hand(
            w, inputs[r], image[r % B], parallel=parallel[r], num_heads=4, valid=None if valid is None else valid[r % B]
        )
        for r in range(3 * B)
    ]
    expected = torch.stack(rows)
    assert_near(hidden, expected, rtol=1e-5)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    hidden.backward(direction)
    expected.backward(direction.double())
    assert_near(memory.grad, image.grad)
    for name, parameter in decoder.named_parameters():
        if not name.startswith("out."):  # makes logits, which are not made here
            assert_near(parameter.grad, w[name].grad)


def test_three_sequences_about_an_image_are_decoded_as_if_alone():
    decoder, (inputs, memory, parallel) = make_decoder(), make_inputs()
    together = decoder(inputs, memory, parallel_R=parallel)
    alone = [decoder(i, memory, parallel_R=p) for i, p in zip(inputs.chunk(3), parallel.chunk(3), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_padded_image_tokens_are_not_read():
    decoder, (inputs, memory, parallel) = make_decoder(), make_inputs()
    valid = torch.arange(N) < torch.tensor([[4], [3]])
    other = torch.where(valid[..., None], memory, 100.0)
    hidden = decoder(inputs, memory, parallel_R=parallel, valid_BN=valid)
    assert torch.equal(hidden, decoder(inputs, other, parallel_R=parallel, valid_BN=valid))


@pytest.mark.parametrize("changed", range(T))
def test_a_token_moves_only_later_ones_unless_all_are_predicted_at_once(changed):
    decoder, (inputs, memory, parallel) = make_decoder(), make_inputs()
    other = inputs.clone()
    other[:, changed] = (other[:, changed] + 1) % V
    moved = (decoder(inputs, memory, parallel_R=parallel) != decoder(other, memory, parallel_R=parallel)).any(dim=2)
    expected = (torch.arange(T) >= changed) | parallel[:, None]
    assert torch.equal(moved, expected)


def test_attention_with_and_without_the_fused_kernel_is_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (5, 7, 7))
    for mask in (None, torch.rand(2, 1, 5, 7, generator=generator) > 0.4):
        torch.testing.assert_close(attend(q, k, v, mask, fused=True), attend(q, k, v, mask, fused=False))


def test_attention_masks():
    mask = attention_mask(torch.tensor([False, True]), 3)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1].all()


def test_decoder_has_the_published_parameters_and_initialisation():
    torch.manual_seed(0)
    decoder = Decoder(Shape(64, depth=1, mlp_dim=96, num_heads=4), vocab_size=300, length=12, memory_width=80)
    matrices = {  # shape and standard deviation
        "pos_embed": (12, 64, 64**-0.5),
        "token_embed.weight": (301, 64, 1.0),
        "blocks.0.self_attn.qkv.weight": (192, 64, 64**-0.5),
        "blocks.0.self_attn.proj.weight": (64, 64, 64**-0.5),
        "blocks.0.cross_attn.q.weight": (64, 64, 64**-0.5),
        "blocks.0.cross_attn.kv.weight": (128, 80, 80**-0.5),
        "blocks.0.cross_attn.proj.weight": (64, 64, 64**-0.5),
        "blocks.0.mlp.fc1.weight": (96, 64, math.sqrt(2 / (64 + 96))),
        "blocks.0.mlp.fc2.weight": (64, 96, math.sqrt(2 / (64 + 96))),
        "out.weight": (300, 64, 0.0),
    }
    vectors = {"norm.weight", "norm.bias", "out.bias", *(f"blocks.0.norm{i}.weight" for i in (1, 2, 3))}
    found = dict(decoder.named_parameters())
    assert found.keys() == matrices.keys() | vectors
    for name, (rows, columns, std) in matrices.items():
        assert found[name].shape == (rows, columns)
        assert found[name].std().item() == pytest.approx(std, rel=0.06)
    assert all(m.eps == 1e-6 for m in decoder.modules() if isinstance(m, nn.LayerNorm))


# What is read, and what counts.


def test_inputs_are_moved_behind_a_zero_or_hidden_behind_the_prefix():
    ids = torch.tensor([[7, 8, 9, 1, 0], [7, 8, 9, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.int32)
    counted = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.int32)
    inputs = decoder_inputs(ids, counted, torch.tensor([False, True, False]), mask_id=50)
    assert inputs.tolist() == [[0, 7, 8, 9, 1], [7, 50, 50, 50, 50], [0, 0, 0, 0, 0]]


def test_weights_are_a_mean_over_tokens_then_over_all_sequences():
    counted = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.int32)
    expected = torch.tensor([[0, 1 / 6, 1 / 6, 0], [0, 0, 0, 0], [1 / 3, 0, 0, 0]])
    torch.testing.assert_close(mean_weights(counted), expected)


@pytest.fixture
def towers():
    return tiny_model()


def make_plugin(towers, *, stir=True, **options):
    torch.manual_seed(3)
    plugin = LocCa(**{"length": 40, **options})
    plugin.setup(towers)
    if stir:
        stirred(plugin.decoder)
    return plugin


def toy_batch(plugin, regions, captions):
    """A batch of TinySource's pictures with other regions and captions."""

    class Source(TinySource):
        def read(self, i):
            meta = {"caption": captions[i], "regions": regions[i]}
            return Sample(str(i), "toy", {**super().read(i).record, "json": json.dumps(meta).encode()})

    maker, views = Maker(Source(), PATCHIFIER, tiny_tokenizer(), seed=0), plugin.views()
    rows = [maker.row(i, position=i, views=views, layout=Layout(4, 8)) for i in range(len(captions))]
    return join(rows, size=len(captions), index=0)


def by_equation(weight, bias, hidden, ids, counted):
    """Mean over sequences of the mean over their counted tokens of -log softmax, in float64, a token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for r in range(len(ids)):
        terms = []
        for t in range(ids.shape[1]):
            if counted[r, t]:
                logits = weight @ hidden[r][t] + bias
                terms.append(logits.exp().sum().log() - logits[int(ids[r, t])])
        if terms:
            total = total + torch.stack(terms).sum() / len(terms)
    return total / len(ids)


def inputs_by_hand(ids, counted, coins, mask_id):
    rows = []
    for r, (row, flags) in enumerate(zip(ids.tolist(), counted.tolist(), strict=True)):
        if r < len(coins) and coins[r]:
            first = flags.index(1)
            rows.append(row[:first] + [mask_id] * (len(row) - first))
        else:
            rows.append([0, *row[:-1]])
    return torch.tensor(rows)


def test_loss_and_gradient_are_the_equation_in_float64(towers):
    plugin = make_plugin(towers)
    batch = fake_batch(plugin.views(), 4)
    ids, counted = batch.views["locca"][:, 0], batch.views["locca"][:, 1]
    coins = batch.views["locca_parallel"].tolist()
    assert 0 < sum(coins) < 4
    assert (counted[:8] != counted[:8, :1]).any()
    counted[5] = 0  # as if a picture had no region
    step = Step(towers, batch, progress=0.0)
    tokens, names = step.encode_image("image").tokens, dict(plugin.decoder.named_parameters())
    loss = plugin.loss(step)
    found = torch.autograd.grad(loss, [*names.values(), tokens])

    inputs = inputs_by_hand(ids, counted, coins, towers.text.token_embed.num_embeddings)
    parallel = coins + [False] * 8
    w, image, num_heads = (
        doubles(plugin.decoder),
        tokens.detach().double().requires_grad_(),
        towers.text.shape.num_heads,
    )
    hidden = [by_hand(w, inputs[r], image[r % 4], parallel=parallel[r], num_heads=num_heads) for r in range(12)]
    expected = by_equation(w["out.weight"], w["out.bias"], hidden, ids, counted)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected, [*w.values(), image])
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)


def test_neither_prefix_nor_padding_counts(towers):
    plugin = make_plugin(towers, stir=False)
    bias = torch.randn(plugin.decoder.out.bias.shape, generator=torch.Generator().manual_seed(0))
    plugin.decoder.out.bias.data = bias  # with a zero kernel each token costs log sum exp(bias) - bias
    captions = ["a red disc", "a gold box, number 12"]
    loss = plugin.loss(Step(towers, toy_batch(plugin, [[], []], captions), progress=0.0))
    cost = (bias.double().exp().sum().log() - bias.double()).tolist()
    texts = [[*tiny_tokenizer().ids(caption), tiny_tokenizer().contract.eos_id] for caption in captions]
    expected = sum(sum(cost[i] for i in ids) / len(ids) for ids in texts) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_training_begins_at_log_v_over_the_sequences_with_targets(towers):
    plugin = make_plugin(towers, stir=False)
    loss = plugin.loss(Step(towers, fake_batch(plugin.views(), 4), progress=0.0))
    log_v = math.log(towers.text.token_embed.num_embeddings)
    assert loss.item() == pytest.approx(log_v, rel=1e-6)
    region = {"box": [0, 0, 0.5, 0.5], "caption": "a red disc"}
    batch = toy_batch(plugin, [[], [region], [], []], ["a red disc"] * 4)
    assert plugin.loss(Step(towers, batch, progress=0.0)).item() == pytest.approx(log_v * 6 / 12, rel=1e-6)


def test_pictures_without_boxes_train_captioning_only(towers):
    plugin = make_plugin(towers, parallel=0.0)
    batch = toy_batch(plugin, [[], []], ["a red disc", "a gold box"])
    loss = plugin.loss(Step(towers, batch, progress=0.0))
    ids = batch.views["locca"].clone()
    ids[2:, 0] = 9  # what stands in the rows of the other tasks moves nothing
    other = replace(batch, views={**batch.views, "locca": ids})
    assert plugin.loss(Step(towers, other, progress=0.0)).item() == pytest.approx(loss.item(), rel=1e-6)
    assert loss.item() > 0.5


def test_a_batch_with_nothing_to_predict_gives_zero_and_no_nan(towers):
    plugin = make_plugin(towers)
    batch = fake_batch(plugin.views(), 2)
    batch = replace(batch, views={**batch.views, "locca": torch.zeros_like(batch.views["locca"])})
    loss = plugin.loss(Step(towers, batch, progress=0.0))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in plugin.parameters())  # NaN would count as any


def test_in_parallel_a_caption_is_read_nowhere_but_its_prefix(towers):
    plugin = make_plugin(towers, parallel=1.0)
    batch = fake_batch(plugin.views(), 2)
    seen = []
    plugin.decoder.token_embed.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    plugin.loss(Step(towers, batch, progress=0.0))
    ids, counted = batch.views["locca"].unbind(1)
    prefix = len(tiny_tokenizer().ids("cap: "))
    assert torch.equal(seen[0][:2, :prefix], ids[:2, :prefix].long())
    assert (seen[0][:2, prefix:] == plugin.decoder.mask_id).all()  # padding positions too
    assert torch.equal(seen[0][2:, 1:], ids[2:, :-1].long())  # the other tasks are read one by one
    assert not (seen[0][2:] == plugin.decoder.mask_id).any()
    assert counted[:2, prefix].all()


def test_gradient_passes_by_the_pooling_head_and_the_text_tower(towers):
    plugin = make_plugin(towers)
    plugin.loss(Step(towers, fake_batch(plugin.views(), 2), progress=0.0)).backward()
    warm = {name for name, p in towers.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {
        name for name, _ in towers.vision.named_parameters(prefix="vision") if not name.startswith("vision.pool.")
    }
    assert warm == expected
    assert all(p.grad is not None and p.grad.any() for p in plugin.parameters())


def test_padded_patches_of_an_image_move_no_loss(towers):
    plugin = make_plugin(towers)
    batch = fake_batch(plugin.views(), 2)
    patches = batch.views["image"].patches.clone()
    losses = []
    for pixel in (0, 200):
        patches[:, 3] = pixel
        images = replace(batch.views["image"], patches=patches.clone(), valid=torch.arange(4).expand(2, 4) < 3)
        given = replace(batch, views={**batch.views, "image": images})
        losses.append(plugin.loss(Step(towers, given, progress=0.0)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(plugin.loss(Step(towers, batch, progress=0.0)).item(), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_fused_where_that_of_the_towers_is(fused, towers, monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    towers.fused_attention = fused
    plugin = make_plugin(towers)
    step = Step(towers, fake_batch(plugin.views(), 2), progress=0.0)
    step.encode_image("image")
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    plugin.loss(step)
    assert len(calls) == (2 if fused else 0)  # self and cross, in one layer


def test_the_mean_over_micro_batches_is_the_loss_of_the_batch(towers):
    plugin = make_plugin(towers)
    region = {"box": [0, 0, 0.5, 0.5], "caption": "a red disc"}
    batch = toy_batch(plugin, [[region], [region], [], []], ["a", "a red disc", "number 3", "a gold box, number 4"])
    whole = plugin.loss(Step(towers, batch, progress=0.0)).item()
    halves = [batch.select(torch.tensor(rows)) for rows in ([0, 1], [2, 3])]
    parts = [plugin.loss(Step(towers, half, progress=0.0)).item() for half in halves]
    assert LocCa.accumulates
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)
    assert abs(parts[0] - parts[1]) > 0.1


def test_bf16_gives_nearly_the_same_loss(towers):
    for fused in (True, False):
        towers.fused_attention = fused
        plugin = make_plugin(towers)
        batch = fake_batch(plugin.views(), 2)
        exact = plugin.loss(Step(towers, batch, progress=0.0))
        with torch.autocast("cpu", torch.bfloat16):
            rough = plugin.loss(Step(towers, batch, progress=0.0))
        assert rough.dtype == torch.float32
        assert rough.item() == pytest.approx(exact.item(), rel=0.02)


# torch 2.9 warns of what its own tracer of autograd functions does
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_the_loss_compiles_into_one_graph(towers):
    plugin = make_plugin(towers)
    batch = fake_batch(plugin.views(), 2)
    step = Step(towers, batch, progress=0.0)
    with torch.no_grad():
        step.encode_image("image")  # kept by the step: the tower is not what is tried here
    torch.testing.assert_close(torch.compile(plugin.loss, fullgraph=True, backend="eager")(step), plugin.loss(step))


# The plugin.


def test_it_reads_the_image_three_sequences_and_a_coin():
    prefixes = Prefixes("say: ", "find: ", "name: ")
    plugin = LocCa(length=50, bins=100, order="yxyx", box_template="{} {} {} {}", prefixes=prefixes, parallel=0.75)
    expected = [IMAGE, LocCaView(50, Prompts(prefixes, BoxText(100, "yxyx", "{} {} {} {}")), 0.3), CoinView(0.75)]
    assert build_manager([plugin]).hook.views() == [expected]


@pytest.mark.parametrize(("text_depth", "depth", "expected"), [(12, None, 6), (27, None, 13), (1, None, 1), (4, 3, 3)])
def test_the_decoder_has_the_shape_of_the_text_tower_and_half_its_layers(text_depth, depth, expected, towers):
    towers.text.shape = replace(towers.text.shape, depth=text_depth)
    decoder = make_plugin(towers, depth=depth).decoder
    assert len(decoder.blocks) == expected
    assert decoder.pos_embed.shape == (40, towers.text.shape.width)
    assert decoder.blocks[0].mlp.fc1.out_features == towers.text.shape.mlp_dim
    assert decoder.blocks[0].self_attn.num_heads == towers.text.shape.num_heads
    assert decoder.mask_id == decoder.out.out_features == towers.text.token_embed.num_embeddings


@pytest.mark.parametrize(
    "option", [{"length": 1}, {"parallel": 1.5}, {"depth": 0}, {"min_score": -0.1}, {"min_score": 30}]
)
def test_options_out_of_range_are_errors(option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"locca: expected length >= 2, .* found .*{name}={value}"):
        LocCa(**option)


def test_a_box_needs_at_least_one_bin():
    with pytest.raises(ValueError, match="locca: expected bins >= 1, found 0"):
        LocCa(bins=0)


def test_a_plugin_in_a_package_is_found_by_its_name():
    assert catalogue(third_party=False)["locca"].cls is LocCa
