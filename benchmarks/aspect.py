"""NaFlex against squashed squares at equal tokens, on wide and tall pictures: one table by one command.

For each seed a base run trains on pictures squashed to a square. From its checkpoint half way two branches go on with
the same examples, steps and schedule: `fixed` squashes as before, `naflex` keeps the aspect ratio within the same
number of patches. Each run is trained and scored in a process of its own; what is there already is kept, so that the
command can be stopped and given again. To start anew, remove the folder. Run: python benchmarks/aspect.py --jobs 2
"""

# M pictures, B of a batch, E embedding dimension, K classes, R regions of a picture at most

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation import cell, logged, paired, spread
from scores import BATCH, LANGUAGE, load, regions
from torch import Tensor

from siglip2.cli.main import main as siglip2
from siglip2.core.batch import Patches, collate
from siglip2.core.callbacks.retrieval import match_ranks
from siglip2.core.callbacks.zero_shot import class_vectors, read_classes
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.fields import Fields, Sample
from siglip2.core.data.source import open_source
from siglip2.core.layout import Patchifier
from siglip2.core.views import IMAGE
from siglip2.emoji_world import write_emoji_world
from siglip2.recipes import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
# ours: SigLIP 2 branches into NaFlex at 0.9 and stretches the rest to 15 billion examples; in a few hundred steps at
# the learning rate that is left there, no branch would learn anything
BRANCHING = 0.5
FIELDS = Fields(caption="json.captions", extra={"width": "json.width", "height": "json.height"})
BASE, FIXED, NAFLEX = "base", "fixed", "naflex"
WIDE = 2.0  # from this ratio of the long to the short side on a picture counts as wide or tall
SHAPES = {"": "", "_wide": ", wide or tall (2:1 and more)", "_square": ", squarer than 2:1"}
TASKS = {
    "zero_shot_single": "zero-shot top-1, one emoji",
    "zero_shot_scene": "zero-shot top-1, scenes",
    "retrieval": "retrieval R@1, scenes",
}
METRICS = {task + shape: label + words for task, label in TASKS.items() for shape, words in SHAPES.items()}

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Run:
    """A base run or a branch of it.

    Args:
        row: `BASE`, `FIXED` or `NAFLEX`.
        seed: of weights and data order.
        steps: optimizer steps of base and branch together.
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
    def checkpoint(self) -> Path:
        return self.folder / (f"progress-{BRANCHING:g}.ckpt" if self.row == BASE else "last.ckpt")

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def base(self) -> "Run":
        """The run that it branches from."""
        return Run(BASE, self.seed, self.steps, self.out)

    @property
    def own_steps(self) -> int:
        """Optimizer steps that it takes itself."""
        before = math.ceil(BRANCHING * self.steps)  # the step that reaches it is the one that is saved
        return before if self.row == BASE else self.steps - before

    def trained(self) -> bool:
        """Says whether the checkpoint of its last step is there."""
        return self.checkpoint.is_file() and read_checkpoint(str(self.checkpoint))["global_step"] == self.own_steps

    def training(self) -> list[str]:
        """Returns the command that trains it."""
        # the base is half of a run: its schedule is that of all steps, and it stops where the branches begin
        steps = self.steps if self.row == BASE else self.own_steps
        own = ["--trainer.limit_train_batches", str(self.own_steps)]
        if self.row != BASE:
            own = ["--model.warm_start", str(self.base.checkpoint)]
        if self.row == NAFLEX:
            own += naflex_options()
        return [
            *(sys.executable, "-m", "siglip2", "fit", "--config", str(RECIPE), *own),
            *("--seed_everything", str(self.seed), "--trainer.max_steps", str(steps), "--report", "false"),
            *("--trainer.default_root_dir", str(self.folder), "--data.train.path", str(self.out / "world" / "train")),
            *("--data.tokenizer", str(self.out / "world" / "tokenizer.json")),
        ]

    def scoring(self) -> list[str]:
        """Returns the command that writes `scores`."""
        return [sys.executable, __file__, "--out", str(self.out), "--score", str(self.checkpoint)]


def naflex_options() -> list[str]:
    """Returns the options that put `naflex` in the place of the recipe's `fixed`, with as many patches and examples."""
    fixed = next(plugin["fixed"] for plugin in load_recipe(str(RECIPE))["plugins"] if "fixed" in plugin)
    side = fixed["image_size"] // fixed["patch_size"]
    options = {"seq_lens": [side**2], "eval_seq_len": side**2, "table": side}
    options |= {name: fixed[name] for name in ("patch_size", "batch_size")}
    words = [word for name, value in options.items() for word in (f"--plugins.naflex.{name}", json.dumps(value))]
    return ["--plugins.fixed", "off", *words]


