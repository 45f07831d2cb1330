"""Balancing a set with planted bias: what `siglip2 balance` leaves of it, counted in what training would sample.

Writes shards of JSON in which two sensitive attributes are too common and go with some of five labels, balances them by
the command, and counts one epoch of the training stream that samples by the weights: an independent look at what the
command says of itself. One attribute is planted so that one of its associations cannot be taken out at this rate.

One process, one run: python benchmarks/balance.py
"""

import argparse
import io
import json
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from siglip2.cli.main import main as siglip2
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.core.data.weights import open_weights

LABELS = ("chef", "nurse", "pilot", "singer", "judge")
BASE = {"man": 0.28, "woman": 0.22}
TARGET = 0.24
COMMON = (0.05, 0.1, 0.15, 0.2, 0.08)
LIFT = {"man": (0.10, -0.10, 0.15, 0.0, 0.20), "woman": (-0.08, 0.20, -0.05, 0.03, -0.10)}
KEEP = 0.9  # mean weight


def plant(folder: Path, count: int, shards: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes the set and returns its attributes [N, 2] and labels [N, 5]."""
    random = np.random.default_rng(seed)
    y = random.random((count, len(LABELS))) < COMMON
    chances = [BASE[name] + y @ np.array(LIFT[name]) for name in BASE]
    s = random.random((count, len(BASE))) < np.stack(chances, axis=1).clip(0.01, 0.99)
    for shard, rows in enumerate(np.array_split(np.arange(count), shards)):
        with open(folder / f"{shard:05d}.tar", "wb") as file, TarWriter(file) as tar:
            for i in rows.tolist():
                words = [label for label, has in zip(LABELS, y[i], strict=True) if has]
                meta = {**{name: int(has) for name, has in zip(BASE, s[i], strict=True)}, "labels": words}
                tar.write({"__key__": f"{i:08d}", "json": meta})
    return s, y


def worst(s: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> tuple[float, np.ndarray]:
    """Worst prevalence gap, and the gap of each association [2, 5], among the samples drawn."""
    centred = s[drawn] - TARGET
    return float(abs(centred.mean(axis=0)).max()), centred.T @ y[drawn] / len(drawn)


def run(count: int, shards: int, seed: int) -> None:
    """Plants, balances, samples, and prints."""
    with tempfile.TemporaryDirectory() as name:
        s, y = plant(Path(name), count, shards, seed)
        options = ["--sensitive", *(f"json.{a}={TARGET}" for a in BASE)]
        options += ["--label", *(f"json.labels={label}" for label in LABELS), "--name", "fair", "--keep", str(KEEP)]
        siglip2(["index", name])
        begin, printed = time.perf_counter(), io.StringIO()
        with redirect_stdout(printed):
            siglip2(["balance", name, *options, "--json"])
        seconds = time.perf_counter() - begin
        found = json.loads(printed.getvalue())["constraints"]
        said = {c["name"].replace("json.labels=", "").replace("json.", ""): c for c in found}
        source = open_source(name)
        order = Order(source.shard_sizes(), 0, weights=open_weights(source, "fair"))
        epochs = 10
        drawn = order.many(0, epochs * count)[1]
        (first_before, before), (first, after) = worst(s, y, np.arange(count)), worst(s, y, drawn)
    times = np.bincount(drawn[:count], minlength=count)
    print(f"{count} samples in {shards} shards, read and balanced in {seconds:.0f} s")
    print(f"worst prevalence gap: {first_before:.4f} before, {first:.4f} in {epochs} sampled epochs")
    met = np.array([[said[f"{a} x {label}"]["met"] for label in LABELS] for a in BASE])
    left = f"{abs(after[met]).max():.4f} where met ({met.sum()} of {met.size})"
    print(f"worst association: {abs(before).max():.4f} before, {left}")
    print(f"one epoch: {np.mean(times == 0):.3f} of the samples left out, {np.mean(times > 1):.3f} more than once")
    for name, constraint in said.items():
        if " x " in name:
            a, _, label = name.partition(" x ")
            sampled = after[list(BASE).index(a), LABELS.index(label)]
        else:
            sampled = (s[drawn] - TARGET).mean(axis=0)[list(BASE).index(name)]
        print(f"  {name:16} {constraint['before']:+.4f} -> {sampled:+.4f}  {constraint['verdict']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run(args.count, args.shards, args.seed)
