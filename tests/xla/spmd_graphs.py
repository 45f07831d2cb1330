"""Counts what XLA compiles while a recipe with two phases and two sequence lengths trains; prints it as JSON.

Run by test_spmd_graphs.py in a process of its own: XLA has to be up before the first backward, and its counters are
those of the whole process.
"""

import json
from types import SimpleNamespace

from recipes import XLA, fit, start_xla

import siglip2.registry
from siglip2.plugins.sigmoid import Sigmoid

STEPS = 16
LINE = "{{at: [0.0, 1.0], values: [{}, {}]}}".format
SCHEDULES = [
    *("--plugins.sigmoid.weight", LINE(0.5, 0.9)),
    *("--plugins.ema_teacher.momentum", LINE(0.9, 0.99)),
    *("--plugins.silc.teacher_temperature", LINE(0.07, 0.04)),
    *("--plugins.tips.weight", LINE(0.1, 0.2)),
]
NAFLEX = ["--plugins.fixed", "off", "--plugins.naflex.seq_lens", "[6, 12]", "--plugins.naflex.batch_size", "8"]
ONLY_PAIRS = [part for name in ("locca", "ema_teacher", "silc", "tips") for part in (f"--plugins.{name}", "off")]


class Peeking(Sigmoid):
    """Somebody's objective that reads a value in the middle of the step."""

    name = "peeking"

    def loss(self, step):
        loss = super().loss(step)
        return loss * 2 if loss.item() < 0 else loss


def watched(watch):
    steps = {"compiled_in_step": watch.compiled_in_step, "fallbacks_in_step": watch.fallbacks_in_step}
    return {"lengths": watch.lengths, "compiled": watch.compiled, **steps}


def main():
    start_xla()
    module = SimpleNamespace(register_plugins=siglip2.hookimpl(lambda: [Peeking]))
    siglip2.registry.entry_points = lambda group: [
        SimpleNamespace(name="peeking", dist=None, value="here", load=lambda: module)
    ]
    clean = fit("graphs", *XLA, "xla_spmd", *NAFLEX, *SCHEDULES, "--trainer.max_steps", str(STEPS))
    peeking = fit("peeking", *XLA, "xla_spmd", *ONLY_PAIRS, "--plugins.peeking", "on", "--trainer.max_steps", "3")
    print(json.dumps({"clean": watched(clean), "peeking": watched(peeking)}))


if __name__ == "__main__":
    main()
