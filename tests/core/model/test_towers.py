"""What the towers see: every text position, no padding; and what they return."""

import numpy as np
import pytest
import torch

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, patchify, resample_grid, sigmoid_loss
from siglip2.core.model.two_towers import build_two_towers, unit_norm
from siglip2.core.model.vision import TimmVisionTower, to_unit_range

# B batch, N patches, T text tokens, D width, E embedding dimension


def padded(images: Patches, extra: int, *, seed=9) -> Patches:
    """The same images with `extra` patches of noise at (0, 0), marked as padding."""
    size, n, values = images.patches.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size, extra, values), generator=generator, dtype=torch.uint8)
    coords = torch.cat([images.coords.expand(size, -1, -1), torch.zeros(size, extra, 2, dtype=torch.int16)], dim=1)
    valid = torch.arange(n + extra).expand(size, -1) < n
    sizes = torch.tensor(images.grid).expand(size, 1, 2)
    return Patches(torch.cat([images.patches, noise], dim=1), coords, valid, sizes=sizes)


def test_image_features_have_the_promised_shapes(towers, images):
    features = towers.encode_image(images())
    assert features.tokens.shape == (3, 16, 32)
    assert features.pooled.shape == features.embedding.shape == (3, 32)
    torch.testing.assert_close(features.embedding.norm(dim=-1), torch.ones(3))
    assert features.valid is None


def test_text_features_have_the_promised_shapes(towers):
    features = towers.encode_text(torch.randint(50, (3, 8)))
    assert features.tokens.shape == (3, 8, 32)
    assert features.pooled.shape == features.embedding.shape == (3, 32)
    torch.testing.assert_close(features.embedding.norm(dim=-1), torch.ones(3))


def test_text_is_pooled_at_its_last_position(towers):
    ids = torch.randint(50, (3, 8))
    tokens, pooled, projected = towers.text(ids)
    assert torch.equal(pooled, tokens[:, -1])
    torch.testing.assert_close(projected, pooled @ towers.text.head.weight.T + towers.text.head.bias)


def test_changing_a_token_at_any_position_changes_the_text_embedding(towers):
    ids = torch.randint(1, 49, (1, 8))
    changed = ids.repeat(8, 1)
    changed[range(8), range(8)] += 1
    distance = (towers.encode_text(changed).embedding - towers.encode_text(ids).embedding).norm(dim=-1)
    assert (distance > 1e-3).all()


def test_every_text_position_sees_later_ones(towers):
    ids = torch.randint(1, 49, (1, 8))
    changed = ids.clone()
    changed[0, -1] += 1
    distance = (towers.text(changed).tokens - towers.text(ids).tokens).norm(dim=-1)
    assert (distance > 1e-3).all()


def test_padding_of_a_text_is_read_as_tokens(towers):
    ids = torch.tensor([[7, 9, 1, 0, 0, 0, 0, 0]])
    before = towers.encode_text(ids).embedding
    with torch.no_grad():
        towers.text.token_embed.weight[0].mul_(-1)
    assert (towers.encode_text(ids).embedding - before).norm() > 1e-3


@pytest.mark.parametrize("length", [7, 9])
def test_a_text_of_another_length_is_an_error(towers, length):
    with pytest.raises(ValueError, match=f"expected 8 ids per text, padded on the right, found {length}"):
        towers.encode_text(torch.zeros(2, length, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_token_ids_may_be_any_integers(towers, dtype):
    ids = torch.randint(50, (2, 8))
    assert torch.equal(towers.encode_text(ids.to(dtype)).embedding, towers.encode_text(ids).embedding)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("extra", [1, 9])
def test_padding_does_not_change_the_image_embedding(towers, images, extra, fused):
    for block in towers.vision.blocks:
        block.attn.fused_attn = fused
    towers.vision.pool.fused_attn = fused
    whole = towers.encode_image(images(3, 5))
    with_padding = towers.encode_image(padded(images(3, 5), extra))
    # masked attention sums in another order
    torch.testing.assert_close(with_padding.embedding, whole.embedding, rtol=0, atol=1e-6)
    torch.testing.assert_close(with_padding.tokens[:, :15], whole.tokens, rtol=0, atol=1e-5)
    assert with_padding.valid.sum(1).tolist() == [15, 15, 15]


def test_padding_gets_no_gradient(towers, images):
    noisy = padded(images(), 4)
    other = padded(images(), 4, seed=10)
    gradients = []
    for patches in (noisy, other):
        towers.zero_grad()
        towers.encode_image(patches).embedding[:, 0].sum().backward()
        gradients.append(towers.vision.embed.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (9, 1)])
def test_one_grid_for_all_and_a_grid_per_image_are_the_same(towers, images, grid):
    shared = images(*grid)
    sizes = torch.tensor(grid).expand(3, 1, 2)
    each = Patches(shared.patches, shared.coords.expand(3, -1, -1), sizes=sizes)
    one, other = towers.encode_image(shared).embedding, towers.encode_image(each).embedding
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_another_grid_than_the_tables_takes_its_positions_from_the_resized_table(towers, images):
    small = images(3, 5)
    embedded = []
    towers.vision.blocks[0].register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    towers.encode_image(small)
    positions = resample_grid(towers.vision.pos_embed, grid_coords(3, 5), grid=(3, 5))
    expected = towers.vision.embed(to_unit_range(small.patches)) + positions
    torch.testing.assert_close(embedded[0], expected)
    assert (positions - towers.vision.pos_embed.flatten(0, 1)[:15]).norm() > 1


def test_uint8_pixels_become_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = (np.arange(256) / 255 - 0.5) / 0.5
    scaled = to_unit_range(pixels)
    assert scaled.dtype == torch.float32
    assert scaled.min() == -1
    assert scaled.max() == 1
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-7)  # float32


