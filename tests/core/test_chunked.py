"""Chunked losses equal the losses of all logits at once, in value and gradient, and never hold all logits."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from siglip2.core.chunked import consistency, linear_cross_entropy
from siglip2.testing import no_host_sync

# M rows, K classes, D width, C views

TEMPERATURES = {"temperature_student": 0.3, "temperature_teacher": 0.2}
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


def classifier(M=7, K=11, D=5, seed=0):
    """Arguments of `linear_cross_entropy`, the first three leaves, float32; one row does not count."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((M, D), (K, D), (K,))]
    weights = torch.rand(M, generator=g)
    weights[M // 2] = 0
    return *leaves, torch.randint(0, K, (M,), generator=g), weights


def views(C=3, M=7, K=11, D=5, seed=0):
    """Tensors of `consistency`, the student's two leaves, float32."""
    g = torch.Generator().manual_seed(seed)
    z, prototypes, *teacher = (torch.randn(*shape, generator=g) for shape in ((C, M, D), (K, D), (M, D), (K, D), (K,)))
    return z.requires_grad_(), prototypes.requires_grad_(), *teacher


def cross_entropy_equation(x, weight, bias, targets, weights):
    """sum_m w_m (log sum_k exp a_mk - a_m,target) with a = x W^T + b."""
    logits = x @ weight.T + bias
    log_total = logits.exp().sum(1).log()
    return sum(weights[m] * (log_total[m] - logits[m, targets[m]]) for m in range(len(x)))


def consistency_equation(z, prototypes, z_teacher, prototypes_teacher, centre):
    """-mean_cm sum_k q_mk log p_cmk."""
    q = ((z_teacher @ prototypes_teacher.T - centre) / TEMPERATURES["temperature_teacher"]).exp()
    p = (z @ prototypes.T / TEMPERATURES["temperature_student"]).exp()
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    return -(q * p.log()).sum(-1).mean()


def agree(args, **options):
    return consistency(*args, **TEMPERATURES, **options)


def in_float64(args):
    """The same values as new leaves."""
    return [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]


def gradients(loss, args, factor=1.0):
    return torch.autograd.grad(factor * loss, [a for a in args if a.requires_grad])


def assert_close_in_norm(found, expected, share):
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() < share * other.double().norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 100])
def test_linear_cross_entropy_is_the_equation_whatever_the_chunk(rows):
    args = classifier()
    exact = in_float64(args)
    loss, expected = linear_cross_entropy(*args, max_logits=rows * 11 + 5), cross_entropy_equation(*exact)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close_in_norm(gradients(loss, args, -2.5), gradients(expected, exact, -2.5), 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 100])
def test_consistency_is_the_equation_whatever_the_chunk(rows):
    args = views()
    exact = in_float64(args)
    loss, expected = agree(args, max_logits=3 * rows * 11 + 5), consistency_equation(*exact)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close_in_norm(gradients(loss, args, -2.5), gradients(expected, exact, -2.5), 1e-6)


def test_gradients_are_those_of_the_unchunked_loss():
    args = classifier(M=300, K=1000, D=32)
    x, weight, bias, targets, weights = args
    unchunked = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none") @ weights
    loss = linear_cross_entropy(*args, max_logits=200_000)  # chunks of 128, 128 and 44 rows
    assert loss.item() == pytest.approx(unchunked.item(), rel=1e-6)
    assert_close_in_norm(gradients(loss, args), gradients(unchunked, args), 1e-5)


def test_gradients_are_those_of_the_unchunked_consistency():
    args = views(C=2, M=300, K=1000, D=32)
    z, prototypes, z_teacher, prototypes_teacher, centre = args
    q = ((z_teacher @ prototypes_teacher.T - centre) / TEMPERATURES["temperature_teacher"]).softmax(-1)
    logits = z @ prototypes.T / TEMPERATURES["temperature_student"]
    unchunked = F.cross_entropy(logits.flatten(0, 1), q.repeat(2, 1))
    loss = agree(args, max_logits=400_000)
    assert loss.item() == pytest.approx(unchunked.item(), rel=1e-6)
    assert_close_in_norm(gradients(loss, args), gradients(unchunked, args), 1e-5)


