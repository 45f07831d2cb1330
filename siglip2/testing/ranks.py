"""Two processes with half the batch each against one process with the whole: the same gradients."""

import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from siglip2.core.plugin import Objective
from siglip2.testing.case import Case

WORLD_SIZE = 2
ROWS = 8  # of the global batch
TOLERANCE = 1e-5  # float32 sums in another order; of the largest gradient of the same tower or plugin


def check_over_ranks(cases: Sequence[Case]) -> None:
    """Raises AssertionError if a plugin behaves differently on two processes; starts them once for all cases."""
    for name, lines in differences_over_ranks(cases).items():
        if lines:
            raise AssertionError(advice(name, lines))


def advice(name: str, lines: Sequence[str]) -> str:
    """Returns the message for a plugin whose gradients depend on the number of processes."""
    return (
        f"the mean over {WORLD_SIZE} ranks of what '{name}' computes is not what one process does on the joined batch: "
        + "; ".join(lines[:3])
        + ". Losses over pairs need siglip2.gather and a mean over the local rows; statistics of a batch need an "
        "all_reduce. If chance drawn on the device makes it differ, set `same_over_ranks = False` and say why"
    )


def differences_over_ranks(cases: Sequence[Case]) -> dict[str, list[str]]:
    """Returns, by plugin name, in what two processes differ from one.

    Args:
        cases: of those, objectives and curators are compared, unless they say `same_over_ranks = False`.
    """
    cases = [case for case in cases if compares(case)]
    if not cases:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, cases), nprocs=WORLD_SIZE)
        ranks = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]
    return {case.name: _differences(case, [r[case.name] for r in ranks]) for case in cases}


def compares(case: Case) -> bool:
    """Says whether the plugin promises anything about several processes."""
    return hasattr(case.cls, "curate") or (issubclass(case.cls, Objective) and case.cls.same_over_ranks)


def results(case: Case, *, first: int, rows: int) -> dict[str, Any]:
    """Returns gradients and buffers of a step on the rows from `first`, or how many of them a curator keeps."""
    module = case.module()
    start = case.start
    if hasattr(case.cls, "curate"):
        step = module.make_step(module.fake_batch(start, batch_size=rows, first=first), start)
        kept = module.awake_hook("curate", start)(step=step)
        return {"kept": rows if kept is None else len(kept)}
    torch.stack(list(case.losses(module, first=first, rows=rows).values())).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {**found, **{f"buffer {name}": b for name, b in module.named_buffers() if b.is_floating_point()}}


def _rank(rank: int, folder: str, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    share = ROWS // WORLD_SIZE
    for case in cases:
        try:
            found[case.name] = results(case, first=rank * share, rows=share)
        except Exception:
            found[case.name] = traceback.format_exc()
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _differences(case: Case, ranks: Sequence[Any]) -> list[str]:
    if failed := [f"a rank failed: {r}" for r in ranks if isinstance(r, str)]:
        return failed
    if "kept" in ranks[0]:
        counts = [r["kept"] for r in ranks]
        return [] if len(set(counts)) == 1 else [f"ranks keep {counts} rows"]
    whole = results(case, first=0, rows=ROWS)
    absent = [f"{name} has a gradient only on some" for name in whole if any(name not in r for r in ranks)]
    means = {name: torch.stack([r[name] for r in ranks]).mean(0) for name in whole if name not in absent}
    return absent or [line for name in whole if (line := _difference(name, means[name], whole))]


def _difference(name: str, mean: Tensor, whole: dict[str, Tensor]) -> str:
    family = ".".join(name.split(".")[:2])  # model.vision, model.text, plugins.<name>
    scale = max(float(t.abs().max()) for other, t in whole.items() if other.startswith(family) and t.numel())
    off = float((mean - whole[name]).abs().max()) if mean.numel() else 0.0
    return f"{name} is off by {off:.1e}, of at most {scale:.1e}" if not off <= TOLERANCE * scale else ""
