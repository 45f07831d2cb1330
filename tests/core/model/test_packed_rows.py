"""Packed rows: an image is read as if it were alone, whatever lies beside it, and rows have one shape and one graph."""

# B images, R rows, S patches of a row, N patches of an image, P patch values, D width, h heads, d width of a head

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from siglip2.core.batch import Batch, Patches
from siglip2.core.functional import grid_coords
from siglip2.core.model.attention import SelfAttention, attend, image_blocks, slot_mask
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.packing import Place, packed
from siglip2.testing import no_host_sync

GRIDS = [(3, 4), (1, 5), (4, 4), (2, 2), (6, 1)]
SLOTS, S, LONGEST = 4, 24, 18
HERE = [Place(0, 1, 4, 12), Place(1, 2, 17, 5), Place(1, 0, 0, 16), Place(0, 0, 0, 4), Place(2, 0, 0, 6)]
ELSEWHERE = [Place(1, 0, 0, 12), Place(0, 1, 16, 5), Place(0, 0, 0, 16), Place(2, 1, 6, 4), Place(2, 0, 0, 6)]


def picture(rows, columns, *, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (1, rows * columns, 768), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([rows, columns], dtype=torch.int16).reshape(1, 1, 2)
    return Patches(patches, grid_coords(rows, columns)[None], sizes=sizes)


PICTURES = [picture(*grid, seed=seed) for seed, grid in enumerate(GRIDS)]


def in_rows(places=HERE, pictures=PICTURES):
    """The pictures in three rows; each row has a slot to spare and room that stays empty."""
    return packed(pictures, places, rows=3, seq_len=S, slots=SLOTS, longest=LONGEST)


def alone(towers, number):
    """A picture by itself, as an image of one whole grid: no mask anywhere."""
    image = PICTURES[number]
    return towers.encode_image(Patches(image.patches, image.coords, None, GRIDS[number]))


def set_fused(towers, fused):
    for module in towers.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


@pytest.mark.parametrize("places", [HERE, ELSEWHERE])
@pytest.mark.parametrize("fused", [True, False])
def test_a_packed_row_is_its_images_one_by_one(towers, fused, places):
    set_fused(towers, fused)
    together = towers.encode_image(in_rows(places))
    assert together.tokens.shape == (5, LONGEST, 32)
    assert together.pooled.shape == together.embedding.shape == (5, 32)
    assert together.valid.shape == (5, LONGEST)
    for number, (rows, columns) in enumerate(GRIDS):
        single, length = alone(towers, number), rows * columns
        torch.testing.assert_close(together.embedding[number], single.embedding[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.pooled[number], single.pooled[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(together.tokens[number, :length], single.tokens[0], rtol=1e-6, atol=2e-6)
        assert together.valid[number].tolist() == [True] * length + [False] * (LONGEST - length)


def test_behind_an_image_stands_its_own_last_token_and_no_neighbours(towers):
    together = towers.encode_image(in_rows())
    for number, (rows, columns) in enumerate(GRIDS):
        beyond = together.tokens[number, rows * columns :]
        assert torch.equal(beyond, together.tokens[number, rows * columns - 1].expand_as(beyond))


def test_neighbours_change_nothing(towers):
    images = in_rows()
    before = towers.encode_image(images)
    others = [picture(*grid, seed=10 + seed) if seed else PICTURES[0] for seed, grid in enumerate(GRIDS)]
    after = towers.encode_image(in_rows(pictures=others))
    torch.testing.assert_close(after.tokens[0], before.tokens[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(after.embedding[0], before.embedding[0], rtol=0, atol=1e-6)
    assert (after.embedding[1:] - before.embedding[1:]).norm(dim=-1).min() > 1e-2


def test_padding_of_a_row_changes_nothing(towers):
    images = in_rows()
    noise = torch.randint(0, 256, images.patches.shape, generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    empty = images.packing.owner < 0
    assert empty.sum(1).tolist() == [8, 3, 18]
    noisy = replace(images, patches=torch.where(empty[..., None], noise, images.patches))
    before, after = towers.encode_image(images), towers.encode_image(noisy)
    torch.testing.assert_close(after.tokens, before.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.embedding, before.embedding, rtol=0, atol=1e-6)


def direction(number, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + number))


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_packed_rows_are_the_sum_of_those_of_the_images(towers, fused):
    set_fused(towers, fused)
    together = towers.encode_image(in_rows())
    total = 0.0
    for number, (rows, columns) in enumerate(GRIDS):
        total = total + (together.embedding[number] * direction(number, 32)).sum()
        total = total + (together.tokens[number, : rows * columns] * direction(number, (rows * columns, 32))).sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in towers.vision.named_parameters()}
    towers.zero_grad()
    for number, (rows, columns) in enumerate(GRIDS):
        single = alone(towers, number)
        loss = (single.embedding[0] * direction(number, 32)).sum()
        (loss + (single.tokens[0] * direction(number, (rows * columns, 32))).sum()).backward()
    for name, parameter in towers.vision.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_rows_without_any_image_give_finite_gradients(towers, fused):
    set_fused(towers, fused)
    images = packed(PICTURES[:1], [Place(1, 0, 0, 12)], rows=3, seq_len=S, slots=SLOTS, longest=LONGEST)
    features = towers.encode_image(images)
    (features.embedding[:, 0].sum() + features.tokens[:, 3, 1].sum()).backward()
    assert features.tokens.isfinite().all()
    assert all(p.grad.isfinite().all() for p in towers.vision.parameters())


def test_a_selection_of_packed_images_is_those_images(towers):
    batch = Batch({"image": in_rows()}, size=5, index=0)
    kept = torch.tensor([3, 0, 4])
    selected = batch.select(kept).views["image"]
    assert selected.num_images == 3
    found, whole = towers.encode_image(selected), towers.encode_image(in_rows())
    assert torch.equal(found.embedding, whole.embedding[kept])
    assert torch.equal(found.tokens, whole.tokens[kept])
    assert torch.equal(found.valid, whole.valid[kept])


def test_patches_of_packed_images_cannot_be_masked(towers):
    masked = torch.zeros(3, S, dtype=torch.bool)
    with pytest.raises(ValueError, match="patches cannot be masked where images share rows"):
        towers.vision(in_rows(), masked_BN=masked, mask_token_D=torch.zeros(32))


def test_packed_rows_are_read_without_waiting_for_values(towers):
    with no_host_sync():
        towers.encode_image(in_rows())


def test_packed_batches_of_any_content_have_one_graph(towers):
    torch._dynamo.reset()
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    encode = torch.compile(towers.encode_image, fullgraph=True, backend=counting)
    fewer = [place._replace(length=max(1, place.length - 1)) for place in HERE]
    for images in (in_rows(), in_rows(ELSEWHERE), in_rows(fewer)):
        for found, expected in zip(encode(images), towers.encode_image(images), strict=True):
            torch.testing.assert_close(found, expected)
    assert graphs == 1


OWNER = torch.tensor([[0] * 5 + [1] * 3 + [-1] * 2, [0] * 10, [-1] * 10], dtype=torch.int16)


def test_tokens_look_at_their_own_image_and_padding_at_padding():
    mask = image_blocks(OWNER, flex=False)
    assert mask.shape == (3, 1, 10, 10)
    for row, owners in enumerate(OWNER.tolist()):
        expected = [[a == b for b in owners] for a in owners]
        assert mask[row, 0].tolist() == expected


def test_the_query_of_a_slot_looks_at_its_image_and_that_of_an_empty_slot_at_anything():
    mask = slot_mask(OWNER, 3)
    assert mask.shape == (3, 1, 3, 10)
    assert mask[0, 0, :2].tolist() == [[True] * 5 + [False] * 5, [False] * 5 + [True] * 3 + [False] * 2]
    assert mask[0, 0, 2].all()
    assert mask[1:, 0].all()


def long_owner():
    """Rows longer than the blocks of flex attention, so that some blocks can be skipped."""
    lengths = [[100, 130, 100], [300], [], [40] * 9]
    owner = torch.full((4, 384), -1, dtype=torch.int16)
    for row, parts in zip(owner, lengths, strict=True):
        images = torch.cat([torch.full((n,), i) for i, n in enumerate(parts)] or [torch.empty(0)])
        row[: len(images)] = images
    return owner


def test_flex_attention_gets_the_dense_mask_and_skips_only_what_it_hides():
    owner = long_owner()
    blocks, dense = image_blocks(owner, flex=True), image_blocks(owner, flex=False)
    assert torch.equal(create_mask(blocks.mask_mod, 4, 1, 384, 384, device="cpu"), dense)
    visited = blocks.to_dense().bool().repeat_interleave(128, -1).repeat_interleave(128, -2)
    assert not (dense & ~visited).any()
    assert not visited.all()


@pytest.fixture
def uncompiled(monkeypatch):
    """Flex attention as plain tensor operations: on a CPU it compiles for long, and has no backward pass."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_gives_what_the_dense_mask_gives():
    owner = long_owner()
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 384, 16, generator=generator)
    blocks, dense = image_blocks(owner, flex=True), image_blocks(owner, flex=False)
    found = attend(q, k, v, blocks, fused=True)
    torch.testing.assert_close(found, attend(q, k, v, dense, fused=True), rtol=0, atol=1e-6)
    assert (found - attend(q, k, v, None, fused=True)).abs().max() > 0.1


@pytest.mark.usefixtures("uncompiled")
def test_a_tower_with_flex_attention_is_the_same_tower(towers, monkeypatch):
    with torch.no_grad():
        expected = towers.encode_image(in_rows())
        monkeypatch.setattr(SelfAttention, "takes_blocks", lambda self, x: True)
        found = towers.encode_image(in_rows())
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.embedding, expected.embedding, rtol=0, atol=1e-6)


def test_flex_attention_stays_away_from_cpus():
    assert not SelfAttention(32, num_heads=2).takes_blocks(torch.zeros(1, 4, 32))


@pytest.mark.gpu
def test_flex_attention_on_a_gpu_has_the_features_and_gradients_of_the_dense_mask():
    torch.manual_seed(0)
    wide = ShapeOptions(width=64, mlp_dim=96, num_heads=2)
    towers = build_two_towers("tiny/16", patch_size=16, grid=(4, 4), vocab_size=50, context_length=8, vision=wide)
    towers, images = towers.cuda(), in_rows().apply(lambda t: t.cuda())
    results = []
    for flex in (True, False):
        towers.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SelfAttention, "takes_blocks", lambda self, x, flex=flex: flex)
            features = towers.encode_image(images)
        features.embedding[:, 0].sum().backward()
        results.append([features.tokens, features.embedding, *(p.grad.clone() for p in towers.vision.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # products in TF32
