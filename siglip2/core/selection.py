"""Which rows of a super-batch are worth training on, scored and drawn without ever holding all of their pairs.

Sources: JEST, https://arxiv.org/abs/2406.17711 (learnability, joint sampling in chunks), and ACID,
https://arxiv.org/abs/2411.18674 (the same as distillation from the reference).

In the sigmoid loss of a model with logits A_ij, image i and text j cost ell_ij = softplus(-Z_ij A_ij), with Z_ij = 1
for i = j and -1 for all others. The score of a pair is S_ij = ell_ij(learner) - ell_ij(reference), or one of these
terms alone, and a set of rows is worth the sum of S_ij over its pairs. So to a set A the row k adds
s_k = S_kk + sum over j in A of (S_kj + S_jk). Rows are drawn in chunks, without replacement, with p ~ exp(s_k): those
with the largest s_k + Gumbel noise.

The super-batch is cut into groups of consecutive rows, and every chunk takes as many from each. A rank that holds whole
groups then needs the scores of its own rows only, and of the others nothing but the embeddings that were just drawn. So
compute and memory are divided by the ranks, and what is drawn does not depend on how many there are.
"""

# m rows of this rank in g groups of n, K chunks of q rows of each group and c of all ranks, b rows drawn, D width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.core.distributed import gather, world_size
from siglip2.core.pairs import BLOCK, CPU_BLOCK


@dataclass(frozen=True)
class Embedded:
    """What one model makes of the rows of this rank, whoever made it.

    Args:
        image_mD: unit-norm image embeddings, float.
        text_mD: unit-norm text embeddings; row i is the text of image i.
        scale: log of the temperature factor, shape [1].
        bias: logit bias, shape [1].
    """

    image_mD: Tensor
    text_mD: Tensor
    scale: Tensor
    bias: Tensor

    def in_float32(self) -> "Embedded":
        """Returns the same in float32, in which scores are computed."""
        return Embedded(*(t.detach().float() for t in (self.image_mD, self.text_mD, self.scale, self.bias)))


Terms = Sequence[tuple[float, Embedded]]
"""(factor, model) of each term of a score; the score of a pair is the sum of factor * ell_ij."""


@dataclass(frozen=True)
class Draw:
    """How rows are drawn.

    Args:
        groups: g, stretches of consecutive rows on this rank; they divide its rows.
        chunks: K.
        per_group: q, rows of each group in every chunk.
        uniform_first: whether the first chunk is drawn evenly; else by the pairs' own scores S_kk.
        gain: factor of all scores.
        normalise: whether s_k is divided by the number of its pairs, 2 |A| + 1.
    """

    groups: int
    chunks: int
    per_group: int
    uniform_first: bool = False
    gain: float = 1.0
    normalise: bool = False


@dataclass(frozen=True)
class Drawn:
    """The rows that were drawn.

    Args:
        rows_b: their numbers on this rank, int64, by group and within a group as they were drawn.
        entropy: of the draws, a scalar: mean over chunks and groups of the entropy of exp(s_k) over the rows that were
            left, as a share of the largest possible. 1 is an even draw, near 0 noise decides nothing.
    """

    rows_b: Tensor
    entropy: Tensor


def gumbel_noise(seed: int, index: int, *, chunks: int, rows: int) -> Tensor:
    """Returns Gumbel noise [chunks, rows], float32 on the CPU: a pure function of its arguments.

    Made from the raw bits of Philox, so that it is the same in every process and release.

    Args:
        seed: of the run, at least 0.
        index: number of the global batch.
        chunks: K, each with noise of its own.
        rows: of the global super-batch.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, index))).random_raw(chunks * rows)
    uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # in (0, 1), both ends excluded: the noise is finite
    return torch.from_numpy(-np.log(-np.log(uniform)).astype(np.float32)).reshape(chunks, rows)


def own_scores(terms: Terms) -> Tensor:
    """Returns S_kk of every row, float32 [m]: what the row's own pair is worth."""
    with torch.autocast(terms[0][1].image_mD.device.type, enabled=False):
        return torch.stack([factor * F.softplus(-_own_logits(z.in_float32())) for factor, z in terms]).sum(0)


def _own_logits(z: Embedded) -> Tensor:
    dots_m = torch.einsum("md,md->m", z.image_mD, z.text_mD)  # as products of matrices: no [m, D] beside them
    return dots_m * z.scale.exp() + z.bias


