"""Fractal statistics of how surprising the tokens of captions are, pooled over groups of captions.

Source: Alabdulmohsin et al., https://arxiv.org/abs/2402.01825, section 2: bits of every token under a language model,
standardised per document (increments), and their running sum (the integral process). Machine-written text was found to
lie elsewhere than natural text (https://arxiv.org/abs/2502.14924), which is a hint about a *source*: one caption alone
gives a Hurst exponent with a standard deviation above 0.1, so only groups are measured.

All three exponents are biased for sequences as short as captions (white noise of 64 tokens has H about 0.6 here), and
the bias depends on the length. Groups are therefore compared only after both were cut down to the same number of
captions of each length, and only under one scorer.
"""

# B bootstrap draws, C captions, L tokens of a caption, K sums that are kept of a caption, P statistics

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXPONENTS = ("hurst", "joseph", "self_similarity")
NAMES = (*EXPONENTS, "mean_bits")
MIN_CAPTIONS = 200  # fewer are not judged; pooled over 500, H has a standard deviation of 0.006
MAX_CAPTIONS = 20_000  # of a group
DRAWS = 400
LEVEL = 0.95
MARGIN = 0.02  # ours: natural sources differ by more than chance; intervals alone would flag every large group


@dataclass(frozen=True)
class Ruler:
    """At which lengths the bits of a text are looked at.

    Args:
        scales: windows of the rescaled range, in tokens.
        lags: steps of the integral process, in tokens.
        eps: what counts as no step, in standard deviations of the bits.
        lengths: texts are cut to these, so that lengths can be made equal; shorter ones are left out.
    """

    scales: tuple[int, ...]
    lags: tuple[int, ...]
    eps: float
    lengths: tuple[int, ...]

    def cut(self, num_tokens: int) -> int:
        """Returns the largest length that a text fills, 0 if it is too short for the smallest."""
        return max((length for length in self.lengths if length <= num_tokens), default=0)


# Ours: captions have no room for the paper's windows of 25 to 300 tokens, and too few tokens for its eps of 0.005.
CAPTIONS = Ruler((8, 12, 16, 24, 32), (1, 2, 4, 8), 0.05, (16, 20, 24, 28, 32, 40, 48, 56, 64))


@dataclass(frozen=True)
class Estimate:
    """A pooled statistic and its bootstrap interval over captions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupStatistics:
    """One group of captions as it is, for reading; numbers of groups with other lengths do not compare.

    Args:
        name: of the group.
        captions: distinct captions in it.
        scored: of these, how many were long enough and were scored.
        mean_tokens: mean number of scored tokens, NaN if there are none.
        estimates: by name of `NAMES`; empty if there were too few captions.
        reason: why it was not judged; "" if it was.
    """

    name: str
    captions: int
    scored: int
    mean_tokens: float
    estimates: Mapping[str, Estimate]
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A group beside a reference, both with the same number of captions of each length.

    Args:
        group: what is compared.
        reference: with what.
        captions: captions on either side.
        lengths: tokens -> captions of that length on either side.
        group_estimates: by name of `NAMES`; empty if too few captions of equal length were found.
        reference_estimates: likewise.
        outside: the statistics whose interval lies wholly outside of the reference's, widened by `MARGIN`.
        reason: why it was not compared; "" if it was.
    """

    group: str
    reference: str
    captions: int
    lengths: Mapping[int, int]
    group_estimates: Mapping[str, Estimate]
    reference_estimates: Mapping[str, Estimate]
    outside: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Measured:
    """Captions of one group as sums that can be pooled.

    Args:
        sums_CK: see `caption_sums`.
        lengths_C: tokens that each caption was cut to.
        ruler: at which lengths they were looked at.
    """

    sums_CK: Floats
    lengths_C: npt.NDArray[np.int64]
    ruler: Ruler

    def rows(self, chosen: npt.NDArray[np.int64]) -> "Measured":
        """Returns some of the captions."""
        return Measured(self.sums_CK[chosen], self.lengths_C[chosen], self.ruler)


