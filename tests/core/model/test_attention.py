"""Attention with its matrices multiplied out is the softmax of its definition, in every precision and length."""

import pytest
import torch

from siglip2.core.model.attention import attend


def defined(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v in float64."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)], ids=str)
def test_multiplied_out_it_is_its_definition_and_so_are_its_gradients(dtype, close, length, masked):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype).double() for n in (5, length, length))
    mask = torch.rand(2, 1, 1, length) < 0.7 if masked else torch.ones(1, 1, 1, length, dtype=torch.bool)
    mask[..., 0] = True
    found, expected = ([x.detach().to(d).requires_grad_() for x in (q, k, v)] for d in (dtype, torch.float64))
    out = attend(*found, mask if masked else None, fused=False)
    truth = defined(*expected, mask)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=close)
    weights = torch.randn_like(truth)
    (out * weights).sum().backward()
    (truth * weights).sum().backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=4 * close)