def write_world(world: Path) -> None:
    """Writes data and tokenizer, unless they are there."""
    options = {"scenes": 10000, "singles": 10000, "val": 2000, "num_emoji": 32, "unseen": 0, "size": 128}
    write_emoji_world(world, languages=("en",), scene_aspect=4.0, single_aspect=4.0, **options)
    tokenizer = world / "tokenizer.json"
    if not tokenizer.is_file():
        words = ["--caption", "json.captions", "--vocab-size", "1000", "--out", str(tokenizer)]
        siglip2(["tokenizer", "train", str(world / "train"), *words])


def train(run: Run) -> None:
    """Trains a run unless it is trained; raises RuntimeError with the end of its log if that fails."""
    if not run.trained():
        began = time.monotonic()
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        logged(run.training(), run.folder / "fit.log")
        print(f"{run.row}, seed {run.seed}: {time.monotonic() - began:.0f} s to train", flush=True)


def finish(branch: Run, base: Future[None]) -> dict[str, dict[str, float]]:
    """Trains a branch once its base is there, and returns what `score` found."""
    base.result()
    train(branch)
    if not branch.scores.is_file():
        logged(branch.scoring(), branch.folder / "scores.log")
    found: dict[str, dict[str, float]] = json.loads(branch.scores.read_text(encoding="utf-8"))
    return found


def finish_all(branches: Sequence[Run], jobs: int) -> tuple[dict[Run, dict[str, dict[str, float]]], list[str]]:
    """Returns what was found for each branch that ended well, and what was wrong with each of the others."""
    found, wrong = {}, []
    with ThreadPoolExecutor(jobs) as pool:
        # a worker that waits for a base never keeps it from starting: bases come first
        bases = {base: pool.submit(train, base) for base in dict.fromkeys(branch.base for branch in branches)}
        for branch, future in [(branch, pool.submit(finish, branch, bases[branch.base])) for branch in branches]:
            try:
                found[branch] = future.result()
            except (RuntimeError, OSError, ValueError) as error:
                wrong.append(f"{branch.row}, seed {branch.seed}: {error}")
    return found, wrong


@dataclass(frozen=True)
class Seen:
    """A split as a trained model sees it.

    Args:
        z_image_ME: embeddings of the pictures.
        labels_MR: classes in each picture, filled up.
        ratio_M: long over short side of each picture.
        patches_M: patches that each picture was given.
        captions: of each picture, in English.
    """

    z_image_ME: Tensor
    labels_MR: Tensor
    ratio_M: Tensor
    patches_M: Tensor
    captions: list[str]


@torch.no_grad()
def look(module: Any, split: str) -> Seen:
    """Encodes the pictures of a split."""
    source = open_source(split, fields=FIELDS)
    samples = [source.read(number) for number in range(len(source))]
    batches = [stacked(samples[i : i + BATCH], module.patchifier) for i in range(0, len(samples), BATCH)]
    sizes_M2 = torch.tensor([(sample.get("width"), sample.get("height")) for sample in samples])
    return Seen(
        z_image_ME=torch.cat([module.model.encode_image(patches).embedding for patches in batches]),
        labels_MR=torch.stack([regions(sample)[0] for sample in samples]),
        ratio_M=sizes_M2.amax(1) / sizes_M2.amin(1),
        patches_M=torch.cat([num_patches(patches) for patches in batches]),
        captions=[sample.captions()[LANGUAGE][0] for sample in samples],
    )


def stacked(samples: Sequence[Sample], patchifier: Patchifier) -> Patches:
    """Returns the pictures as one batch of patches, as evaluation has them."""
    layout = patchifier.eval_layout(len(samples))
    patches: Patches = collate([{"image": patchifier(sample.image(), IMAGE, layout)} for sample in samples])["image"]
    return patches


def num_patches(patches: Patches) -> Tensor:
    """Returns how many patches each picture has without its padding, int64 [B]."""
    if patches.valid is None:
        return torch.full((patches.num_images,), patches.patches.shape[1])
    return patches.valid.sum(1)


