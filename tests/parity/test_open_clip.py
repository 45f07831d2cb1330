"""Our loss is open_clip's `SigLipLoss`, on one process and, against its default exchange, on several."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import SigLipLoss

from siglip2.core.batch import Batch, Patches
from siglip2.core.functional import sigmoid_loss
from siglip2.core.step import Step
from siglip2.plugins.sigmoid import Sigmoid

pytestmark = pytest.mark.parity


def embeddings(size=12, width=16):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=-1) for _ in range(2)]
    return [leaf.requires_grad_() for leaf in (*rows, torch.tensor([2.0]), torch.tensor([-4.0]))]


def test_loss_and_gradients_are_those_of_open_clip():
    leaves = embeddings()
    image, text, scale, bias = leaves
    ours = sigmoid_loss(image, text, scale=scale, bias=bias)
    theirs = SigLipLoss()(image, text, scale.exp(), bias)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def our_loss(model, batch):
    return Sigmoid().loss(Step(model, batch, progress=0.0))


def their_loss(model, batch):
    image, text = model.encode_image(batch.views["image"]), model.encode_text(batch.views["caption"])
    loss = SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())  # dist_impl: their default, bidir
    return loss(image.embedding, text.embedding, model.logit_scale.exp(), model.logit_bias)


def loss_and_gradients(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients]


def one_rank(rank, world_size, folder, model, batch):
    """Runs both losses on this rank's rows; rank 0 writes the means over ranks, as DDP would take them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    share = batch.size // world_size
    rows = batch.select(torch.arange(rank * share, (rank + 1) * share))
    means = {}
    for name, loss in (("ours", our_loss), ("theirs", their_loss)):
        means[name] = loss_and_gradients(model, loss(model, rows))
        for value in means[name]:
            dist.all_reduce(value)
            value /= world_size
    if rank == 0:
        torch.save(means, f"{folder}/means.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3])  # 2 is open_clip's odd exchange, 3 its bidirectional one
def test_gathered_loss_on_several_ranks_is_that_of_open_clip_and_of_one_process(
    world_size, make_towers, images, ids, tmp_path
):
    model = make_towers()
    batch = Batch({"image": Patches(images.patches, images.coords, None, images.grid), "caption": ids}, size=6, index=0)
    alone = loss_and_gradients(model, our_loss(model, batch))
    mp.spawn(one_rank, (world_size, str(tmp_path), model, batch), nprocs=world_size)
    means = torch.load(tmp_path / "means.pt")
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, one, ours, theirs in zip(names, alone, means["ours"], means["theirs"], strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(theirs, one, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
