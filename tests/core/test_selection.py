"""Rows are drawn as the equations say, computed once more in float64 with all pairs at once."""

import math
import threading
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from siglip2.core.selection import Draw, Embedded, best_rows, draw_jointly, gumbel_noise, own_scores
from siglip2.testing import no_host_sync

FACTORS = {"learnability": (1.0, -1.0), "easy reference": (0.0, -1.0), "hard learner": (1.0, 0.0)}
ROWS = 64


def embedded(rows=ROWS, *, width=12, scale=3.0, bias=-2.0, seed=0):
    """Random unit vectors in which a text resembles its image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, width, generator=generator)
    text = image + 1.5 * torch.randn(rows, width, generator=generator)
    return Embedded(
        F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor([scale]).log(), torch.tensor([bias])
    )


def terms(score="learnability", rows=ROWS):
    """A learner and a reference of other widths, temperatures and biases."""
    models = embedded(rows), embedded(rows, width=20, scale=5.0, bias=-3.0, seed=1)
    return [(factor, z) for factor, z in zip(FACTORS[score], models, strict=True) if factor]


def all_scores(found):
    """S [M, M] in float64, images by texts."""
    total = 0
    for factor, z in found:
        signs = 2 * torch.eye(len(z.image_mD), dtype=torch.float64) - 1
        logits = z.scale.double().exp() * z.image_mD.double() @ z.text_mD.double().T + z.bias.double()
        total = total - factor * F.logsigmoid(signs * logits)
    return total.numpy()


def drawn_one_by_one(scores, noise, draw):
    """The rows as the papers draw them, with a loop in place of every trick: the conditional score from all pairs."""
    size, chosen = len(scores) // draw.groups, [[] for _ in range(draw.groups)]
    for chunk in range(draw.chunks):
        before = [row for group in chosen for row in group]
        for group, mine in enumerate(chosen):
            left = [k for k in range(group * size, (group + 1) * size) if k not in before]
            worth = {k: scores[k, k] + sum(scores[k, j] + scores[j, k] for j in before) for k in left}
            if draw.uniform_first and chunk == 0:
                worth = dict.fromkeys(left, 0.0)
            gain = draw.gain / (2 * len(before) + 1 if draw.normalise else 1)
            mine += sorted(left, key=lambda k: -(gain * worth[k] + float(noise[chunk, k])))[: draw.per_group]
    return [row for group in chosen for row in group]


DRAWS = {
    "published": Draw(1, 4, 8),
    "in one chunk": Draw(1, 1, 32),
    "first chunk evenly": Draw(1, 4, 8, uniform_first=True),
    "in groups": Draw(4, 4, 2),
    "three quarters dropped": Draw(2, 4, 2),
    "gain": Draw(2, 4, 4, gain=0.25),
    "normalised": Draw(2, 4, 4, normalise=True),
    "nearly all": Draw(1, 3, 20),
}


@pytest.mark.parametrize("score", FACTORS)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_rows_are_those_of_a_loop_over_all_pairs_in_float64(score, draw):
    noise = gumbel_noise(3, 7, chunks=draw.chunks, rows=ROWS)
    found = draw_jointly(terms(score), noise, draw)
    assert found.rows_b.tolist() == drawn_one_by_one(all_scores(terms(score)), noise, draw)


@pytest.mark.parametrize("score", FACTORS)
def test_own_scores_are_the_diagonal_of_all_scores(score):
    wanted = torch.from_numpy(all_scores(terms(score)).diagonal().copy())
    torch.testing.assert_close(own_scores(terms(score)).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_rows_do_not_depend_on_the_size_of_blocks(block, monkeypatch):
    draw, noise = DRAWS["in groups"], gumbel_noise(0, 0, chunks=4, rows=ROWS)
    wanted = draw_jointly(terms(), noise, draw)
    monkeypatch.setattr("siglip2.core.selection.BLOCK", 3)  # chosen rows at a time
    found = draw_jointly(terms(), noise, draw, block=block)
    assert found.rows_b.tolist() == wanted.rows_b.tolist()


def test_first_chunk_is_drawn_without_replacement_in_proportion_to_the_exponential_of_its_scores():
    """Of five rows two, 5000 times, against the exact probability of every ordered pair."""
    found, draws = terms(rows=5), 5000
    p = np.exp(own_scores(found).double().numpy())
    wanted = {(i, j): p[i] / p.sum() * p[j] / (p.sum() - p[i]) for i, j in permutations(range(5), 2)}
    noises = gumbel_noise(0, 0, chunks=draws, rows=5)
    draw = Draw(1, 1, 2)
    count = Counter(tuple(draw_jointly(found, noise[None], draw).rows_b.tolist()) for noise in noises)
    for pair, probability in wanted.items():
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(count[pair] - draws * probability) < 4.5 * spread, pair


def test_noise_is_gumbel_and_a_pure_function_of_seed_and_batch():
    noise = gumbel_noise(1, 2, chunks=4, rows=50000)
    assert noise.dtype == torch.float32
    assert bool(noise.isfinite().all())
    values = noise.double().flatten()
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert torch.equal(noise, gumbel_noise(1, 2, chunks=4, rows=50000))
    assert not torch.equal(noise, gumbel_noise(1, 3, chunks=4, rows=50000))
    assert not torch.equal(noise, gumbel_noise(2, 2, chunks=4, rows=50000))
    # written down, so that nobody changes the draws of a run that is resumed with another release
    first = gumbel_noise(0, 0, chunks=1, rows=3)[0]
    torch.testing.assert_close(first, torch.tensor([-1.4501892, -0.3043166, 0.2854213]))


def test_best_rows_are_the_best_of_every_group_without_noise():
    score = torch.tensor([3.0, 1.0, 2.0, 0.0, -5.0, -2.0, -3.0, -4.0])
    assert best_rows(score, Draw(2, 1, 2)).tolist() == [0, 2, 5, 6]
    assert best_rows(score, Draw(1, 1, 4)).tolist() == [0, 2, 1, 3]


def test_entropy_is_one_for_equal_scores_and_near_zero_where_scores_decide():
    draw, noise = Draw(2, 4, 4), gumbel_noise(0, 0, chunks=4, rows=ROWS)
    assert draw_jointly(terms(), noise, replace(draw, gain=1e-6)).entropy.item() == pytest.approx(1, abs=1e-4)
    assert draw_jointly(terms(), noise, replace(draw, gain=1e4)).entropy.item() == pytest.approx(0, abs=0.02)


def test_entropy_is_that_of_the_conditional_scores():
    draw = Draw(1, 2, 16)
    noise, scores = gumbel_noise(0, 0, chunks=2, rows=ROWS), all_scores(terms())
    found = draw_jointly(terms(), noise, draw)
    before = found.rows_b[:16].tolist()
    left = [k for k in range(ROWS) if k not in before]
    second = np.array([scores[k, k] + sum(scores[k, j] + scores[j, k] for j in before) for k in left])
    shares = []
    for worth in (scores.diagonal(), second):
        p = np.exp(worth - worth.max()) / np.exp(worth - worth.max()).sum()
        shares.append(-(p * np.log(p)).sum() / math.log(len(p)))
    assert found.entropy.item() == pytest.approx(np.mean(shares), rel=1e-5)


def test_scores_are_float32_under_autocast():
    draw, noise = DRAWS["in groups"], gumbel_noise(0, 0, chunks=4, rows=ROWS)
    wanted, scores = draw_jointly(terms(), noise, draw), own_scores(terms())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = draw_jointly(terms(), noise, draw)
        assert torch.equal(own_scores(terms()), scores)
    assert found.rows_b.tolist() == wanted.rows_b.tolist()
    assert found.entropy.item() == wanted.entropy.item()


def test_nothing_is_read_back_to_the_host():
    draw, found = DRAWS["in groups"], terms()
    noise = gumbel_noise(0, 0, chunks=4, rows=ROWS)
    with no_host_sync():
        draw_jointly(found, noise, draw)
        best_rows(own_scores(found), draw)


# Several ranks


def part(found, rank, ranks):
    """The rows of one rank."""
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    return [(factor, Embedded(z.image_mD[rows], z.text_mD[rows], z.scale, z.bias)) for factor, z in found]


def share_of(rank, ranks, draw):
    """The rows that one of several ranks draws, as numbers of the whole super-batch."""
    first, mine = rank * ROWS // ranks, ROWS // ranks
    noise = gumbel_noise(5, 6, chunks=draw.chunks, rows=ROWS)[:, first : first + mine]
    return draw_jointly(part(terms(), rank, ranks), noise, replace(draw, groups=draw.groups // ranks)).rows_b + first


class Threads:
    """Ranks as threads that meet for every exchange."""

    def __init__(self, count):
        self.count, self.barrier, self.here = count, threading.Barrier(count, timeout=60), threading.local()
        self.given, self.found = [None] * count, [None] * count

    def gather(self, rows):
        self.given[self.here.rank] = rows
        self.barrier.wait()
        joined = torch.cat(self.given)
        self.barrier.wait()
        return joined

    def run(self, work):
        def one(rank):
            self.here.rank = rank
            self.found[rank] = work(rank, self.count)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return self.found


IN_GROUPS = Draw(8, 4, 1)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_several_ranks_draw_the_rows_of_one_in_its_order(ranks, normalise, monkeypatch):
    draw = replace(IN_GROUPS, normalise=normalise)
    wanted = draw_jointly(terms(), gumbel_noise(5, 6, chunks=4, rows=ROWS), draw).rows_b.tolist()
    threads = Threads(ranks)
    monkeypatch.setattr("siglip2.core.selection.gather", threads.gather)
    monkeypatch.setattr("siglip2.core.selection.world_size", lambda: ranks)
    shares = threads.run(lambda rank, count: share_of(rank, count, draw))
    assert torch.cat(shares).tolist() == wanted
    assert {len(share) for share in shares} == {len(wanted) // ranks}


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=4, timeout=timedelta(seconds=60))
    torch.save(share_of(rank, 4, IN_GROUPS), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_four_processes_draw_the_rows_of_one_in_its_order(tmp_path):
    mp.spawn(_on_rank, args=(str(tmp_path),), nprocs=4)
    joined = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]).tolist()
    noise = gumbel_noise(5, 6, chunks=4, rows=ROWS)
    assert joined == draw_jointly(terms(), noise, IN_GROUPS).rows_b.tolist()
    assert joined == drawn_one_by_one(all_scores(terms()), noise, IN_GROUPS)