@pytest.mark.parametrize("garbage", [-3e38, float("inf"), float("nan")])
def test_rows_of_weight_zero_contribute_nothing(garbage):
    x, weight, bias, targets, weights = classifier()
    kept = weights != 0
    full = torch.where(kept[:, None], x.detach(), garbage).requires_grad_()
    found = linear_cross_entropy(full, weight, bias, targets.int(), weights, max_logits=33)
    expected = linear_cross_entropy(x[kept], weight, bias, targets[kept], weights[kept])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    grad_x, *others = gradients(found, (full, weight, bias))
    assert not grad_x[~kept].any()
    assert_close_in_norm(others, gradients(expected, (weight, bias)), 1e-6)


def test_huge_logits_stay_finite():
    x, weight, *rest = classifier()
    loss = linear_cross_entropy(x * 1e4, weight * 1e4, *rest)
    apart = agree([1e4 * a.detach().requires_grad_() for a in views()])
    assert loss.isfinite()
    assert apart.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, (x, weight)))


def test_only_the_student_of_consistency_gets_gradient():
    args = [a.detach().requires_grad_() for a in views()]
    agree(args).backward()
    assert [a.grad is not None for a in args] == [True, True, False, False, False]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_what_asks_for_gradient_gets_it(wanted):
    args = classifier()
    full = gradients(linear_cross_entropy(*args), args)
    for leaf, asks in zip(args[:3], wanted, strict=True):
        leaf.requires_grad_(asks)
    found = gradients(linear_cross_entropy(*args), args)
    expected = [g for g, asks in zip(full, wanted, strict=True) if asks]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_second_backward_pass_is_an_error():
    linear, agreement = linear_cross_entropy(*classifier()), agree(views())
    for loss in (linear, agreement):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_bfloat16_autocast_is_close_to_float32():
    args = classifier(M=64, K=50, D=32)
    args = [a.detach().mul(0.3).requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    expected = linear_cross_entropy(*args)
    with torch.autocast("cpu", dtype=BFLOAT16):
        found = linear_cross_entropy(*args)
    assert found.dtype == torch.float32
    assert found.item() != expected.item()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    grads = gradients(found, args)
    assert {g.dtype for g in grads} == {torch.float32}
    assert_close_in_norm(grads, gradients(expected, args), 0.02)  # bfloat16 has 8 bits: 0.4 % a product


def unit(x):
    return torch.nn.functional.normalize(x.detach(), dim=-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cosines_are_not_rounded_before_a_low_temperature_divides_them(device):
    """At 0.1 and 0.04, logits in bfloat16 would move the prototypes' gradient by several percent."""
    z, prototypes, z_teacher, prototypes_teacher, centre = (t.to(device) for t in views(C=2, M=32, K=512, D=64))
    args = [unit(z).requires_grad_(), unit(prototypes).requires_grad_(), unit(z_teacher), unit(prototypes_teacher)]
    args.append(0.01 * centre)
    real = {"temperature_student": 0.1, "temperature_teacher": 0.04}
    expected = consistency(*args, **real)
    with torch.autocast(device, dtype=BFLOAT16):
        found = consistency(*args, **real)
    share = 1e-6 if device == "cpu" else 5e-3  # a GPU multiplies in bfloat16, and adds up in float32
    assert found.item() == pytest.approx(expected.item(), rel=share)
    assert_close_in_norm(gradients(found, args), gradients(expected, args), share)


def test_float16_autocast_does_not_lose_small_gradients():
    x, weight, bias, targets, weights = classifier()
    args = (x, weight, bias, targets, weights * 1e-9)  # the smallest float16 is 6e-8
    with torch.autocast("cpu", dtype=FLOAT16):
        found = linear_cross_entropy(*args)
    assert_close_in_norm(gradients(found, args), gradients(linear_cross_entropy(*args), args), 1e-6)


def test_gradients_have_the_dtypes_of_their_inputs():
    x, weight, bias, *rest = classifier()
    args = (x, weight.detach().bfloat16().requires_grad_(), bias.detach().bfloat16().requires_grad_(), *rest)
    found = gradients(linear_cross_entropy(*args, max_logits=33), args)
    assert [g.dtype for g in found] == [torch.float32, BFLOAT16, BFLOAT16]
    assert_close_in_norm(found, gradients(linear_cross_entropy(x, weight, bias, *rest), (x, weight, bias)), 0.02)


@pytest.mark.parametrize("make", [classifier, views])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # which torch 2.9's tracer does
def test_losses_compile_into_one_graph(make):
    args = make()

    def loss_of(*args):
        return linear_cross_entropy(*args, max_logits=44) if make is classifier else agree(args, max_logits=132)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False, backend="aot_eager")
    found, expected = compiled(*args), loss_of(*args)
    assert torch.equal(found, expected)
    for one, other in zip(gradients(found, args, 3.0), gradients(expected, args, 3.0), strict=True):
        torch.testing.assert_close(one, other)


def test_no_value_goes_to_python():
    args, others = classifier(), views()
    with no_host_sync():
        (linear_cross_entropy(*args, max_logits=33) + agree(others, max_logits=66)).backward()


class Allocated:
    """Bytes of CPU memory that a function takes: the peak of all that lives, and the largest piece."""

    def __init__(self, function, folder):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["args"]["Ev Idx"])
        sizes = torch.tensor([e["args"]["Bytes"] for e in memory])
        self.peak, self.largest = sizes.cumsum(0).max().item(), sizes.max().item()