def draw_jointly(terms: Terms, noise_Km: Tensor, draw: Draw, *, block: int | None = None) -> Drawn:
    """Draws rows chunk by chunk, each by what it adds to those drawn before on all ranks (JEST, section 3).

    One group on one rank is the published algorithm. More of them draw as many rows from each, which is the same in
    expectation as far as the order of samples is random.

    Args:
        terms: of the score.
        noise_Km: Gumbel noise of this rank's rows in every chunk, float32.
        draw: how.
        block: rows whose pairs with a chunk are held at a time.
    """
    terms = [(factor, z.in_float32()) for factor, z in terms]
    with torch.autocast(noise_Km.device.type, enabled=False):
        return _draw_jointly(terms, noise_Km, draw, block)


def _draw_jointly(terms: Terms, noise_Km: Tensor, draw: Draw, block: int | None) -> Drawn:
    own_m = own_scores(terms)
    added_m, taken_gn = torch.zeros_like(own_m), torch.zeros_like(_grouped(own_m, draw), dtype=torch.bool)
    picked, entropies = [], []
    for chunk, noise_m in enumerate(noise_Km.unbind()):
        score_gn = _grouped(own_m + added_m, draw) * _factor(chunk, draw)
        score_gn = score_gn.masked_fill(taken_gn, -torch.inf)
        entropies.append(_entropy(score_gn, left=taken_gn.shape[1] - chunk * draw.per_group))
        picked.append((score_gn + _grouped(noise_m, draw)).topk(draw.per_group, dim=1).indices)  # [g, q]
        taken_gn = taken_gn.scatter(1, picked[-1], True)
        if chunk < draw.chunks - 1:
            added_m = added_m + _added(terms, _rows(picked[-1:], draw, len(own_m)), block)
    return Drawn(_rows(picked, draw, len(own_m)), torch.stack(entropies).mean())


def best_rows(score_m: Tensor, draw: Draw) -> Tensor:
    """Returns the numbers of the best rows, int64 [b], by group and within a group the best first; no noise.

    Args:
        score_m: of every row, float; noise in its place gives an even draw.
        draw: how many: `chunks * per_group` of every group.
    """
    best = _grouped(score_m, draw).topk(draw.chunks * draw.per_group, dim=1).indices
    return _rows([best], draw, len(score_m))


def _grouped(values_m: Tensor, draw: Draw) -> Tensor:
    return values_m.reshape(draw.groups, -1)  # [g, n]


def _factor(chunk: int, draw: Draw) -> float:
    """What multiplies the scores of a chunk."""
    if chunk == 0 and draw.uniform_first:
        return 0.0
    drawn = chunk * draw.per_group * draw.groups * world_size()
    return draw.gain / (2 * drawn + 1 if draw.normalise else 1)


def _rows(picked: Sequence[Tensor], draw: Draw, num_rows: int) -> Tensor:
    """Places within groups, [g, ...] of each chunk, as row numbers of this rank, group by group."""
    starts_g = torch.arange(draw.groups, device=picked[0].device) * (num_rows // draw.groups)
    return (torch.cat(list(picked), dim=1) + starts_g[:, None]).flatten()


def _entropy(score_gn: Tensor, *, left: int) -> Tensor:
    """Entropy of exp(score) over the rows of a group that are left, mean over groups, as a share of log(left)."""
    log_p = score_gn.log_softmax(dim=1)
    each = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(1)
    return each.mean() / float(np.log(max(left, 2)))


def _added(terms: Terms, rows: Tensor, block: int | None) -> Tensor:
    """What a chunk adds to the score of every row of this rank, [m]: the sum over its rows j of S_kj + S_jk.

    What it adds to its own rows is never read.

    Args:
        terms: of the score, in float32.
        rows: of this rank that are in the chunk.
        block: rows whose pairs with the chunk are held at a time.
    """
    total = torch.zeros_like(terms[0][1].image_mD[:, 0])
    for factor, z in terms:
        here = torch.cat([z.image_mD.index_select(0, rows), z.text_mD.index_select(0, rows)], dim=1)
        image_cD, text_cD = (gather(here) * z.scale.exp()).chunk(2, dim=1)  # one exchange for both
        for own in _blocks(len(total), block, total.device.type):
            for other in _blocks(len(image_cD), BLOCK, total.device.type):
                forth = torch.addmm(z.bias, z.image_mD[own], text_cD[other].T)
                total[own] += factor * F.softplus(forth).sum(1)
                back = torch.addmm(z.bias, z.text_mD[own], image_cD[other].T)
                total[own] += factor * F.softplus(back).sum(1)
    return total


def _blocks(count: int, block: int | None, device: str) -> Iterator[slice]:
    # a compiler that spreads one program over all chips cuts the rows itself: more blocks would only be more exchanges
    side = count if device == "xla" else block or (CPU_BLOCK if device == "cpu" else BLOCK)
    return (slice(first, first + side) for first in range(0, count, side))
