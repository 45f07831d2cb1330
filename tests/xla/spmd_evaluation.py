"""Evaluates after two steps on the CPU and on four XLA devices, writes captions there, and trains in other layouts and
in bfloat16; prints as JSON what came out.

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
from siglip2.plugins.locca import LocCa
from siglip2.plugins.locca.decoding import FREE, greedy
from siglip2.testing import fake_batch, tiny_module
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
NAFLEX = ["--plugins.fixed", "off", "--plugins.naflex.seq_lens", "[6]", "--plugins.naflex.batch_size", "8"]
NAVIT = ["--plugins.fixed", "off", "--plugins.navit.batch_size", "8"]
BF16 = ["--trainer.precision", "bf16-mixed"]


def uploaded(num_hosts):
    """Whether each view of a batch with several copies arrives in its order, and lies in parts."""
    batch = fake_batch((IMAGE, CAPTION, LOCAL), 8)
    there = upload(batch, all_devices(), torch_xla.device(), num_hosts=num_hosts)
    pairs = [(tensor_of(there.views[name]), tensor_of(view)) for name, view in batch.views.items()]
    return [bool(torch.equal(a.cpu(), b) and cut(a)) for a, b in pairs]


def tensor_of(view):
    return view.patches if isinstance(view, Patches) else view


def written():
    """The ids that a decoder writes for eight images, on the CPU and where the images lie on four devices."""
    module, batch = tiny_module([LocCa(length=5, depth=1)]).eval(), fake_batch((IMAGE,), 8)
    decoder = module.plugins["locca"].decoder
    torch.nn.init.normal_(decoder.out.weight, generator=torch.Generator().manual_seed(0))  # else one id wins always
    found = []
    for device, images in (("cpu", batch), (torch_xla.device(), upload(batch, all_devices(), torch_xla.device()))):
        module.to(device)
        with torch.no_grad():
            tokens = module.model.encode_image(images.views["image"]).tokens
            chosen = torch.full((8, 5), FREE, device=device)
            found.append(greedy(decoder, tokens, chosen, eos_id=0, pad_id=0).tolist())
    return found


def main():
    start_xla()
    result = {"uploaded": {count: uploaded(count) for count in (1, 2)}, "written": written()}
    for name, device in {"cpu": CPU, "xla": [*XLA, "xla_spmd"]}.items():
        result[name] = fit(name, *device, *SHORT, *EVALUATED).scores
        for layout, words in {"naflex": NAFLEX, "navit": NAVIT}.items():
            result[f"{name}_{layout}"] = fit(f"{name}_{layout}", *device, *SHORT, *words).losses
        result[f"{name}_bf16"] = fit(f"{name}_bf16", *device, *SHORT, *BF16).losses
    print(json.dumps(result))


if __name__ == "__main__":
    main()
