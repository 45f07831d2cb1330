"""The projection head and the centre: unit norms, means over ranks, and what keeps a student from collapsing."""

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from siglip2.core.chunked import consistency
from siglip2.core.optim import settle
from siglip2.core.self_distillation import Centre, ProjectionHead

RANKS, MOMENTUM = 2, 0.75

# M rows, K prototypes, D bottleneck


def head(seed=0, hidden=64, bottleneck=16, prototypes=32):
    torch.manual_seed(seed)
    return ProjectionHead(16, hidden=hidden, bottleneck=bottleneck, prototypes=prototypes)


def test_head_is_three_layers_and_prototypes_of_the_published_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ProjectionHead(768).named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 768),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "prototype_weight": (65536, 256),
    }


def test_head_starts_from_normal_weights_of_std_002_without_bias():
    for name, parameter in head(prototypes=512, hidden=256).named_parameters():
        std = 0.0 if name.endswith("bias") else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_matrices_of_the_head_decay_and_biases_do_not():
    decays = {name: settle(name, p.ndim, []).decay for name, p in head().named_parameters()}
    assert {name for name, decay in decays.items() if not decay} == {"mlp.0.bias", "mlp.2.bias", "mlp.4.bias"}


def test_head_is_its_equation_with_unit_norm():
    found, x = head(), torch.randn(3, 5, 16)
    z = found(x)
    first, _, second, _, third = found.double().mlp
    hidden = x.double()
    for linear in (first, second):
        hidden = hidden @ linear.weight.T + linear.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU
    expected = hidden @ third.weight.T + third.bias
    expected /= expected.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-6)


def test_length_of_a_prototype_weight_does_not_matter():
    found = head()
    before = found.prototypes()
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(32))
    with torch.no_grad():
        found.prototype_weight.mul_(torch.rand(32, 1) + 0.1)
    torch.testing.assert_close(found.prototypes(), before)


def test_norms_are_float32_under_bfloat16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, prototypes = head()(torch.randn(9, 16)), head().prototypes()
    assert (z.dtype, prototypes.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(9))


def test_a_projection_of_zero_stays_finite():
    found = head()
    x = torch.zeros(2, 16, requires_grad=True)  # biases are 0, so the bottleneck is too
    found(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("teacher_seed", "agreement"), [(1, 1 / (256 * 0.1 * 0.04)), (2, 0.0)])
def test_loss_at_initialisation_is_about_the_log_of_the_number_of_prototypes(teacher_seed, agreement):
    """Cosines of random directions have variance 1/D: ln K + 1 / (2 D tau_s^2), less what a copied head agrees on."""
    student, teacher = (head(prototypes=8192, bottleneck=256, seed=seed) for seed in (1, teacher_seed))
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    z, prototypes = student(x)[None], student.prototypes()
    temperatures = {"temperature_student": 0.1, "temperature_teacher": 0.04}
    loss = consistency(z, prototypes, teacher(x), teacher.prototypes(), torch.zeros(8192), **temperatures)
    expected = math.log(8192) + 1 / (2 * 256 * 0.1**2) - agreement
    assert loss.item() == pytest.approx(expected, abs=0.05)
    assert loss.item() == pytest.approx(math.log(8192), abs=1)


def test_a_student_equal_to_its_teacher_has_minimal_loss():
    same, x = head(), torch.randn(12, 16)
    with torch.no_grad():
        z, prototypes = same(x), same.prototypes()

    def loss_of(z_student, prototypes_student):
        centre = torch.zeros(32)
        both = {"temperature_student": 0.1, "temperature_teacher": 0.1}
        return consistency(z_student[None], prototypes_student, z, prototypes, centre, **both)

    leaves = z.clone().requires_grad_(), prototypes.clone().requires_grad_()
    least = loss_of(*leaves)
    least.backward()
    assert max(leaf.grad.abs().max().item() for leaf in leaves) < 1e-6
    for _ in range(20):
        changed = [leaf + 0.05 * torch.randn_like(leaf) for leaf in leaves]
        assert loss_of(changed[0], leaves[1]) > least
        assert loss_of(leaves[0], changed[1]) > least