def measure(bits: Sequence[Floats], ruler: Ruler = CAPTIONS) -> Measured:
    """Cuts captions to a common set of lengths and sums each up; those too short or without any variation are left out.

    Args:
        bits: -log2 p of every token, one array a caption.
        ruler: at which lengths they are looked at.
    """
    by_length: dict[int, list[Floats]] = {}
    for caption in bits:
        if length := ruler.cut(len(caption)):
            by_length.setdefault(length, []).append(caption[:length])
    parts, counts = [np.zeros((0, 2 * len(ruler.scales) + 4 * len(ruler.lags) + 2))], []
    for length, captions in sorted(by_length.items()):
        bits_CL = np.stack(captions).astype(np.float64)
        varied = np.ptp(bits_CL, axis=1) > 0
        parts.append(caption_sums(bits_CL[varied], ruler))
        counts.append(np.full(int(varied.sum()), length))
    return Measured(np.concatenate(parts), np.concatenate([np.zeros(0, np.int64), *counts]), ruler)


def caption_sums(bits_CL: Floats, ruler: Ruler) -> Floats:
    """Returns what is pooled of every caption, [C, K]: sums and counts, so that a group's are theirs added up.

    For each scale the sum of the rescaled ranges of the windows side by side, and their number; for each lag the sum
    of the steps of the integral process, of their squares, the steps within eps, and their number; last the bits and
    the tokens.

    Args:
        bits_CL: captions of one length, none of them constant.
        ruler: at which lengths they are looked at.
    """
    x_CL = (bits_CL - bits_CL.mean(1, keepdims=True)) / bits_CL.std(1, keepdims=True)
    integral_CL = x_CL.cumsum(1)
    columns = []
    for scale in ruler.scales:
        ranges, windows = _rescaled_ranges(x_CL, scale)
        columns += [ranges, windows]
    for lag in ruler.lags:
        steps = integral_CL[:, lag:] - integral_CL[:, :-lag]
        near = np.abs(steps) <= ruler.eps
        columns += [steps.sum(1), (steps**2).sum(1), near.sum(1), np.full(len(steps), steps.shape[1])]
    columns += [bits_CL.sum(1), np.full(len(bits_CL), bits_CL.shape[1])]
    return np.stack(columns, axis=1).astype(np.float64)


def _rescaled_ranges(x_CL: Floats, scale: int) -> tuple[Floats, Floats]:
    """Sum over windows of (largest minus smallest partial sum) / standard deviation, and the windows that have one."""
    num_windows = x_CL.shape[1] // scale
    windows = x_CL[:, : num_windows * scale].reshape(len(x_CL), num_windows, scale)
    centred = windows - windows.mean(2, keepdims=True)
    spread = centred.std(2)
    usable = spread > 1e-9
    sums = centred.cumsum(2)
    ranges = (
        np.where(usable, np.ptp(sums, axis=2) / np.where(usable, spread, 1), 0)
        if num_windows
        else np.zeros((len(x_CL), 0))
    )
    return ranges.sum(1), usable.sum(1).astype(np.float64)


