"""Example weights that take the association between sensitive attributes and labels out of a data set.

Source: Alabdulmohsin et al., CLIP the Bias: how useful is balancing data in multimodal learning? (M4),
https://arxiv.org/abs/2403.04547. The dual is derived from its constraints; the paper's own may differ in detail.
"""

# N samples, B of a mini-batch, P distinct ones, M sensitive attributes, C labels and proxies, K = M (C + 1) constraints

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TELL_EVERY = 256  # steps: a progress bar takes longer than one
AT_LIMIT = 0.95  # of the penalty, from where on a multiplier counts as being at its limit
AIM = 0.9  # ours: of a tolerance that is aimed at, so that what is met is met clearly
PIECE = 2**16  # samples whose bias vectors are made at a time
DISTINCT = 2**16  # kinds of samples up to which the multipliers are settled on all of them at once
SETTLED, MOST_ROUNDS = 1e-7, 20_000  # what is left of a constraint then, and when to give up


@dataclass(frozen=True)
class Constraints:
    """What has to hold of the sampled data: s are sensitive attributes, y labels, pi the wanted prevalence.

    First order (representation): |E[q (s_k - pi_k)]| <= eps_R. Second order (association): |E[q (s_k - pi_k) y_r]| <=
    eps_D. Both eps are for a mean weight of 1: they are multiplied by the mean weight that is kept.

    Args:
        sensitive: names of the sensitive attributes, M.
        prevalence: the wanted share of each, pi.
        labels: names of labels and proxies, C.
        representation: eps_R.
        association: eps_D.

    Raises:
        ValueError: if there is no sensitive attribute, a prevalence is not inside (0, 1), or a tolerance is negative.
    """

    sensitive: tuple[str, ...]
    prevalence: tuple[float, ...]
    labels: tuple[str, ...] = ()
    representation: float = 0.005
    association: float = 0.001

    def __post_init__(self) -> None:
        if not self.sensitive or len(self.sensitive) != len(self.prevalence):
            raise ValueError(f"{len(self.sensitive)} sensitive attributes with {len(self.prevalence)} prevalences")
        for name, share in zip(self.sensitive, self.prevalence, strict=True):
            if not 0 < share < 1:
                raise ValueError(f"the prevalence of {name} is {share:g}, expected a share between 0 and 1")
        if not (self.representation >= 0 and self.association >= 0):  # as NaN is not, either
            raise ValueError(f"tolerances are {self.representation:g} and {self.association:g}, expected 0 or more")

    @property
    def names(self) -> list[str]:
        """What each constraint is about, K; the association with every label first, then the prevalence."""
        return [f"{s} x {label}" for s in self.sensitive for label in self.labels] + list(self.sensitive)

    @property
    def tolerances(self) -> NDArray[np.float64]:
        """eps of each constraint, float64 [K]."""
        m, c = len(self.sensitive), len(self.labels)
        return np.repeat([self.association, self.representation], [m * c, m])

    def biases(self, s_BM: NDArray[Any], y_BC: NDArray[Any]) -> NDArray[np.float64]:
        """The vector a of each sample: (s_k - pi_k) y_r for all k and r, then s_k - pi_k for all k; float64 [B, K]."""
        centred_BM = s_BM - np.array(self.prevalence)
        products_BMC = centred_BM[:, :, None] * y_BC[:, None, :]
        return np.concatenate([products_BMC.reshape(len(s_BM), -1), centred_BM], axis=1)