def batches():
    """Embeddings [M, D] of three steps of all ranks, and the prototypes."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, generator=g), torch.randn(5, 4, generator=g)


def centre_by_hand():
    value, (steps, prototypes) = torch.zeros(5).double(), batches()
    for z in steps:
        logits = z.double() @ prototypes.double().T  # [M, K]
        value = MOMENTUM * value + (1 - MOMENTUM) * logits.mean(0)
    return value


def test_centre_is_the_running_mean_of_the_logits():
    centre, (steps, prototypes) = Centre(5, momentum=MOMENTUM), batches()
    for z in steps:
        centre.collect(z.requires_grad_(), prototypes)
        centre.move()
    torch.testing.assert_close(centre.value.double(), centre_by_hand(), rtol=1e-5, atol=1e-6)
    assert not centre.value.requires_grad
    assert list(centre.state_dict()) == ["value"]


def test_centre_stays_until_it_is_moved_and_then_takes_the_mean_of_all_parts():
    centre, (steps, prototypes) = Centre(5, momentum=MOMENTUM), batches()
    for z in steps:
        for part in z.chunk(3):
            before = centre.value.clone()
            centre.collect(part, prototypes)
            assert torch.equal(centre.value, before)
        centre.move()
    torch.testing.assert_close(centre.value.double(), centre_by_hand(), rtol=1e-5, atol=1e-6)
    centre.move()  # nothing was collected
    torch.testing.assert_close(centre.value.double(), centre_by_hand(), rtol=1e-5, atol=1e-6)


def test_centre_of_a_bfloat16_module_moves_too():
    centre, (steps, prototypes) = Centre(5, momentum=MOMENTUM).bfloat16(), batches()
    for z in steps:
        centre.collect(z.bfloat16(), prototypes.bfloat16())
        centre.move()
    assert centre.value.dtype == torch.bfloat16
    torch.testing.assert_close(centre.value.double(), centre_by_hand(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Centre(1), "centre: prototypes is 1, expected at least 2"),
        (lambda: Centre(8, momentum=1.5), r"centre: momentum is 1.5, expected a share in \[0, 1\]"),
        (lambda: Centre(8, momentum=math.nan), "centre: momentum is nan"),
        (lambda: head(hidden=0), "projection head: hidden is 0, expected at least 1"),
        (lambda: head(bottleneck=-1), "projection head: bottleneck is -1, expected at least 1"),
        (lambda: head(prototypes=0), "projection head: prototypes is 0, expected at least 1"),
    ],
)
def test_sizes_and_momenta_out_of_their_range_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def one_rank(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=number, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    centre, (steps, prototypes) = Centre(5, momentum=MOMENTUM), batches()
    for z in steps:
        centre.collect(z.chunk(RANKS)[number], prototypes)
        centre.move()
    torch.save(centre.value, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_centre_of_two_ranks_is_that_of_one(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=RANKS)
    for number in range(RANKS):
        found = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(found.double(), centre_by_hand(), rtol=1e-5, atol=1e-6)


class Toy(nn.Module):
    """A body and a head that learn from noisy views of Gaussian inputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = ProjectionHead(16, hidden=64, bottleneck=16, prototypes=32)

    def forward(self, x):
        return self.head(self.body(x))


def assignments_after_training(seed, *, momentum):
    """What the EMA teacher assigns to 1024 inputs after 200 steps, [1024, 32]; with momentum 1 the centre stays 0."""
    torch.manual_seed(seed)
    student, centre = Toy(), Centre(32, momentum=momentum)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for _ in range(200):
        x, noise = torch.randn(128, 16), 0.3 * torch.randn(2, 128, 16)
        z, prototypes = teacher(x + noise[0]), teacher.head.prototypes()
        temperatures = {"temperature_student": 0.1, "temperature_teacher": 0.04}
        pair = student(x + noise[1])[None], student.head.prototypes()
        loss = consistency(*pair, z, prototypes, centre.value, **temperatures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        centre.collect(z, prototypes)
        centre.move()
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.01)
    logits = teacher(torch.randn(1024, 16)) @ teacher.head.prototypes().T
    return ((logits - centre.value) / 0.04).softmax(-1)


def entropy(q):
    return torch.special.entr(q).sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_centering_prevents_a_collapse_that_happens_without_it(seed):
    """Collapsed, one prototype has every input: the mean assignment has no entropy, of at most ln 32 = 3.47."""
    centred, bare = (assignments_after_training(seed, momentum=m) for m in (0.9, 1.0))
    spread = entropy(centred.mean(0))
    assert spread > 2.5
    assert spread - entropy(centred).mean() > 0.3  # and different inputs have different prototypes
    assert entropy(bare.mean(0)) < 0.1