def pooled(sums_BK: Floats, ruler: Ruler) -> Floats:
    """Returns the statistics [B, P] in the order of `NAMES` from added-up sums; NaN where there is too little.

    H: slope of log (mean rescaled range) over log scale. J: slope of log std(X[t+lag] - X[t]) over log lag. S: minus
    the slope of log P(|X[t+lag] - X[t]| <= eps) over log lag.
    """
    scales = sums_BK[:, : 2 * len(ruler.scales)].reshape(-1, len(ruler.scales), 2)
    lags = sums_BK[:, 2 * len(ruler.scales) : -2].reshape(-1, len(ruler.lags), 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        ranges = scales[..., 0] / scales[..., 1]
        total, squares, near, count = (lags[..., i] for i in range(4))
        deviation = np.sqrt(squares / count - (total / count) ** 2)
        hurst = _slope(ruler.scales, ranges)
        joseph = _slope(ruler.lags, deviation)
        similarity = -_slope(ruler.lags, near / count)
        bits = sums_BK[:, -2] / sums_BK[:, -1]
    return np.stack([hurst, joseph, similarity, bits], axis=1)


def _slope(at: Sequence[int], values_BN: Floats) -> Floats:
    """Least squares in log-log over the points that every row has; NaN with fewer than three."""
    y = np.log(values_BN)
    there = ~np.isnan(values_BN).any(0)
    if there.sum() < 3:
        return np.full(len(values_BN), np.nan)
    x = np.log(np.asarray(at, dtype=np.float64)[there])
    x = x - x.mean()
    slope: Floats = y[:, there] @ x / (x @ x)
    return np.where(np.isfinite(slope), slope, np.nan)


def estimates(measured: Measured, *, seed: int, draws: int = DRAWS) -> dict[str, Estimate]:
    """Returns every statistic with its percentile bootstrap interval, captions drawn with replacement."""
    sums_CK = measured.sums_CK
    num = len(sums_CK)
    rng = np.random.default_rng(seed)
    drawn_BK = np.stack([np.bincount(rng.integers(num, size=num), minlength=num) @ sums_CK for _ in range(draws)])
    values_P = pooled(sums_CK.sum(0, keepdims=True), measured.ruler)[0]
    drawn_BP = pooled(drawn_BK, measured.ruler)
    tail = (1 - LEVEL) / 2
    low_P, high_P = np.quantile(drawn_BP, [tail, 1 - tail], axis=0)
    found = zip(NAMES, values_P, low_P, high_P, strict=True)
    return {name: Estimate(float(value), float(low), float(high)) for name, value, low, high in found}


def group_statistics(name: str, captions: int, measured: Measured, *, seed: int = 0) -> GroupStatistics:
    """Returns a group as it is, or the reason why it is not judged."""
    num = len(measured.lengths_C)
    tokens = float(measured.lengths_C.mean()) if num else float("nan")
    if num < MIN_CAPTIONS:
        shortest = measured.ruler.lengths[0]
        reason = f"{num} distinct captions of {shortest} tokens or more were scored, {MIN_CAPTIONS} are needed"
        return GroupStatistics(name, captions, num, tokens, {}, reason)
    return GroupStatistics(name, captions, num, tokens, estimates(measured, seed=seed), "")


def compare(group: str, reference: str, these: Measured, those: Measured, *, seed: int = 0) -> Comparison:
    """Returns two groups beside each other, as many captions of each length on either side.

    Args:
        group: name of the group that is asked about.
        reference: name of the group known to be written by people.
        these: the captions of the group.
        those: the captions of the reference, under the same scorer.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    here, there, lengths = match_lengths(these.lengths_C, those.lengths_C, rng)
    if len(here) < MIN_CAPTIONS:
        reason = f"{len(here)} captions of equal length on either side, {MIN_CAPTIONS} are needed"
        return Comparison(group, reference, len(here), lengths, {}, {}, (), reason)
    mine = estimates(these.rows(here), seed=seed)
    theirs = estimates(those.rows(there), seed=seed + 1)
    outside = tuple(name for name in NAMES if _is_outside(mine[name], theirs[name]))
    return Comparison(group, reference, len(here), lengths, mine, theirs, outside, "")


def match_lengths(
    lengths_A: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], dict[int, int]]:
    """Returns rows of either side, as many of each length, and how many; of the fuller side they are drawn."""
    here, there, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], {}
    for length in sorted(set(lengths_A.tolist()) & set(lengths_B.tolist())):
        a, b = np.flatnonzero(lengths_A == length), np.flatnonzero(lengths_B == length)
        counts[length] = num = min(len(a), len(b))
        here.append(np.sort(rng.choice(a, num, replace=False)))
        there.append(np.sort(rng.choice(b, num, replace=False)))
    return np.concatenate(here), np.concatenate(there), counts


def _is_outside(group: Estimate, reference: Estimate) -> bool:
    """Whether the intervals keep apart by more than the margin; never for NaN."""
    return group.low > reference.high + MARGIN or group.high < reference.low - MARGIN
