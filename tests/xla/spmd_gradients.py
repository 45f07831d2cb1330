"""Takes one step with each loss alone and with all, on the CPU or on all XLA devices; saves losses and gradients.

Run by test_spmd_gradients.py in processes of their own. All start from the same weights, so nothing but the order of
sums differs.
"""

import sys
from pathlib import Path

import torch
from parallel_ranks import install_curator
from recipes import CPU, XLA, fit, start_xla

EXACT = str(Path(__file__).with_name("exact.yaml"))
SSL = ("ema_teacher", "silc", "tips")


def off(*names):
    return [word for name in names for word in (f"--plugins.{name}", "off")]


RECIPES = {
    "all": [],
    "sigmoid": off("locca", *SSL),
    "locca": off("sigmoid", *SSL),
    "silc": off("sigmoid", "locca", "tips"),
    "tips": off("sigmoid", "locca", "silc"),
    "curated": [*off("locca", *SSL), "--plugins.brighter", "on"],
}
DEVICES = {"cpu": CPU, "xla": [*XLA, "xla_spmd"]}


def main():
    """A file for every kind of device that is named after the arguments of all scripts."""
    start_xla()
    install_curator()
    for kind, file in (word.split("=") for word in sys.argv[4:]):
        found = {}
        for name, words in RECIPES.items():
            run = fit(f"{name}-{kind}", "--config", EXACT, *DEVICES[kind], *words, gradients=True)
            found[name] = {"loss": run.losses[0], "gradients": run.gradients[0]}
        torch.save(found, file)
    print("{}")


if __name__ == "__main__":
    main()
