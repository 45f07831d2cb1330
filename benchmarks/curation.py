"""What ACID saves on noisy data: one table by one command.

Half of the captions of the training set belong to other pictures, and many pictures occur twice. A reference is trained
on a small clean set. Then both rows see the same super-batches and train on a quarter of each: `control` on a random
quarter, `acid` on the quarter that it selects, and that in 0.6 of the control's steps, with a schedule of its own.
Runs that are there already are kept, so that the command can be stopped and given again; to start anew, remove the
folder. Run: python benchmarks/curation.py --jobs 2
"""

import argparse
import csv
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ablation import cell, logged, paired, spread

from siglip2.cli.main import main as siglip2
from siglip2.core.checkpoint import read_checkpoint
from siglip2.emoji_world import write_emoji_world
from siglip2.recipes import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
NOISE = {"wrong_captions": 0.5, "duplicates": 0.3}
ROWS = CONTROL, ACID = ("control", "acid")
BAR = 0.6  # of the control's examples; the bar that this experiment was given
ACCURACY = "zero_shot/emoji/en/top1"
NOISE_RATE = "train/acid/kept_wrong"
QUARTERS = 4  # of a run, over which the noise rate is averaged

Curve = dict[int, float]


@dataclass(frozen=True)
class Run:
    """One row of the table with one seed.

    Args:
        row: one of `ROWS`.
        seed: of weights, data order and selection.
        steps: optimizer steps of the control.
        out: folder of the whole experiment.
    """

    row: str
    seed: int
    steps: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.row}-{self.seed}"

    @property
    def own_steps(self) -> int:
        return round(BAR * self.steps) if self.row == ACID else self.steps

    def trained(self) -> bool:
        """Says whether the checkpoint of its last step is there."""
        last = self.folder / "last.ckpt"
        return last.is_file() and read_checkpoint(str(last))["global_step"] == self.own_steps

    def training(self) -> list[str]:
        """Returns the command that trains it."""
        reference = ["--plugins.acid.reference", str(reference_of(self.out))]
        chosen = ["--plugins.acid.method", "random"] if self.row == CONTROL else reference
        own = ["--plugins.acid.seed", str(self.seed), "--trainer.max_steps", str(self.own_steps)]
        return [*fit(self.out, self.out / "noisy", self.folder, self.seed), *chosen, *own]

    def curve(self, name: str) -> Curve:
        """Returns what the run logged under a name, by step."""
        with (self.folder / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
            return {int(row["step"]) + 1: float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def fit(out: Path, world: Path, folder: Path, seed: int) -> list[str]:
    """Returns the command that trains on a world, into a folder."""
    noisy = out / "noisy"  # tokenizer and evaluation are the same for all
    return [
        *(sys.executable, "-m", "siglip2", "fit", "--config", str(RECIPE), "--report", "false"),
        *("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)),
        *("--data.train.path", str(world / "train"), "--data.tokenizer", str(noisy / "tokenizer.json")),
        *("--data.zero_shot.emoji.path", str(noisy / "val-single")),
        *("--data.zero_shot.emoji.classes", str(noisy / "classes.json")),
    ]


def reference_of(out: Path) -> Path:
    """Returns where the reference's checkpoint lies."""
    return out / "reference" / "last.ckpt"


def write_worlds(out: Path) -> None:
    """Writes the noisy training set, the clean one of the reference, and the tokenizer, unless they are there."""
    shape = {"num_emoji": 32, "unseen": 0, "size": 96, "languages": ("en",)}
    write_emoji_world(out / "noisy", scenes=20000, singles=20000, val=1024, **shape, **NOISE)
    write_emoji_world(out / "clean", scenes=8000, singles=8000, val=0, seed=1, **shape)
    tokenizer = out / "noisy" / "tokenizer.json"
    if not tokenizer.is_file():
        words = ["--caption", "json.captions", "--vocab-size", "1000", "--out", str(tokenizer)]
        siglip2(["tokenizer", "train", str(out / "clean" / "train"), *words])


def train_reference(out: Path, steps: int) -> None:
    """Trains the reference on the clean set with an ordinary batch, unless it is trained."""
    if not reference_of(out).is_file():
        shutil.rmtree(reference_of(out).parent, ignore_errors=True)
        reference_of(out).parent.mkdir(parents=True)
        plain = ["--plugins.acid", "off", "--plugins.fixed.batch_size", "64", "--trainer.max_steps", str(steps)]
        command = fit(out, out / "clean", reference_of(out).parent, seed=100)
        logged([*command, *plain], reference_of(out).parent / "fit.log")


def train(run: Run) -> None:
    """Trains a run unless it is trained; raises RuntimeError with the end of its log if that fails."""
    if not run.trained():
        began = time.monotonic()
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        logged(run.training(), run.folder / "fit.log")
        print(f"{run.row}, seed {run.seed}: {time.monotonic() - began:.0f} s", flush=True)


def reaches(curve: Curve, bar: float) -> int | None:
    """Returns the first step at which a curve is at `bar` or above; None if it never is."""
    return next((step for step, value in sorted(curve.items()) if value >= bar), None)


def quarters(curve: Curve) -> list[float]:
    """Returns the means over the quarters of a run."""
    last = max(curve)
    parts: list[list[float]] = [[] for _ in range(QUARTERS)]
    for step, value in curve.items():
        parts[min(QUARTERS * step // (last + 1), QUARTERS - 1)].append(value)
    return [statistics.fmean(part) for part in parts]


def markdown(final: Mapping[str, Mapping[int, float]], noise: Mapping[str, Sequence[float]]) -> str:
    """Returns the table.

    Args:
        final: accuracy after the last step, in [0, 1], by row and seed.
        noise: share of wrong captions among what is trained on, by row, in each quarter of the run.
    """
    head = [
        "",
        "examples trained on",
        "zero-shot top-1 at the end",
        "minus the control, paired",
        "wrong captions in each quarter of the run",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in final:
        against = cell(*paired(final[row], final[CONTROL]), sign="+") if row != CONTROL else ""
        shares = ", ".join(f"{100 * share:.0f} %" for share in noise[row])
        share = f"{100 * BAR:.0f} %" if row == ACID else "100 %"
        lines.append(_line([row, share, cell(*spread([*final[row].values()])), against, shares]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def run_all(out: Path, seeds: Sequence[int], steps: int, jobs: int) -> None:
    """Trains what is missing, and writes and prints the table."""
    began = time.monotonic()
    write_worlds(out)
    train_reference(out, steps)
    runs = [Run(row, seed, steps, out) for seed in seeds for row in ROWS]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, runs))
    curves = {row: {r.seed: r.curve(ACCURACY) for r in runs if r.row == row} for row in ROWS}
    final = {row: {seed: c[max(c)] for seed, c in by_seed.items()} for row, by_seed in curves.items()}
    kept = {row: [quarters(r.curve(NOISE_RATE)) for r in runs if r.row == row] for row in ROWS}
    noise = {row: [statistics.fmean(q) for q in zip(*found, strict=True)] for row, found in kept.items()}
    firsts = {seed: reaches(curves[ACID][seed], final[CONTROL][seed]) for seed in seeds}
    table = markdown(final, noise)
    results = {"steps": steps, "final": final, "noise": noise, "reaches": firsts, "curves": curves}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{steps} steps, seeds {[*seeds]}, {(time.monotonic() - began) / 60:.0f} minutes\n\n{table}")
    for seed, first in firsts.items():
        said = "never" if first is None else f"after {100 * first / steps:.0f} % of the control's examples"
        print(f"seed {seed}: acid is where the control ends {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/curation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=None, help="of the control; those of the recipe if not given")
    args = parser.parse_args()
    run_all(args.out, args.seeds, args.steps or load_recipe(str(RECIPE))["trainer"]["max_steps"], args.jobs)


if __name__ == "__main__":
    main()
