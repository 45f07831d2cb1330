"""The pair loss in blocks is the equation over all pairs, keeps nothing of their number, and takes other terms."""

import math

import pytest
import torch
import torch.nn.functional as F

from siglip2.core.pairs import pair_loss


def leaves(batch_size, width=12, *, dtype=torch.float64, seed=0):
    """Unit-norm images and texts, a temperature and a bias."""
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(batch_size, width, generator=generator, dtype=dtype), dim=-1) for _ in range(2)]
    made = [*rows, torch.tensor([math.log(7.0)], dtype=dtype), torch.tensor([-3.0], dtype=dtype)]
    return [tensor.requires_grad_() for tensor in made]


def equation(image, text, scale, bias):
    """SigLIP, eq. 1, all pairs at once."""
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale.exp() * image @ text.T + bias)).sum() / len(image)


@pytest.mark.parametrize(("batch_size", "block"), [(1, 4), (8, 4), (8, 8), (11, 4), (11, 1), (5, 512), (600, None)])
def test_value_and_gradients_are_those_of_the_equation_in_float64(batch_size, block):
    exact = leaves(batch_size)
    wanted = equation(*exact)
    inputs = [tensor.detach().float().requires_grad_() for tensor in exact]
    found = pair_loss(*inputs[:2], scale=inputs[2], bias=inputs[3], block=block)
    assert found.shape == ()
    assert found.item() == pytest.approx(wanted.item(), rel=2e-6)
    expected = torch.autograd.grad(3 * wanted, exact)
    for gradient, other in zip(torch.autograd.grad(3 * found, inputs), expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_gradients_can_be_asked_for_once():
    inputs = leaves(6, dtype=torch.float32)
    loss = pair_loss(*inputs[:2], scale=inputs[2], bias=inputs[3])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("batch_size", [64, 256])
def test_nothing_of_the_number_of_pairs_is_kept_for_the_backward_pass(batch_size):
    image, text, scale, bias = leaves(batch_size, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        loss = pair_loss(image, text, scale=scale, bias=bias, block=16)
    assert sum(kept) == image.numel() + text.numel() + 2
    loss.backward()


def test_embeddings_of_low_precision_get_gradients_of_their_own_dtype_and_a_float32_loss():
    inputs = leaves(20, dtype=torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pair_loss(*low, scale=inputs[2], bias=inputs[3])
    wanted = equation(*(tensor.float() for tensor in low), inputs[2], inputs[3])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    assert low[0].grad.dtype == torch.bfloat16


def hinge(logits, paired):
    """Pushes the logits of true pairs above 1, all others below -1."""
    signs = torch.full_like(logits, -1.0)
    if paired:
        signs.diagonal().fill_(1)
    missing = (1 - signs * logits).clamp(min=0)
    return missing.sum(), torch.where(missing > 0, -signs, torch.zeros_like(signs))


def test_another_term_over_pairs_has_its_own_value_and_gradients():
    exact = leaves(9)
    signs = 2 * torch.eye(9, dtype=torch.float64) - 1
    wanted = (1 - signs * (exact[2].exp() * exact[0] @ exact[1].T + exact[3])).clamp(min=0).sum() / 9
    inputs = [tensor.detach().float().requires_grad_() for tensor in exact]
    found = pair_loss(*inputs[:2], scale=inputs[2], bias=inputs[3], term=hinge, block=4)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected = torch.autograd.grad(wanted, exact)
    for gradient, other in zip(torch.autograd.grad(found, inputs), expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo itself does
def test_it_is_one_graph_under_compile_with_torch_xla_loaded():
    pytest.importorskip("torch_xla")
    inputs = leaves(10, dtype=torch.float32)

    def loss(image, text, scale, bias):
        return pair_loss(image, text, scale=scale, bias=bias, block=4)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    found, wanted = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss))
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_images_without_a_text_are_an_error():
    image, text, scale, bias = leaves(6)
    message = r"one text embedding for every image embedding, found \[5, 12\] and \[6, 12\]"
    with pytest.raises(ValueError, match=message):
        pair_loss(image, text[:5], scale=scale, bias=bias)
