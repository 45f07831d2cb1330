"""What the host processes of a slice tell one another outside of the step: paths, scores, "I am done"."""

import pickle
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(hours=1)  # one host may compile, or write a checkpoint, for long


class Hosts:
    """The processes of a run, one on each host, that meet in a key-value store.

    Inside the step they are one: GSPMD's program spans all their devices, and collectives are XLA's.

    Args:
        store: shared by all of them; None for a process on its own.
        rank: this one among `size`.
        size: how many there are.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, size: int = 1):
        if size > 1 and store is None:
            raise ValueError(f"{size} hosts need a store to meet in")
        self.rank, self.size = rank, size
        self.store, self._round = store, 0
        if store is not None:
            store.set_timeout(PATIENCE)

    def exchange(self, value: Any) -> list[Any]:
        """Returns what every host gave, in the order of their ranks; all of them have to call it.

        Args:
            value: anything that can be pickled.
        """
        if self.store is None:
            return [value]
        self.store.set(self._key(self._round, self.rank), b64encode(pickle.dumps(value)).decode())
        given = [self.store.get(self._key(self._round, other)) for other in range(self.size)]
        if self._round:
            # whoever answered this round has read the one before
            self.store.delete_key(self._key(self._round - 1, self.rank))
        self._round += 1
        return [pickle.loads(b64decode(text)) for text in given]

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"siglip2/{number}/{rank}"

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Offers torch.distributed's default group among the hosts, as torch's sharded checkpoints need it.

        Only for so long: metrics would take it for ranks that each hold a part, and sum what is whole already.
        """
        if self.store is None:
            yield
            return
        store = dist.PrefixStore(f"group/{self._round}", self.store)
        self.exchange(None)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()


def meet() -> Hosts:
    """Returns the hosts of this slice; found by torch_xla, or by MASTER_ADDR and MASTER_PORT."""
    import torch_xla.runtime as xr

    size = xr.process_count()
    if size == 1:
        return Hosts()
    import torch_xla.distributed.xla_backend  # noqa: F401 - it teaches torch.distributed the address xla://

    store, rank, size = next(dist.rendezvous("xla://"))
    return Hosts(store, rank, size)
