"""Memory of the host stays flat over ten thousand steps of the loader and the loss."""

import gc
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from siglip2.core.data.loader import Maker, Noticeboard, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.pairs import pair_loss
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import FixedPatchifier
from siglip2.testing import TinySource, tiny_tokenizer

STEPS, WARM = 10_000, 2_000
BATCH, DIM = 2, 16
NOISE_MB = 8.0  # 1 kB kept of each step would be as much


def resident_mb(pid):
    """Memory of a process that is in RAM, shared pages included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_trainer_and_worker_is_flat_over_ten_thousand_steps():
    patchifier = FixedPatchifier(image_size=16, patch_size=16, batch_size=BATCH, filter="bilinear", antialias=True)
    source = TinySource()
    maker = Maker(source, patchifier, tiny_tokenizer(), seed=0, board=Noticeboard(1))
    batches = TrainBatches(maker, Order(source.shard_sizes(), 0), [(0.0, (IMAGE, CAPTION))], max_batches=STEPS)
    image, text = torch.nn.Linear(768, DIM), torch.nn.Embedding(320, DIM)
    scale, bias = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1))
    (worker,) = loader._workers
    used = {}
    for step, batch in enumerate(loader, start=1):
        z_image_BD = image(batch.views["image"].patches.float().mean(1) / 255)
        z_text_BD = text(batch.views["caption"]).mean(1)
        pair_loss(z_image_BD, z_text_BD, scale=scale, bias=bias).backward()
        image.zero_grad()
        text.zero_grad()
        if step in (WARM, STEPS - 100):  # the worker is gone soon after its last batch
            gc.collect()
            used[step] = resident_mb("self"), resident_mb(worker.pid)
    grown = [after - before for before, after in zip(used[WARM], used[STEPS - 100], strict=True)]
    assert max(grown) < NOISE_MB, f"trainer and worker have grown by {grown} MB"
