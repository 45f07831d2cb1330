"""The arrays of an npz file, read by the equations of flax in numpy and float64, give our towers' embeddings."""

# B batch, N tokens, D width, H heads, d width of a head

import numpy as np
import pytest
import torch

from siglip2.core.interop import big_vision
from siglip2.core.interop.parity import random_inputs

EPSILON = 1e-6


def norm(x_BND, p):
    mean, variance = x_BND.mean(-1, keepdims=True), x_BND.var(-1, keepdims=True)
    return (x_BND - mean) / np.sqrt(variance + EPSILON) * p["scale"] + p["bias"]


def attention(q_BND, kv_BND, p, valid_BN=None):
    """flax.linen.MultiHeadDotProductAttention: kernels [D, H, d] in, [H, d, D] out."""
    q, k, v = (
        np.einsum("bnd,dhk->bnhk", x, p[name]["kernel"]) + p[name]["bias"]
        for name, x in (("query", q_BND), ("key", kv_BND), ("value", kv_BND))
    )
    scores = np.einsum("bqhk,bnhk->bhqn", q, k) / np.sqrt(q.shape[-1])
    if valid_BN is not None:
        scores = np.where(valid_BN[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqn,bnhk,hkd->bqd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(x_BND, p):
    x = x_BND @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # jax.nn.gelu, which approximates
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def encoder(x_BND, p, valid_BN=None):
    """models/vit.py, Encoder: pre-norm blocks, here stacked by a scan."""
    blocks = p["encoderblock"]
    for i in range(len(blocks["LayerNorm_0"]["scale"])):
        block = layer(blocks, i)
        y = norm(x_BND, block["LayerNorm_0"])
        x_BND = x_BND + attention(y, y, block["MultiHeadDotProductAttention_0"], valid_BN)
        x_BND = x_BND + mlp(norm(x_BND, block["LayerNorm_1"]), block["MlpBlock_0"])
    return norm(x_BND, p["encoder_norm"])


def layer(tree, i):
    return {name: layer(part, i) if isinstance(part, dict) else part[i] for name, part in tree.items()}


def pooled(x_BND, p, valid_BN=None):
    """models/vit.py, MAPHead."""
    probe = np.repeat(p["probe"], len(x_BND), axis=0)
    x = attention(probe, x_BND, p["MultiHeadDotProductAttention_0"], valid_BN)
    return (x + mlp(norm(x, p["LayerNorm_0"]), p["MlpBlock_0"]))[:, 0]


def tree_of(arrays):
    """Nested dicts in float64 out of names with slashes, as big_vision's `recover_tree`."""
    tree = {}
    for name, array in arrays.items():
        *folders, last = name.removeprefix("params/").split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = array.double().numpy()
    return tree


def unit(z_BD):
    return z_BD / (np.linalg.norm(z_BD, axis=-1, keepdims=True) + 1e-8)


def axis_weights(size, source):
    """A bilinear, antialiased resize along one axis, [size, source]."""
    centres = (np.arange(size)[:, None] + 0.5) * source / size
    weights = np.clip(1 - np.abs(np.arange(source) + 0.5 - centres) / max(source / size, 1), 0, None)
    return weights / weights.sum(-1, keepdims=True)


def native_positions(table_RCD, grid, length):
    """models/proj/image_text/naflex_vit.py: the table resized to a grid, then padding."""
    rows, columns = (axis_weights(size, source) for size, source in zip(grid, table_RCD.shape[:2], strict=True))
    resized = np.einsum("rR,cC,RCd->rcd", rows, columns, table_RCD).reshape(grid[0] * grid[1], -1)
    return np.concatenate([resized, np.zeros((length - len(resized), resized.shape[-1]))])


def image_embeddings(tree, weights, inputs):
    img, images = tree["img"], inputs.images
    patches = images.patches.double().numpy() / 127.5 - 1
    if weights.native:
        x = patches @ img["embedding"]["kernel"] + img["embedding"]["bias"]
        grids, length = images.sizes[:, 0].tolist(), patches.shape[1]
        x = x + np.stack([native_positions(img["pos_embedding"], grid, length) for grid in grids])
        valid = images.valid.numpy()
    else:
        size = 4 * weights.patch_size  # what a convolution without padding reads
        pixels = (
            inputs.pixels.double()
            .numpy()[..., :size, :size]
            .reshape(-1, 3, 4, weights.patch_size, 4, weights.patch_size)
        )
        x = np.einsum("bcypxq,pqcd->byxd", pixels, img["embedding"]["kernel"]) + img["embedding"]["bias"]
        x, valid = x.reshape(len(x), 16, -1) + img["pos_embedding"], None
    return unit(pooled(encoder(x, img["Transformer"], valid), img["MAPHead_0"], valid))


def text_embeddings(tree, inputs):
    txt = tree["txt"]
    x = encoder(txt["Embed_0"]["embedding"][inputs.ids.numpy()] + txt["pos_embedding"], txt["Encoder_0"])
    return unit(x[:, -1] @ txt["head"]["kernel"] + txt["head"]["bias"])


@torch.no_grad()
def test_equations_of_flax_give_our_embeddings_and_logits(weights):
    tree, inputs, towers = tree_of(big_vision.arrays_of(weights)), random_inputs(weights), weights.towers()
    image, text = towers.encode_image(inputs.images).embedding, towers.encode_text(inputs.ids).embedding
    z_image, z_text = image_embeddings(tree, weights, inputs), text_embeddings(tree, inputs)
    np.testing.assert_allclose(image.numpy(), z_image, rtol=0, atol=1e-6)
    np.testing.assert_allclose(text.numpy(), z_text, rtol=0, atol=1e-6)
    logits = z_image @ z_text.T * np.exp(tree["t"]) + tree["b"]
    np.testing.assert_allclose(towers.logits(image, text).numpy(), logits, rtol=0, atol=1e-5)


def test_comparison_would_notice_heads_in_another_order(make_weights):
    weights = make_weights()
    arrays, inputs = big_vision.arrays_of(weights), random_inputs(weights)
    expected = text_embeddings(tree_of(arrays), inputs)
    name = "params/txt/Encoder_0/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    arrays[name] = arrays[name].flip(2)
    assert np.abs(text_embeddings(tree_of(arrays), inputs) - expected).max() > 1e-4


@pytest.mark.parametrize("native", [False, True])
def test_arrays_are_float_and_contiguous(make_weights, native):
    for name, array in big_vision.arrays_of(make_weights(native=native)).items():
        assert array.is_contiguous(), name
        assert array.dtype == torch.float32, name
