"""Losses over very many classes that never hold all logits: value and gradients are made a chunk of rows at a time.

The gradient of a cross-entropy in its logits is softmax - target, known as soon as the softmax is. So the forward pass
turns each chunk of logits into that gradient, in the same memory, and multiplies it out; the backward pass only scales.
What is kept between the passes are the gradients of the inputs, which backward would have to hold anyway.

Where one program spans several devices (GSPMD), each has a run of neighbouring rows. A chunk then takes as many rows of
every device, so that all work on each chunk, and there are as many chunks as if a device were alone with its rows:
their loop is unrolled into the program. Gradients of the classes are added up on each device, and over devices once.
"""

# M rows (tokens), P rows of one device, R rows of one chunk, K classes or prototypes, D width, C student views of each
# teacher row, G devices

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**27
"""Logits of one chunk: half a gigabyte of float32. Ours: 512 rows of a vocabulary of 256 000 still fill a GPU."""

CPU_LOGITS = 2**22
"""The same on a CPU, as long as 512 rows are left: what stays in the cache is twice as fast at 3000 classes. Ours."""

TILE = 128  # rows of a matrix unit's tile, ours: 524 rows would cost as much as 640


def linear_cross_entropy(
    x_MD: Tensor,
    weight_KD: Tensor,
    bias_K: Tensor,
    targets_M: Tensor,
    weights_M: Tensor,
    *,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Weighted cross-entropy of a linear classifier: sum_m weights_m * -log softmax(x_m W^T + b)[targets_m].

    Under autocast the matrix products run in its dtype; softmax and sums are float32. Gradients have the dtypes of the
    inputs and can be asked for once: a second backward pass raises RuntimeError.

    Args:
        x_MD: inputs of the classifier, float.
        weight_KD: one row per class, float.
        bias_K: float.
        targets_M: class of each row, int32 or int64 in [0, K), also where the weight is 0.
        weights_M: float, gets no gradient; a row of weight 0 contributes nothing, whatever its x.
        max_logits: how many logits are held at a time, at least those of one row.

    Returns:
        Scalar float32, in nats.

    Raises:
        ValueError: if the shapes do not fit together, or targets are no integers.
    """
    _check_linear(x_MD, weight_KD, bias_K, targets_M, weights_M)
    dtype = _product_dtype(x_MD, weight_KD)
    classifier = _differentiable(x_MD, weight_KD, bias_K)
    with torch.autocast(x_MD.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(*classifier, targets_M, weights_M.detach(), dtype, max_logits)
    return loss


def consistency(
    z_student_CMD: Tensor,
    prototypes_student_KD: Tensor,
    z_teacher_MD: Tensor,
    prototypes_teacher_KD: Tensor,
    centre_K: Tensor,
    *,
    temperature_student: float,
    temperature_teacher: float,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Cross-entropy of the student's prototype assignments to the teacher's, mean over views and rows.

    Source: Caron et al. (DINO), https://arxiv.org/abs/2104.14294, algorithm 1: -sum_k q_k log p_k with
    q = softmax((z_t P_t^T - centre) / tau_t) and p = softmax(z_s P_s^T / tau_s). The teacher's side gets no gradient.
    Dtypes and the single backward pass are those of `linear_cross_entropy`, but logits are never rounded to low
    precision: divided by a temperature of 0.04, that would be off by up to 0.06 nats. Under autocast on a GPU the
    products take its dtype and give float32; elsewhere they are float32.

    Args:
        z_student_CMD: the student's embeddings of C views, row m of each matched with the teacher's row m, float.
        prototypes_student_KD: float.
        z_teacher_MD: float.
        prototypes_teacher_KD: float.
        centre_K: subtracted from the teacher's logits, float.
        temperature_student: tau_s, above 0.
        temperature_teacher: tau_t, above 0; below tau_s it sharpens the targets.
        max_logits: how many logits of the student are held at a time, beside 1/C of that of the teacher.

    Returns:
        Scalar float32, in nats; never below the mean entropy of the teacher's assignments.

    Raises:
        ValueError: if the shapes do not fit together, or a temperature is not above 0.
    """
    _check_consistency(z_student_CMD, prototypes_student_KD, z_teacher_MD, prototypes_teacher_KD, centre_K)
    if not (temperature_student > 0 and temperature_teacher > 0):
        raise ValueError(f"expected temperatures above 0, found {temperature_student} and {temperature_teacher}")
    dtype = _product_dtype(z_student_CMD, prototypes_student_KD)
    dtype = dtype if z_student_CMD.is_cuda else _sum_dtype(dtype)
    student = _differentiable(z_student_CMD / temperature_student, prototypes_student_KD)
    teacher = (z_teacher_MD / temperature_teacher, prototypes_teacher_KD, centre_K / temperature_teacher)
    with torch.autocast(z_student_CMD.device.type, enabled=False):
        total: Tensor = _Consistency.apply(*student, *(t.detach() for t in teacher), dtype, max_logits)
    return total / (z_student_CMD.shape[0] * z_student_CMD.shape[1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        max_logits: int,
    ) -> Tensor:
        count = _devices_of(x.shape[0], x.device)
        grad_x, *sums = grads = _grads(ctx, x, weight, bias, dtype=dtype, count=count)
        w, b = weight.to(dtype), bias.to(dtype)
        loss = x.new_zeros((), dtype=_sum_dtype(dtype))
        x_GPD, targets_GP, weights_GP = (_by_device(t, count) for t in (x, targets, weights))
        grad_x_GPD = None if grad_x is None else grad_x.unflatten(0, (count, -1))
        for rows in _chunks(x.shape[0] // count, w.shape[0], max_logits, x.device):
            grad_rows = None if grad_x_GPD is None else grad_x_GPD[:, rows]
            x_RD, targets_R, weights_R = (t[:, rows].flatten(0, 1) for t in (x_GPD, targets_GP, weights_GP))
            loss += _classify(x_RD, targets_R, weights_R, w, b, grad_rows, *sums)
        _save(ctx, grads, (x, weight, bias))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad_loss), None, None, None, None)


def _classify(
    x: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Tensor:
    """Returns the loss of one chunk of rows, writes their gradient to `grad_x` and adds to the other two."""
    share, target = weights[:, None].to(_sum_dtype(weight.dtype)), targets[:, None].long()  # [R, 1]
    x = torch.where(share != 0, x, 0).to(weight.dtype)  # a row that does not count may overflow
    logits = torch.addmm(bias, x, weight.T).to(share.dtype)  # [R, K], and all that follows in the same memory
    at_target = logits.gather(1, target)
    log_total, total = _exponentiate_(logits)
    logits.mul_(share / total).scatter_add_(1, target, -share)  # share * (softmax - one-hot)
    if grad_bias is not None:
        grad_bias += logits.unflatten(0, (len(grad_bias), -1)).sum(1)
    _multiply_out(logits.to(weight.dtype), x, weight, grad_x, grad_weight)
    return (share * (log_total - at_target)).sum()


class _Consistency(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        prototypes: Tensor,
        z_teacher: Tensor,
        prototypes_teacher: Tensor,
        centre: Tensor,
        dtype: torch.dtype,
        max_logits: int,
    ) -> Tensor:
        count = _devices_of(z.shape[1], z.device)
        grad_z, grad_prototypes = grads = _grads(ctx, z, prototypes, dtype=dtype, count=count)
        p, p_teacher = prototypes.to(dtype), prototypes_teacher.to(dtype)
        loss = z.new_zeros((), dtype=_sum_dtype(dtype))
        z_GCPD, z_teacher_GPD = _by_device(z, count, dim=1).transpose(0, 1), _by_device(z_teacher, count)
        grad_z_GCPD = None if grad_z is None else grad_z.unflatten(1, (count, -1)).transpose(0, 1)
        for rows in _chunks(z.shape[1] // count, z.shape[0] * p.shape[0], max_logits, z.device):
            grad_rows = None if grad_z_GCPD is None else grad_z_GCPD[:, :, rows]
            q = _assign(z_teacher_GPD[:, rows], p_teacher, centre)
            loss += _follow(z_GCPD[:, :, rows], p, q, grad_rows, grad_prototypes)
        _save(ctx, grads, (z, prototypes))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad_loss), None, None, None, None, None)


def _assign(z: Tensor, prototypes: Tensor, centre: Tensor) -> Tensor:
    """Returns the teacher's assignments softmax(z P^T - centre) of z [G, R, D], [G, R, K]."""
    logits = _wide_product(z.to(prototypes.dtype).flatten(0, 1), prototypes).sub_(centre)
    _, total = _exponentiate_(logits)
    return logits.div_(total).unflatten(0, z.shape[:2])


def _follow(z: Tensor, prototypes: Tensor, q: Tensor, grad_z: Tensor | None, grad_prototypes: Tensor | None) -> Tensor:
    """Returns the cross-entropy of z [G, C, R, D] to q [G, R, K], writes the gradient of z and adds to the other."""
    x = z.to(prototypes.dtype).flatten(0, 2)
    logits = _wide_product(x, prototypes)  # [G * C * R, K], and all that follows in the same memory
    by_view = logits.unflatten(0, z.shape[:3])
    agreement = torch.einsum("gcrk,grk->gcr", by_view, q)  # a product and a sum would take as much memory again
    log_total, total = _exponentiate_(logits)
    logits.div_(total)
    by_view.sub_(q[:, None])
    _multiply_out(logits.to(x.dtype), x, prototypes, grad_z, grad_prototypes)
    return log_total.sum() - agreement.sum()  # -sum_k q_k (logits_k - log_total), as q sums to 1


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x W^T in at least float32, without rounding to the dtype of the inputs in between."""
    wide = _sum_dtype(x.dtype)
    return x @ weight.T if x.dtype == wide else torch.mm(x, weight.T, out_dtype=wide)  # CUDA only, hence `consistency`


def _exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits [R, K] by exp(logits - largest); returns their logsumexp and the new sum, [R, 1] both."""
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return total.log() + largest, total


def _multiply_out(grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None) -> None:
    """Passes the gradient of the logits x W^T on: writes that of x, adds that of W."""
    if grad_x is not None:
        grad_x.copy_((grad @ weight).view_as(grad_x))
    if grad_weight is None:
        return
    if len(grad_weight) > 1:
        grad_GRK, x_GRD = (t.unflatten(0, (len(grad_weight), -1)) for t in (grad, x))
        grad_weight += grad_GRK.mT @ x_GRD
    elif grad_weight.dtype == grad.dtype:
        grad_weight[0].addmm_(grad.T, x)  # no second [K, D]
    else:
        grad_weight[0].add_(grad.T @ x)


def _devices_of(num_rows: int, device: torch.device) -> int:
    """Returns over how many devices of one program so many rows lie in equal parts; 1 if it has only one."""
    if device.type != "xla":
        return 1
    import torch_xla.runtime as xr

    count: int = xr.global_runtime_device_count() if xr.is_spmd() else 1
    return count if num_rows % count == 0 else 1


def _by_device(tensor: Tensor, count: int, dim: int = 0) -> Tensor:
    """Returns the rows along a dimension as [G, P], those of each device on it.

    Else prediction and target of a row, [K] both, could lie on different devices, and one of them would have to travel.
    """
    parts = tensor.unflatten(dim, (count, -1))
    if count > 1:
        import torch_xla.distributed.spmd as xs

        mesh: Any = xs.get_global_mesh()
        xs.mark_sharding(parts, mesh, tuple(0 if d == dim else None for d in range(parts.ndim)))
    return parts


def _chunks(num_rows: int, num_classes: int, max_logits: int, device: torch.device) -> Iterator[slice]:
    size = max(1, max_logits // num_classes)
    if device.type == "cpu":
        size = min(size, max(512, CPU_LOGITS // num_classes))
    if size > TILE:
        size -= size % TILE
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return torch.promote_types(x.dtype, weight.dtype)
    dtype = torch.get_autocast_dtype(kind)
    # these gradients are made before a GradScaler could scale the loss: in float16 they would round to zero
    return torch.float32 if dtype == torch.float16 else dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors, detached under `torch.no_grad`: `ctx.needs_input_grad` does not know of it."""
    return tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)


def _grads(ctx: Any, rows: Tensor, *summed: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor | None, ...]:
    """Returns memory for the gradients that are needed, of inputs by row and, [G, ...], of those that chunks add to."""
    needed = ctx.needs_input_grad[: 1 + len(summed)]
    grad_rows = torch.empty_like(rows) if needed[0] else None
    sums = (
        t.new_zeros((count, *t.shape), dtype=_sum_dtype(dtype)) if n else None
        for t, n in zip(summed, needed[1:], strict=True)
    )
    return (grad_rows, *sums)


def _save(ctx: Any, grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> None:
    rows, *sums = grads
    whole = (None if g is None else g[0] if len(g) == 1 else g.sum(0) for g in sums)
    ctx.save_for_backward(*(None if g is None else g.to(t.dtype) for g, t in zip((rows, *whole), inputs, strict=True)))


def _scaled(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """Returns the saved gradients times that of the loss, in place: autograd notices if they are asked for again."""
    return [None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors]


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> None:
    found = [tuple(t.shape) for t in (x, weight, bias, targets, weights)]
    num_rows, num_classes, width = x.shape[0], weight.shape[0], x.shape[-1]
    expected = [(num_rows, width), (num_classes, width), (num_classes,), (num_rows,), (num_rows,)]
    if found != expected:
        raise ValueError(f"expected x [M, D], weight [K, D], bias [K], targets [M] and weights [M], found {found}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected class numbers as targets, int32 or int64, found {targets.dtype}")


def _check_consistency(*tensors: Tensor) -> None:
    found = [tuple(t.shape) for t in tensors]
    z, prototypes = found[:2]
    expected = [z, (*prototypes[:1], *z[-1:]), z[1:], prototypes, prototypes[:1]]
    if len(z) != 3 or 0 in z or found != expected:
        raise ValueError(
            "expected z_student [C, M, D] and z_teacher [M, D], neither empty, prototypes [K, D] of both and a centre "
            f"[K]; found z_student, prototypes, z_teacher, prototypes, centre of shapes {found}"
        )