def num_bytes(args):
    """Memory of the gradients."""
    return sum(4 * a.numel() for a in args if a.requires_grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_peak_memory_is_below_a_tenth_of_the_unchunked_loss(tmp_path, autocast):
    """Batch 32, three tasks, reduced from 64 tokens and 256 000 classes; as many chunks as there."""
    rows, num_classes = 32 * 3 * 16, 20_000
    args = classifier(M=rows, K=num_classes, D=32)
    max_logits = int(2**27 * rows * num_classes / (32 * 3 * 64 * 256_000))

    def unchunked():
        x, weight, bias, targets, weights = args
        gradients(F.cross_entropy(F.linear(x, weight, bias).float(), targets, reduction="none") @ weights, args)

    def chunked():
        gradients(linear_cross_entropy(*args, max_logits=max_logits), args)

    with torch.autocast("cpu", dtype=BFLOAT16, enabled=autocast):
        whole, extra = (Allocated(f, tmp_path).peak - num_bytes(args) for f in (unchunked, chunked))
    assert whole > 2 * 4 * rows * num_classes
    assert extra < 0.1 * whole
    if not autocast:
        assert extra < 1.1 * 4 * max_logits  # one float32 buffer


def test_consistency_never_holds_the_logits_of_all_rows(tmp_path):
    args = views(C=2, M=256, K=8192, D=16)
    max_logits = 2 * 32 * 8192
    allocated = Allocated(lambda: gradients(agree(args, max_logits=max_logits), args), tmp_path)
    assert allocated.largest < 4 * 256 * 8192 / 2
    assert allocated.peak - num_bytes(args) < 1.2 * 4 * (max_logits + max_logits / 2)  # the student's and the teacher's


def test_without_gradient_only_the_value_is_made(tmp_path):
    args = classifier(M=8, K=20_000, D=64)
    with torch.no_grad():
        allocated = Allocated(lambda: linear_cross_entropy(*args, max_logits=20_000), tmp_path)
        assert not linear_cross_entropy(*args).requires_grad
    assert allocated.peak < num_bytes(args) / 2


def test_shapes_that_do_not_fit_are_named():
    x, weight, bias, targets, weights = classifier()
    with pytest.raises(ValueError, match=r"expected x \[M, D\].* found .*\(11, 4\)"):
        linear_cross_entropy(x, weight[:, :4], bias, targets, weights)
    with pytest.raises(ValueError, match=r"found .*\(6,\)"):
        linear_cross_entropy(x, weight, bias, targets[:6], weights)
    with pytest.raises(ValueError, match=r"int32 or int64, found torch.float32"):
        linear_cross_entropy(x, weight, bias, weights, weights)
    z, prototypes, *teacher = views()
    with pytest.raises(ValueError, match=r"expected z_student \[C, M, D\].* found .*\(3, 6, 5\)"):
        agree((z[:, :6], prototypes, *teacher))
    with pytest.raises(ValueError, match=r"neither empty"):
        agree((z[:0], prototypes, *teacher))
    with pytest.raises(ValueError, match=r"temperatures above 0, found 0.1 and 0"):
        consistency(z, prototypes, *teacher, temperature_student=0.1, temperature_teacher=0)
