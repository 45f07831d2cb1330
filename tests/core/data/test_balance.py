"""Weights take planted bias out of a data set, as far as its numbers allow."""

from itertools import product

import numpy as np
import pytest

import siglip2.core.data.balance
from siglip2.core.data.balance import Constraints, Dual, Solver, balance

PREVALENCE = (0.24, 0.24)
QUICK = Solver(steps=2000)


def planted(count=20_000, seed=0, infeasible=False):
    """Two attributes and three labels; the first is too common, and each label goes with one of them."""
    random = np.random.default_rng(seed)
    y = random.random((count, 3)) < [0.05, 0.1, 0.2]
    lift = np.array([[0.3, -0.1, 0.05], [-0.1, 0.15, 0.0]])
    shares = np.clip(np.array([0.27, 0.08 if infeasible else 0.22]) + y @ lift.T, 0.01, 0.95)
    return random.random((count, 2)) < shares, y


def constraints(**more):
    return Constraints(("man", "woman"), PREVALENCE, ("doctor", "nurse", "cook"), **more)


def gap_by_hand(s, y, q, names):
    """E[q (s - pi) y] / E[q] of one constraint by its name, one sample at a time."""
    sensitive, _, label = names.partition(" x ")
    k = ("man", "woman").index(sensitive)
    other = y[:, ("doctor", "nurse", "cook").index(label)] if label else np.ones(len(s))
    total = sum(w * (a - PREVALENCE[k]) * b for w, a, b in zip(q, s[:, k].tolist(), other.tolist(), strict=True))
    return total / sum(q)


def test_planted_bias_is_within_its_tolerance_after_weighting():
    s, y = planted()
    q, gaps = balance(s, y, constraints(), QUICK)
    assert q.mean() == pytest.approx(0.9, abs=1e-6)
    assert q.min() >= 0
    assert q.max() <= 1
    assert all(gap.met for gap in gaps), gaps
    first, second = [g for g in gaps if " x " not in g.name], [g for g in gaps if " x " in g.name]
    for kind, planted_gap, tolerance in ((first, 0.03, 0.005), (second, 0.01, 0.001)):
        assert max(abs(g.before) for g in kind) > planted_gap
        assert max(abs(gap_by_hand(s, y, q, g.name)) for g in kind) <= tolerance
        for gap in kind:
            assert gap.before == pytest.approx(gap_by_hand(s, y, np.ones(len(s)), gap.name))
            assert gap.after == pytest.approx(gap_by_hand(s, y, q, gap.name))


def test_what_cannot_be_met_is_named_and_the_rest_is_met():
    s, y = planted(infeasible=True)
    gaps = {gap.name: gap for gap in balance(s, y, constraints(), QUICK)[1]}
    share = s[:, 1].mean()
    assert share < 0.9 * 0.24
    assert gaps["woman"].verdict.startswith(f"infeasible: {share:.3g} of the samples have it, 0.24 are wanted; keep at")
    assert {name for name, gap in gaps.items() if "infeasible" in gap.verdict} == {
        "woman",
        "woman x doctor",
        "woman x cook",
    }
    assert all(gap.met for gap in gaps.values() if "infeasible" not in gap.verdict)


def test_rate_that_is_advised_for_an_infeasible_prevalence_makes_it_feasible():
    s, y = planted(infeasible=True)
    alone = Constraints(("woman",), (0.2,))
    short = balance(s[:, 1:], y[:, :0], alone, QUICK)[1][0]
    rate = float(short.verdict.rpartition(" ")[2])
    assert balance(s[:, 1:], y[:, :0], alone, Solver(steps=2000, keep=0.99 * rate))[1][0].met


def test_wide_tolerances_leave_every_sample_its_utility():
    s, y = planted(2000)
    u = np.random.default_rng(1).random(2000) * 2
    u /= u.mean()
    q, _ = balance(s, y, constraints(representation=1, association=1), Solver(steps=4000, largest=2), utility_N=u)
    assert abs(q - 0.9 * u).max() < 1e-6


def test_without_a_penalty_nothing_is_balanced():
    s, y = planted(2000)
    q, gaps = balance(s, y, constraints(), Solver(steps=4000, penalty=0))
    assert np.ptp(q) == 0
    assert {gap.verdict for gap in gaps if abs(gap.before) > gap.tolerance} == {"not met"}


def test_mini_batches_come_near_to_what_all_samples_at_once_settle_on(monkeypatch):
    s, y = planted()
    settled = balance(s, y, constraints(), QUICK)[0]
    monkeypatch.setattr(siglip2.core.data.balance, "DISTINCT", 0)
    streamed, gaps = balance(s, y, constraints(), Solver(steps=40_000))
    assert abs(streamed - settled).max() < 0.05
    assert np.ptp(settled) > 0.4
    assert max(abs(gap.after) for gap in gaps if " x " in gap.name) < 0.002


def test_symmetric_data_needs_no_multiplier():
    rows = np.array(list(product([0, 1], repeat=3)))
    even = Constraints(("s",), (0.5,), ("a", "b"))
    dual, a = Dual(even, Solver(steps=2000)), even.biases(rows[:, :1], rows[:, 1:])
    for _ in range(2000):
        dual.update(a, np.ones(len(rows)))
    assert not dual.pull.any()
    assert dual.weights(a, np.ones(len(rows))) == pytest.approx(0.9, abs=1e-6)


def test_weights_for_one_attribute_are_those_found_by_hand():
    s = np.arange(1000) < 300
    q, _ = balance(s[:, None], s[:, None][:, :0], Constraints(("s",), (0.28,), representation=0.0), QUICK)
    # E[q s] = 0.28 * 0.9 and E[q] = 0.9
    assert q[s] == pytest.approx(0.28 * 0.9 / 0.3, abs=1e-5)
    assert q[~s] == pytest.approx(0.72 * 0.9 / 0.7, abs=1e-5)


def test_biases_are_the_products_of_the_facts():
    s, y = np.array([[1, 0]]), np.array([[1, 0, 1]])
    assert constraints().biases(s, y).tolist() == [pytest.approx([0.76, 0, 0.76, -0.24, 0, -0.24, 0.76, -0.24])]
    assert constraints().names == [f"{s} x {y}" for s in ("man", "woman") for y in ("doctor", "nurse", "cook")] + [
        "man",
        "woman",
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constraints(("a",), (1.0,)), "the prevalence of a is 1, expected a share between 0 and 1"),
        (lambda: Constraints((), ()), "0 sensitive attributes"),
        (lambda: Constraints(("a",), (0.5,), representation=-1), "tolerances are -1 and"),
        (lambda: Solver(keep=1.2), "keep is 1.2, expected a mean weight above 0 and up to 1"),
        (lambda: Constraints(("a",), (0.5,), association=float("nan")), "tolerances are 0.005 and nan"),
        (lambda: Solver(steps=0), "steps and batch of at least 1"),
        (lambda: Solver(penalty=float("nan")), "expected a finite penalty >= 0"),
        (lambda: Solver(rate=float("nan")), "rate > 0, .* found 10, nan"),
        (lambda: Solver(seed=-1), "seed is -1"),
        (lambda: balance(np.zeros((0, 2)), np.zeros((0, 3)), constraints(), QUICK), "no samples to balance"),
    ],
)
def test_errors_say_what_was_found(build, message):
    with pytest.raises(ValueError, match=message):
        build()
