"""What a fine-tune gains on emoji that the model never saw, and what it keeps of the others: one table by one command.

A base is trained on pictures of 32 emoji, alone and in scenes. Then it is fine-tuned on pictures of 16 emoji that never
occurred, one to a picture, in every mode of the preset (`configs/finetune.yaml` and its overlays); `soup` lies half-way
between the base and `full`. Gain is zero-shot top-1 among the 16 new emoji; retained are top-1 among the 32 old ones
and retrieval of scenes of these. What is there already is kept, so that the command can be stopped and given again; to
start anew, remove the folder. Run: python benchmarks/finetune.py --jobs 2
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablation import logged, spread

from siglip2.cli.main import main as siglip2
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.retention import scores_of
from siglip2.emoji_world import write_emoji_world

RECIPE = Path(__file__).with_suffix(".yaml")
BASE, FULL, SOUP = "base", "full", "soup"
# the learning rates of a model of two million parameters and some hundred steps, not the preset's
MODES = {
    FULL: (["finetune"], 3e-4),
    "lit": (["finetune", "finetune/lit"], 1e-3),
    "text-locked": (["finetune", "finetune/text-locked"], 3e-4),
    "lora": (["finetune", "finetune/lora"], 3e-3),
}
BASE_RATE = 1.5e-3
ROWS = (BASE, *MODES, SOUP)
COLUMNS = {
    ("new_emoji", "en", "top-1"): "new emoji, top-1",
    ("kept_emoji", "en", "top-1"): "old emoji, top-1",
    ("kept_scenes", "en", "text to image R@1"): "old scenes, text to image R@1",
    ("kept_scenes", "en", "image to text R@1"): "old scenes, image to text R@1",
}
Scores = Mapping[str, float]


def write_worlds(out: Path, size: str) -> None:
    """Writes both worlds and the tokenizer, unless they are there: other pictures of the same choice of emoji."""
    shape = {"num_emoji": 32, "unseen": 16, "size": 96, "languages": ("en",)}
    small = size == "tiny"
    scenes, val, new = (200, 64, 256) if small else (8000, 1000, 3000)
    write_emoji_world(out / "old", scenes=scenes, singles=scenes // 2, val=val, **shape)
    write_emoji_world(out / "new", scenes=0, singles=1, val=new, seed=1, **shape)
    tokenizer = out / "old" / "tokenizer.json"
    if not tokenizer.is_file():
        words = ["--caption", "json.captions", "--vocab-size", "1000", "--out", str(tokenizer)]
        siglip2(["tokenizer", "train", str(out / "old" / "train"), *words])


def sets(out: Path) -> list[str]:
    """Returns the options that name the evaluation sets."""
    old = out / "old"
    zero_shot = {
        "new_emoji": {"path": str(old / "unseen"), "classes": str(old / "unseen-classes.json")},
        "kept_emoji": {"path": str(old / "val-single"), "classes": str(old / "classes.json")},
    }
    scenes = {"path": str(old / "val-scene"), "languages": ["en"], "fields": {"caption": "json.captions"}}
    return [f"--data.zero_shot={json.dumps(zero_shot)}", f"--data.retrieval={json.dumps({'kept_scenes': scenes})}"]


def fit(out: Path, row: str, seed: int, steps: int) -> list[str]:
    """Returns the command that trains a row."""
    folder, tokenizer = out / f"{row}-{seed}", out / "old" / "tokenizer.json"
    recipes, rate = MODES.get(row, ([], BASE_RATE))
    words = [sys.executable, "-m", "siglip2", "fit", *(w for name in recipes for w in ("--config", name))]
    words += ["--config", str(RECIPE), f"--seed_everything={seed}", "--report=false", *sets(out)]
    words += [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}"]
    words += [f"--model.optimizer.init_args.lr={rate}", f"--model.warmup={steps // 20}"]
    words.append(f"--data.tokenizer={tokenizer}")
    if row != BASE:
        start = out / f"{BASE}-{seed}" / "last.ckpt"
        return [*words, f"--data.train.path={out / 'new' / 'unseen'}", f"--model.warm_start={start}"]
    keep = {"dirpath": str(folder), "filename": "last", "every_n_train_steps": steps, "enable_version_counter": False}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}
    rules = [
        {"match": "logit_(scale|bias)$", "lr": 10}
    ]  # few steps: temperature and bias must find their place quickly
    words += [f"--data.train.path={out / 'old' / 'train'}", f"--trainer.callbacks+={json.dumps(callback)}"]
    return [*words, f"--model.rules={json.dumps(rules)}", "--trainer.num_sanity_val_steps=0"]


def train(out: Path, row: str, seed: int, steps: int) -> None:
    """Trains a row unless it is trained; raises RuntimeError with the end of its log if that fails."""
    folder = out / f"{row}-{seed}"
    if (folder / "done").is_file():
        return
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    logged(fit(out, row, seed, steps), folder / "fit.log")
    (folder / "done").touch()
    print(f"{row}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def mix(out: Path, seed: int) -> None:
    """Writes the checkpoint half-way between the base and the full fine-tune, unless it is there."""
    path = out / f"{SOUP}-{seed}" / "last.ckpt"
    if not path.is_file():
        ends = [str(out / f"{row}-{seed}" / "last.ckpt") for row in (BASE, FULL)]
        siglip2(["soup", *ends, "--alpha", "0.5", "--out", str(path)])


def score(out: Path, row: str, seed: int) -> Scores:
    """Returns what `siglip2 validate` finds for a checkpoint, by column; finds it once."""
    folder = out / f"{row}-{seed}"
    path = folder / "scores.json"
    if not path.is_file():
        quiet = ["--trainer.enable_progress_bar=false"]
        cli = SigLIP2CLI(["--ckpt_path", str(folder / "last.ckpt"), *quiet], command="validate")
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False)
        found = scores_of(cli.trainer.callbacks)
        path.write_text(json.dumps({name: found[key] for key, name in COLUMNS.items()}), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def table(found: Mapping[str, Sequence[Scores]]) -> str:
    """Returns a Markdown table: mean and standard deviation over seeds, in per cent."""
    lines = ["| weights | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, scores in found.items():
        cells = []
        for column in COLUMNS.values():
            mean, deviation = spread([100 * s[column] for s in scores])
            cells.append(f"{mean:.1f}" if len(scores) == 1 else f"{mean:.1f} ± {deviation:.1f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains, mixes, scores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-benchmark"), help="Folder of the experiment.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of bases; every mode starts from each.")
    parser.add_argument("--steps", type=int, default=800, help="Optimizer steps of a base.")
    parser.add_argument("--tune-steps", type=int, default=200, help="Optimizer steps of a fine-tune.")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at the same time, on one thread each.")
    parser.add_argument("--world", choices=("full", "tiny"), default="full", help="tiny is for trying the command out.")
    args = parser.parse_args()
    out, seeds = args.out.resolve(), range(args.seeds)
    write_worlds(out, args.world)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train(out, BASE, seed, args.steps), seeds))
        runs = [(row, seed) for seed in seeds for row in MODES]
        list(pool.map(lambda run: train(out, *run, args.tune_steps), runs))
    for seed in seeds:
        mix(out, seed)
    found = {row: [score(out, row, seed) for seed in seeds] for row in ROWS}
    text = table(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")


if __name__ == "__main__":
    main()