@dataclass(frozen=True)
class Solver:
    """How the weights are found.

    Args:
        keep: eta, the mean weight; the largest at which the constraints can be met is best, 0.9 in the paper (?).
        largest: Q, no weight is above it.
        penalty: V, what one unit of a constraint's excess costs; the limit of its multiplier. 0 balances nothing.
        steps: mini-batches.
        batch: samples of each.
        rate: tau_0; step t is tau_0 / sqrt(t).
        seed: of the mini-batches.

    Raises:
        ValueError: if a number is out of range.
    """

    keep: float = 0.9
    largest: float = 1.0
    penalty: float = 10.0
    steps: int = 20_000
    batch: int = 256
    rate: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.largest < np.inf:
            raise ValueError(
                f"keep is {self.keep:g}, expected a mean weight above 0 and up to {self.largest:g}, which is finite"
            )
        if not (0 <= self.penalty < np.inf and 0 < self.rate < np.inf and min(self.steps, self.batch) >= 1):
            raise ValueError(
                f"expected a finite penalty >= 0 and rate > 0, steps and batch of at least 1, found {self.penalty:g}, "
                f"{self.rate:g}, {self.steps} and {self.batch}"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")


class Dual:
    """The multipliers, which are all that is remembered of the samples seen: 2 K + 1 numbers.

    They minimise 0.5 E[(q - eta u)^2] + V (sum of excesses over the tolerances) over 0 <= q <= Q with E[q] = eta.

    Args:
        constraints: what has to hold.
        solver: how it is found.
    """

    def __init__(self, constraints: Constraints, solver: Solver) -> None:
        self.constraints, self.solver = constraints, solver
        self._eps = constraints.tolerances * solver.keep * AIM
        self._now = np.zeros(2 * len(self._eps) + 1)  # v+, v-, mu
        self._sum, self._step = np.zeros_like(self._now), 0
        self._settled: NDArray[np.float64] | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """v+, v- and mu, settled or averaged over the second half of the steps, float64 [2 K + 1]."""
        if self._settled is not None:
            return self._settled
        return self._sum / max(1, self._step - self.solver.steps // 2)

    @property
    def pull(self) -> NDArray[np.float64]:
        """v+ - v- of each constraint, averaged, float64 [K]."""
        plus, minus = np.split(self.mean[:-1], 2)
        return plus - minus

    def update(self, a_BK: NDArray[np.float64], utility_B: NDArray[np.float64]) -> None:
        """Takes one step: v <- clip(v + tau (+-E[q a] - eps), 0, V) and mu <- mu + tau (E[q] - eta)."""
        self._step += 1
        tau = self.solver.rate / np.sqrt(self._step)
        q_B = self._weights(self._now, a_BK, utility_B)
        gap_K = q_B @ a_BK / len(q_B)
        self._now[:-1] += tau * np.concatenate([gap_K - self._eps, -gap_K - self._eps])
        self._now[:-1] = self._now[:-1].clip(0, self.solver.penalty)
        self._now[-1] += tau * (q_B.mean() - self.solver.keep)
        if self._step > self.solver.steps // 2:
            self._sum += self._now

    def settle(self, a_PK: NDArray[np.float64], utility_P: NDArray[np.float64], share_P: NDArray[np.float64]) -> None:
        """Goes on from the averaged multipliers with exact expectations, until the constraints stand.

        Mini-batches come near to where a multiplier belongs only slowly if its label is rare. The dual is concave and
        its slope as steep as E[a a^T] at most, so that accelerated ascent finds its top.

        Source: FISTA, Beck and Teboulle, https://doi.org/10.1137/080716542, eq. 4.1 to 4.3, restarted where it turns
        back (O'Donoghue and Candes, https://arxiv.org/abs/1204.3982).

        Args:
            a_PK: bias vectors of the distinct samples.
            utility_P: their utility.
            share_P: what share of the samples each stands for.
        """
        full = np.hstack([a_PK, -a_PK, np.ones((len(a_PK), 1))])
        limits = np.concatenate([self._eps, self._eps, [self.solver.keep]])
        low, high = np.zeros(len(limits)), np.full(len(limits), float(self.solver.penalty))
        low[-1], high[-1] = -np.inf, np.inf
        steepest = np.linalg.eigvalsh((full * share_P[:, None]).T @ full)[-1]
        now = ahead = self.mean
        momentum = 1.0
        for _ in range(MOST_ROUNDS):
            slope = (share_P * self._weights(ahead, a_PK, utility_P)) @ full - limits
            new = np.clip(ahead + slope / steepest, low, high)
            if abs(new - ahead).max() * steepest < SETTLED:
                break
            if (new - ahead) @ (new - now) < 0:
                momentum = 1.0
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            now, ahead, momentum = new, new + (momentum - 1) / following * (new - now), following
        self._settled = new

    def weights(self, a_BK: NDArray[np.float64], utility_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """q = clip(eta u - (v+ - v-) . a - mu, 0, Q) with the multipliers that were found, float64 [B]."""
        return self._weights(self.mean, a_BK, utility_B)

    def _weights(
        self, duals: NDArray[np.float64], a_BK: NDArray[np.float64], utility_B: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        k = len(self._eps)
        wanted_B = self.solver.keep * utility_B - a_BK @ (duals[:k] - duals[k:-1]) - duals[-1]
        return np.clip(wanted_B, 0, self.solver.largest)


@dataclass(frozen=True)
class Gap:
    """One constraint before and after.

    Args:
        name: `woman` for how often there is one, `woman x doctor` for what that says of the other.
        before: E[a] of the data as it is.
        after: E[q a] / E[q], of the data sampled by weight.
        tolerance: how far from 0 it may be.
        verdict: "met", or why not.
    """

    name: str
    before: float
    after: float
    tolerance: float
    verdict: str

    @property
    def met(self) -> bool:
        """Whether the gap is within its tolerance."""
        return self.verdict == "met"


def balance(
    s_NM: NDArray[np.bool_],
    y_NC: NDArray[np.bool_],
    constraints: Constraints,
    solver: Solver,
    *,
    utility_N: NDArray[np.float64] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float64], list[Gap]]:
    """Returns the weight of each sample, float64 [N] in [0, Q], and what became of each constraint.

    The multipliers are found on mini-batches; where samples are of few kinds they are then settled on all of them.

    Args:
        s_NM: which samples have which sensitive attribute.
        y_NC: which samples have which label or proxy.
        constraints: what has to hold.
        solver: how it is found.
        utility_N: u >= 0, how useful each sample is apart from that; None is 1 for all.
        progress: called with the number of steps done, now and then and at the end.

    Raises:
        ValueError: if there are no samples, or all weights would be 0.
    """
    if not len(s_NM):
        raise ValueError("no samples to balance")
    utility_N = np.ones(len(s_NM)) if utility_N is None else utility_N
    dual, random = Dual(constraints, solver), np.random.default_rng(solver.seed)
    for step in range(1, solver.steps + 1):
        rows = random.integers(len(s_NM), size=solver.batch)
        dual.update(constraints.biases(s_NM[rows], y_NC[rows]), utility_N[rows])
        if progress is not None and (step % TELL_EVERY == 0 or step == solver.steps):
            progress(step)
    kinds, counts = _kinds(s_NM, y_NC, utility_N)
    if len(kinds) <= DISTINCT:
        dual.settle(constraints.biases(s_NM[kinds], y_NC[kinds]), utility_N[kinds], counts / counts.sum())
    q_N, before, after = np.empty(len(s_NM)), np.zeros(len(constraints.names)), np.zeros(len(constraints.names))
    for begin in range(0, len(s_NM), PIECE):
        piece = slice(begin, begin + PIECE)
        a = constraints.biases(s_NM[piece], y_NC[piece])
        q_N[piece] = dual.weights(a, utility_N[piece])
        before, after = before + a.sum(axis=0), after + q_N[piece] @ a
    if not q_N.any():
        raise ValueError("all weights came out as 0: take more steps, a smaller rate or a smaller penalty")
    return q_N, _gaps(before / len(q_N), after / q_N.sum(), dual)


def _kinds(
    s_NM: NDArray[np.bool_], y_NC: NDArray[np.bool_], utility_N: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of one sample of each distinct kind, int64 [P], and how many there are of it, int64 [P]."""
    answers = [np.packbits(part.astype(bool), axis=1) for part in (s_NM, y_NC)]
    as_bytes = np.ascontiguousarray(utility_N, dtype=np.float64).view(np.uint8).reshape(len(s_NM), -1)
    rows = np.ascontiguousarray(np.concatenate([*answers, as_bytes], axis=1))
    whole = rows.view(np.dtype((np.void, rows.shape[1])))[:, 0]
    _, kinds, counts = np.unique(whole, return_index=True, return_counts=True)
    return kinds, counts


def _gaps(before: NDArray[np.float64], after: NDArray[np.float64], dual: Dual) -> list[Gap]:
    constraints, solver = dual.constraints, dual.solver
    short = _short_of(before, constraints, solver)
    found = []
    rows = zip(constraints.names, before, after, constraints.tolerances, dual.pull, strict=True)
    for number, (name, old, new, tolerance, pull) in enumerate(rows):
        if abs(new) <= tolerance:
            verdict = "met"
        elif short[number]:
            verdict = short[number]
        elif solver.penalty and abs(pull) >= AT_LIMIT * solver.penalty:
            verdict = f"infeasible at keep {solver.keep:g}: its multiplier is at the penalty of {solver.penalty:g}"
        else:
            verdict = "not met" if not solver.penalty else "not met: take more steps"
        found.append(Gap(name, float(old), float(new), float(tolerance), verdict))
    return found


def _short_of(before: NDArray[np.float64], constraints: Constraints, solver: Solver) -> list[str]:
    """Why a prevalence cannot be met: even at the largest weight there are too few of one kind, pi eta > Q E[s]."""
    m, room = len(constraints.sensitive), constraints.representation
    reasons = [""] * (len(constraints.names) - m)
    for gap, wanted in zip(before[-m:], constraints.prevalence, strict=True):
        share = gap + wanted
        of_them = share / (wanted - room) if wanted > room else np.inf
        of_others = (1 - share) / (1 - wanted - room) if wanted + room < 1 else np.inf
        most = min(of_them, of_others) * solver.largest
        reason = f"infeasible: {share:.3g} of the samples have it, {wanted:.3g} are wanted; keep at most {most:.3g}"
        reasons.append(reason if most < solver.keep else "")
    return reasons
