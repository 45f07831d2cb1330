"""Images per second are those of all ranks, each counted once."""

from types import SimpleNamespace

import pytest

import siglip2.core.callbacks.throughput
from siglip2.core.batch import Batch
from siglip2.core.callbacks.throughput import Throughput


@pytest.mark.parametrize("size", [4, 8])
def test_each_of_two_ranks_brings_its_rows(monkeypatch, size):
    """A batch has the size of this rank's rows, or on XLA devices of two hosts that of both hosts' rows."""
    seconds = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr(siglip2.core.callbacks.throughput.time, "monotonic", lambda: next(seconds))
    logged, trainer, batch = {}, SimpleNamespace(world_size=2), Batch({}, size, 0, keys=("a", "b", "c", "d"))
    module = SimpleNamespace(log=lambda name, value, **options: logged.update({name: value}))
    throughput = Throughput(every=1)
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_start(trainer, module, batch, 0)
    throughput.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {"images_per_s": 2 * 4 / 2.0, "waiting": 0.5 / 2.0}
