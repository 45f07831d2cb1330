"""Takes one step on the CPU and on four XLA devices, with each loss alone and with all; prints how far they are apart.

Run by test_spmd_gradients.py in a process of its own. Both start from the same weights, so nothing but the order of
sums differs.
"""

import json

from recipes import CPU, XLA, fit, start_xla

SSL = ("ema_teacher", "silc", "tips")
RECIPES = {
    "all": [],
    "sigmoid": ["locca", *SSL],
    "locca": ["sigmoid", *SSL],
    "silc": ["sigmoid", "locca", "tips"],
}


def apart(cpu, xla):
    """Of every gradient the largest difference: absolute, and as a share of the largest of its tower or plugin."""
    (some,), (others,) = cpu.gradients, xla.gradients
    assert some.keys() == others.keys(), some.keys() ^ others.keys()
    parts = {name: ".".join(name.split(".")[:2]) for name in some}
    size = {part: max(some[n].abs().max().item() for n in some if parts[n] == part) for part in parts.values()}
    differences = {name: (grad - others[name]).abs().max().item() for name, grad in some.items()}
    return {name: (d, d / max(size[parts[name]], 1e-12)) for name, d in differences.items()}


def options(without):
    """One step without some plugins, the others awake from its beginning."""
    off = [word for name in without for word in (f"--plugins.{name}", "off")]
    awake = [word for name in SSL if name not in without for word in (f"--plugins.{name}.start", "0")]
    return [*off, *awake, "--trainer.max_steps", "1", "--trainer.gradient_clip_val", "null"]


def main():
    start_xla()
    found = {}
    for name, without in RECIPES.items():
        cpu = fit(f"{name}-cpu", *CPU, *options(without), gradients=True)
        xla = fit(f"{name}-xla", *XLA, "xla_spmd", *options(without), gradients=True)
        found[name] = {"losses": [cpu.losses[0], xla.losses[0]], "gradients": apart(cpu, xla)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