def score(checkpoint: str, world: Path) -> dict[str, dict[str, float]]:
    """Returns the scores of a checkpoint, those of chance, and the mean number of patches.

    Args:
        checkpoint: of a branch.
        world: folder of the emoji world.
    """
    module = load(checkpoint)
    names = read_classes(str(world / "classes.json"), [LANGUAGE])[LANGUAGE]
    single, scene = (look(module, str(world / split)) for split in ("val-single", "val-scene"))
    with torch.no_grad():
        vectors_KE = class_vectors(module, names, ["{}"])
        z_text_ME = module.model.encode_text(module.tokenizer.encode(scene.captions)).embedding
    found = {
        **by_shape("zero_shot_single", named_right(single.z_image_ME, vectors_KE, single.labels_MR), single.ratio_M),
        **by_shape("zero_shot_scene", named_right(scene.z_image_ME, vectors_KE, scene.labels_MR), scene.ratio_M),
        **by_shape("retrieval", found_first(scene.z_image_ME, z_text_ME), scene.ratio_M),
    }
    present = {"zero_shot_single": single, "zero_shot_scene": scene}
    chances = {task: (seen.labels_MR >= 0).sum(1) / len(names) for task, seen in present.items()}
    chances["retrieval"] = torch.full_like(scene.ratio_M, 1 / len(scene.captions))
    ratios = {"zero_shot_single": single.ratio_M, "zero_shot_scene": scene.ratio_M, "retrieval": scene.ratio_M}
    chance = {name: share for t in TASKS for name, share in by_shape(t, chances[t], ratios[t]).items()}
    patches = {"mean": float(torch.cat([single.patches_M, scene.patches_M]).float().mean())}
    return {"scores": found, "chance": chance, "patches": patches}


def named_right(z_image_ME: Tensor, vectors_KE: Tensor, labels_MR: Tensor) -> Tensor:
    """Returns 1.0 for each picture whose best class is one of those that are in it, else 0.0, [M]."""
    best_M = (z_image_ME @ vectors_KE.T).argmax(1)
    return (best_M[:, None] == labels_MR).any(1).float()


def found_first(z_image_ME: Tensor, z_text_ME: Tensor) -> Tensor:
    """Returns for each pair the mean over both directions of being found first among all, [M]; ties lose."""
    to_text, to_image = match_ranks(z_image_ME, z_text_ME), match_ranks(z_text_ME, z_image_ME)
    return ((to_text <= 1).float() + (to_image <= 1).float()) / 2


def by_shape(task: str, hits_M: Tensor, ratio_M: Tensor) -> dict[str, float]:
    """Returns the mean over all pictures, over the wide and tall ones, and over the others, by name of the metric."""
    kept = {"": torch.ones_like(ratio_M, dtype=torch.bool), "_wide": ratio_M >= WIDE, "_square": ratio_M < WIDE}
    return {task + shape: float(hits_M[mask_M].mean()) for shape, mask_M in kept.items()}


def markdown(scores: Scores, chance: Mapping[str, float]) -> str:
    """Returns the table: mean and standard deviation over seeds, and the difference paired by seed with its error.

    Args:
        scores: shares in [0, 1] by row, seed and metric.
        chance: what is scored without looking at the picture.
    """
    lines = [_line(["per cent", "without looking", FIXED, NAFLEX, f"{NAFLEX} - {FIXED}"]), _line(["---"] * 5)]
    for metric, label in METRICS.items():
        fixed, naflex = ({s: found[metric] for s, found in scores.get(row, {}).items()} for row in (FIXED, NAFLEX))
        cells = [cell(*spread([*values.values()])) if values else "" for values in (fixed, naflex)]
        cells.append(cell(*paired(naflex, fixed), sign="+") if fixed.keys() & naflex.keys() else "")
        lines.append(_line([label, f"{100 * chance[metric]:.1f}" if metric in chance else "", *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def run_all(out: Path, seeds: Sequence[int], steps: int, jobs: int) -> None:
    """Trains and scores what is missing, and writes and prints the table."""
    write_world(out / "world")
    began = time.monotonic()
    found, wrong = finish_all([Run(row, seed, steps, out) for seed in seeds for row in (NAFLEX, FIXED)], jobs)
    scores = {row: {r.seed: f["scores"] for r, f in found.items() if r.row == row} for row in (FIXED, NAFLEX)}
    patches = {r.row: f["patches"]["mean"] for r, f in found.items()}
    chance = next((f["chance"] for f in found.values()), {})
    table = markdown(scores, chance)
    (out / "table.md").write_text(table, encoding="utf-8")
    results = {"steps": steps, "branching": BRANCHING, "scores": scores, "chance": chance, "patches": patches}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    minutes = (time.monotonic() - began) / 60
    given = ", ".join(f"{row} {mean:.1f}" for row, mean in sorted(patches.items()))
    print(f"\n{steps} steps, seeds {[*seeds]}, {minutes:.0f} minutes; mean patches per picture: {given}\n\n{table}")
    if wrong:
        sys.exit("\n".join(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/aspect"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=None, help="of base and branch; those of the recipe if not given")
    parser.add_argument("--score", default=None, help="only score this checkpoint, beside which the scores are written")
    args = parser.parse_args()
    if args.score:
        found = json.dumps(score(args.score, args.out / "world"), indent=1)
        Path(args.score).with_name("scores.json").write_text(found + "\n", encoding="utf-8")
    else:
        run_all(args.out, args.seeds, args.steps or load_recipe(str(RECIPE))["trainer"]["max_steps"], args.jobs)


if __name__ == "__main__":
    main()