def test_order_of_patches_is_carried_by_their_coordinates(towers, images):
    straight = images(3, 5)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    coords, sizes = straight.coords[:, order].expand(3, -1, -1), torch.tensor([3, 5]).expand(3, 1, 2)
    shuffled = Patches(straight.patches[:, order], coords, sizes=sizes)
    one, other = towers.encode_image(straight).embedding, towers.encode_image(shuffled).embedding
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_unit_norm_divides_by_the_norm_plus_1e_8():
    rows = torch.tensor([[3.0, 4.0], [3e-8, 4e-8], [0.0, 0.0]])
    expected = rows.double().numpy() / (np.linalg.norm(rows.double().numpy(), axis=-1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(unit_norm(rows), expected, rtol=1e-6)
    assert expected[1, 0] == pytest.approx(0.5)  # far from 3/5


def test_unit_norm_of_zero_has_a_finite_gradient_and_bfloat16_becomes_float32():
    zero = torch.zeros(1, 4, requires_grad=True)
    unit_norm(zero).sum().backward()
    assert zero.grad.isfinite().all()
    assert unit_norm(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "width", "pooling"), [("test_vit", 64, "token"), ("test_vit_relpos", 96, "avg"), ("test_vit3", 96, "map")]
)
def test_a_timm_vit_by_name_is_a_vision_tower(images, name, width, pooling):
    model = build_two_towers("tiny/16", patch_size=16, grid=(4, 4), vocab_size=50, context_length=8, timm_name=name)
    assert model.vision.trunk.global_pool == pooling
    assert model.embed_dim == width
    features = model.encode_image(images())
    assert features.tokens.shape == (3, 16, width)
    assert features.pooled.shape == features.embedding.shape == (3, width)
    features.embedding[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.vision.parameters())


def test_a_timm_vit_sees_the_scaled_image(images):
    tower = TimmVisionTower("test_vit", patch_size=16, grid=(4, 4)).eval()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    patches = Patches(patchify(image, 16), grid_coords(4, 4)[None], None, (4, 4))
    tokens = tower.trunk.forward_features(image / 127.5 - 1)
    torch.testing.assert_close(tower(patches).tokens, tokens[:, 1:])
    torch.testing.assert_close(tower(patches).pooled, tower.trunk.forward_head(tokens))


def test_an_unknown_timm_name_suggests_a_vit():
    with pytest.raises(ValueError, match="timm has no model called 'vti_small', did you mean 'vit_small_"):
        TimmVisionTower("vti_small", patch_size=16, grid=(4, 4))


def test_a_timm_model_that_is_no_vit_is_an_error():
    with pytest.raises(ValueError, match="timm's 'resnet18' takes no img_size, so it is not a ViT"):
        TimmVisionTower("resnet18", patch_size=16, grid=(4, 4))


@pytest.mark.parametrize(("name", "patch_size"), [("test_vit", 8), ("hiera_tiny_224", 16)])
def test_a_timm_model_without_a_token_per_patch_is_an_error(name, patch_size):
    with pytest.raises(ValueError, match=f"timm's '{name}' makes tokens of shape .* one per patch of {patch_size} px"):
        TimmVisionTower(name, patch_size=patch_size, grid=(224 // patch_size, 224 // patch_size))


def test_a_timm_vit_refuses_patches_without_a_common_grid(images):
    tower = TimmVisionTower("test_vit", patch_size=16, grid=(4, 4))
    with pytest.raises(ValueError, match="needs whole images: use a patchifier of one fixed grid"):
        tower(padded(images(), 1))


@pytest.mark.parametrize("batch_size", [8, 64])
def test_fresh_towers_with_the_published_bias_have_the_loss_of_unrelated_pairs(batch_size, images):
    torch.manual_seed(0)
    model = build_two_towers("tiny/16", patch_size=16, grid=(4, 4), vocab_size=50, context_length=8)
    with torch.no_grad():
        z_image = model.encode_image(images(batch_size=batch_size)).embedding
        z_text = model.encode_text(torch.randint(50, (batch_size, 8))).embedding
        loss = float(sigmoid_loss(z_image, z_text, scale=model.logit_scale, bias=model.logit_bias))
        similarity = float((z_image @ z_text.T).abs().max())
    # a logit is 10 s - 10; at random the cosine s of a pair is some 1 / sqrt(E): small, but not zero
    assert 0 < similarity < 4 / model.embed_dim**0.5
    expected = np.logaddexp(0, 10) + (batch_size - 1) * np.logaddexp(0, -10)  # every s = 0
    # a positive costs softplus(10 - 10 s), so the mean cosine of the positives moves the loss by ten times itself
    explained = expected - 10 * float((z_image * z_text).sum(1).mean())
    # what is left, of positives and negatives alike, is at most a softplus(10 s - 10) for each of the texts
    assert loss == pytest.approx(explained, abs=batch_size * np.logaddexp(0, 10 * similarity - 10))
