"""What each loss of the recipe adds, on the emoji world: one table, from data to numbers, by one command.

Every row is `benchmarks/ablation.yaml` under a shipped overlay that takes losses out; data, steps and seeds are the
same. Each run is trained and scored in a process of its own; what is there already is kept, so that the command can be
stopped and given again. To start anew, remove the folder. Run: python benchmarks/ablation.py --jobs 2
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from siglip2.cli.main import main as siglip2
from siglip2.core.checkpoint import read_checkpoint
from siglip2.emoji_world import write_emoji_world
from siglip2.recipes import load_recipe

HERE = Path(__file__).parent
RECIPE = HERE / "ablation.yaml"
OVERLAYS = {"sigmoid": ["losses/siglip1"], "+locca": ["losses/no-ssl"], "+silc+tips": ["losses/no-locca"], "all": []}
BASELINE = "sigmoid"
METRICS = {
    "zero_shot_single": "zero-shot top-1, one emoji",
    "zero_shot_scene": "zero-shot top-1, scenes",
    "retrieval": "retrieval R@1",
    "referring_decoder": "referring acc@0.5, own decoder",
    "referring_probe": "referring acc@0.5, probe",
    "referring_placed": "referring acc@0.5, probe told the places",
    "segmentation": "segmentation mIoU",
}
TAIL = 2000  # characters of a log that are shown when its run fails

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Run:
    """One row of the table with one seed.

    Args:
        row: key of `OVERLAYS`.
        seed: of weights, data order and probes.
        steps: optimizer steps.
        out: folder of the whole ablation.
    """

    row: str
    seed: int
    steps: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.row.strip('+').replace('+', '-')}-{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    def trained(self) -> bool:
        """Says whether the checkpoint of the last step is there."""
        return self.checkpoint.is_file() and read_checkpoint(str(self.checkpoint))["global_step"] == self.steps

    def training(self) -> list[str]:
        """Returns the command that trains it."""
        overlays = [word for name in OVERLAYS[self.row] for word in ("--config", name)]
        return [
            *(sys.executable, "-m", "siglip2", "fit", "--config", str(RECIPE), *overlays),
            *("--seed_everything", str(self.seed), "--trainer.max_steps", str(self.steps), "--report", "false"),
            *("--trainer.default_root_dir", str(self.folder), "--data.train.path", str(self.out / "world" / "train")),
            *("--data.tokenizer", str(self.out / "world" / "tokenizer.json")),
        ]

    def scoring(self) -> list[str]:
        """Returns the command that writes `scores`."""
        words = [str(self.checkpoint), "--world", str(self.out / "world"), "--seed", str(self.seed)]
        return [sys.executable, str(HERE / "scores.py"), *words, "--out", str(self.scores)]


def write_world(world: Path) -> None:
    """Writes data and tokenizer, unless they are there."""
    options = {"scenes": 10000, "singles": 4000, "val": 1000, "num_emoji": 32, "unseen": 0, "size": 96}
    write_emoji_world(world, languages=("en",), **options)
    tokenizer = world / "tokenizer.json"
    if not tokenizer.is_file():
        words = ["--caption", "json.captions", "--vocab-size", "1000", "--out", str(tokenizer)]
        siglip2(["tokenizer", "train", str(world / "train"), *words])


def finish(run: Run) -> dict[str, dict[str, float]]:
    """Trains and scores a run, or does what is still missing of it; returns what `scores.score` found.

    Raises:
        RuntimeError: if a process fails; with the end of its log.
    """
    began = time.monotonic()
    if not run.trained():
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        logged(run.training(), run.folder / "fit.log")
    trained = time.monotonic()
    if not run.scores.is_file():
        logged(run.scoring(), run.folder / "scores.log")
    seconds = f"{trained - began:.0f} s to train, {time.monotonic() - trained:.0f} s to score"
    print(f"{run.row}, seed {run.seed}: {seconds}", flush=True)
    return json.loads(run.scores.read_text(encoding="utf-8"))


def logged(command: Sequence[str], log: Path) -> None:
    """Runs a command on one thread, what it says going to `log`; raises RuntimeError with the end of it if it fails."""
    with log.open("w", encoding="utf-8") as file:
        single = {**os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=single, check=False).returncode
    if status:
        end = log.read_text(encoding="utf-8")[-TAIL:]
        raise RuntimeError(f"status {status} from: {' '.join(command)}\nThe end of {log}:\n{end}")


def finish_all(runs: Sequence[Run], jobs: int) -> tuple[dict[Run, dict[str, dict[str, float]]], list[str]]:
    """Returns what was found for each run that ended well, and what was wrong with each of the others."""
    found, wrong = {}, []
    with ThreadPoolExecutor(jobs) as pool:
        for run, future in [(run, pool.submit(finish, run)) for run in runs]:
            try:
                found[run] = future.result()
            except (RuntimeError, OSError, ValueError) as error:
                wrong.append(f"{run.row}, seed {run.seed}: {error}")
    return found, wrong


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation (n - 1); NaN for the deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float]:
    """Returns the mean over seeds of value - baseline, and its standard error.

    Args:
        values: by seed.
        baseline: by seed; seeds that only one of the two has are left out.
    """
    mean, deviation = spread([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
    return mean, deviation / len(values.keys() & baseline.keys()) ** 0.5


def cell(mean: float, around: float, *, sign: str = "") -> str:
    """Returns `12.3 ± 0.4` in per cent, without the second number where there is none."""
    text = f"{100 * mean:{sign}.1f}"
    return text if around != around else f"{text} ± {100 * around:.1f}"


def markdown(scores: Scores, chance: Mapping[str, float]) -> str:
    """Returns two tables: each row's scores, mean and standard deviation over seeds, and differences to the baseline.

    Args:
        scores: shares in [0, 1] by row, seed and metric; a metric may be missing from a row.
        chance: what is scored without looking at the picture.
    """
    looking = {row: [_over_seeds(by_seed, metric) for metric in METRICS] for row, by_seed in scores.items()}
    lines = _header("per cent")
    lines.append(_line("without looking", [f"{100 * chance[m]:.1f}" if m in chance else "" for m in METRICS]))
    lines += [_line(row, [cell(*spread([*v.values()])) if v else "" for v in each]) for row, each in looking.items()]
    if BASELINE in looking:
        lines += ["", *_header(f"minus {BASELINE}")]
        pairs = {row: list(zip(each, looking[BASELINE], strict=True)) for row, each in looking.items()}
        del pairs[BASELINE]
        for row, each in pairs.items():
            lines.append(_line(row, [cell(*paired(a, b), sign="+") if a.keys() & b.keys() else "" for a, b in each]))
    return "\n".join(lines) + "\n"


def _over_seeds(by_seed: Mapping[int, Mapping[str, float]], metric: str) -> dict[int, float]:
    return {seed: found[metric] for seed, found in by_seed.items() if metric in found}


def _header(corner: str) -> list[str]:
    return [_line(corner, list(METRICS.values())), "|---" * (1 + len(METRICS)) + "|"]


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(OVERLAYS), default=list(OVERLAYS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; those of the recipe if not given")
    args = parser.parse_args()
    steps = args.steps or load_recipe(str(RECIPE))["trainer"]["max_steps"]
    write_world(args.out / "world")
    # the longest first, so that no core waits long for the other at the end
    runs = [Run(row, seed, steps, args.out) for seed in args.seeds for row in reversed(OVERLAYS) if row in args.rows]
    began = time.monotonic()
    found, wrong = finish_all(runs, args.jobs)
    scores = {row: {r.seed: f["scores"] for r, f in found.items() if r.row == row} for row in args.rows}
    chance = next((f["chance"] for f in found.values()), {})
    table = markdown({row: by_seed for row, by_seed in scores.items() if by_seed}, chance)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    results = {"steps": steps, "scores": scores, "chance": chance}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{steps} steps, seeds {args.seeds}, {(time.monotonic() - began) / 60:.0f} minutes\n\n{table}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
