"""The gather has the gradients of one process, and does nothing on one rank."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from siglip2.core.distributed import gather, rank, world_size

ROWS, RANKS = 6, 2


def everything():
    """All rows of all ranks, and one weight per pair, float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return rows, torch.rand(ROWS, ROWS, generator=generator, dtype=torch.float64)


def pair_loss(own, others, weights):
    return (weights * (own @ others.T).tanh()).sum() / len(own)


def one_rank(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=number, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    rows, weights = everything()
    share = slice(number * ROWS // RANKS, (number + 1) * ROWS // RANKS)
    own = rows[share].clone().requires_grad_()
    gathered = gather(own)
    pair_loss(own, gathered, weights[share]).backward()
    found = {"rank": rank(), "world_size": world_size(), "gathered": gathered.detach(), "grad": own.grad}
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{number}.pt") for number in range(RANKS)]


def test_gather_on_one_rank_is_the_very_tensor():
    rows = torch.randn(3, 2)
    assert gather(rows) is rows
    assert (rank(), world_size()) == (0, 1)


def test_every_rank_gathers_all_rows_in_rank_order(ranks):
    rows, _ = everything()
    assert all(torch.equal(found["gathered"], rows) for found in ranks)


def test_ranks_know_their_number(ranks):
    assert [(found["rank"], found["world_size"]) for found in ranks] == [(0, 2), (1, 2)]


def test_gradient_of_the_mean_over_ranks_is_that_of_one_process(ranks):
    rows, weights = everything()
    whole = rows.clone().requires_grad_()
    pair_loss(whole, whole, weights).backward()
    # each rank divides by its own rows; the mean over ranks that DDP takes is a factor of 1 / RANKS
    joined = torch.cat([found["grad"] for found in ranks]) / RANKS
    torch.testing.assert_close(joined, whole.grad, rtol=1e-12, atol=1e-14)
