"""Evaluates after two steps on the CPU and on four XLA devices, and trains in bfloat16; prints scores as JSON.

Run by test_spmd_evaluation.py in a process of its own.
"""

import json
import sys

import torch
import torch_xla
from recipes import CPU, SHARDS, XLA, cut, fit, start_xla

from siglip2.core.batch import Patches
from siglip2.core.crops import LOCAL
from siglip2.core.views import CAPTION, IMAGE
from siglip2.testing import fake_batch
from siglip2.xla.sharding import all_devices, upload

ONLY_PAIRS = [part for name in ("locca", "ema_teacher", "silc", "tips") for part in (f"--plugins.{name}", "off")]
SETS = {
    "zero_shot": {"toys": {"path": SHARDS, "classes": sys.argv[4]}},
    "retrieval": {"pairs": {"path": SHARDS, "fields": {"caption": "json.caption"}}},
}
EVALUATED = [
    "--trainer.limit_val_batches",
    "1.0",
    "--data.eval_batch_size",
    "5",
]  # does not divide over four, nor 16 by it
EVALUATED += [part for kind, sets in SETS.items() for part in (f"--data.{kind}", json.dumps(sets))]
SHORT = [*ONLY_PAIRS, "--trainer.max_steps", "2"]
BF16 = ["--trainer.precision", "bf16-mixed"]


def uploaded(num_hosts):
    """Whether each view of a batch with several copies arrives in its order, and lies in parts."""
    batch = fake_batch((IMAGE, CAPTION, LOCAL), 8)
    there = upload(batch, all_devices(), torch_xla.device(), num_hosts=num_hosts)
    pairs = [(tensor_of(there.views[name]), tensor_of(view)) for name, view in batch.views.items()]
    return [bool(torch.equal(a.cpu(), b) and cut(a)) for a, b in pairs]


def tensor_of(view):
    return view.patches if isinstance(view, Patches) else view


def main():
    start_xla()
    result = {"uploaded": {count: uploaded(count) for count in (1, 2)}}
    for name, device in {"cpu": CPU, "xla": [*XLA, "xla_spmd"]}.items():
        result[name] = fit(name, *device, *SHORT, *EVALUATED).scores
        result[f"{name}_bf16"] = fit(f"{name}_bf16", *device, *SHORT, *BF16).losses
    print(json.dumps(result))


if __name__ == "__main__":
    main()
