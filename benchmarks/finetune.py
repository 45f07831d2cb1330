"""What a fine-tune gains on a domain that the model never saw, and what it keeps: one command, from data to tables.

A base is trained on pictures of 32 emoji, alone and in scenes. From there every mode of the preset
(`configs/finetune.yaml` and its overlays) is tuned on two domains, one emoji to a picture:

- `recoloured`, other renderings: 24 of the 32 emoji in pictures whose red, green and blue changed places. Scored on new
  such pictures of these, and of the other 8, which gain only if the rendering was learned and not just its names.
- `emoji`, other things: the 16 emoji that the base never saw, in colour. Scored on new pictures of these.

Retained are pictures and scenes of the 32 emoji in colour. Zero-shot is always among all 48 names, so that a model that
now sees nothing but what is new loses what is old. In the last mode half of the pictures are those of the base. `soup`
lies between the base and `full`. What is scored was not trained on. Numbers are those of the runs' own retention
tables; base and soups are scored by `siglip2 validate`, the base as a check, too. Learning rates come from `--pilot`,
with a base and pictures of its own. What is there already is kept, so that the command can be stopped and given again;
to start anew, or with other steps, remove the folder. Run: python benchmarks/finetune.py
"""

# B pictures, T texts, H W height and width in pixels

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
import torch
from ablation import cell, logged, paired, spread

from siglip2.cli.exporting import export_to
from siglip2.cli.main import main as siglip2
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.batch import Patches
from siglip2.core.callbacks.retention import scores_of
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.data.source import open_source
from siglip2.core.functional import grid_coords, patchify
from siglip2.core.interop.detect import read_weights
from siglip2.core.model.vision import to_unit_range
from siglip2.emoji_world import Emoji, compose, select, write_emoji_world
from siglip2.emoji_world.shards import describe, encode, write_shards

RECIPE = Path(__file__).with_suffix(".yaml")
BASE, FULL, LORA, REPLAY = "base", "full", "lora", "full, half of it old"
MODES = {
    FULL: ["finetune"],
    "lit": ["finetune", "finetune/lit"],
    "text-locked": ["finetune", "finetune/text-locked"],
    LORA: ["finetune", "finetune/lora"],
    REPLAY: ["finetune"],
}
ALPHAS = (0.25, 0.5, 0.75)
SOUPS = tuple(f"soup {alpha:g}" for alpha in ALPHAS)
BASE_RATE = 1.5e-3  # benchmarks/ablation.yaml
# by `--pilot --domains recoloured`; each list goes on until its ends are worse than what lies between them
PILOTED = {
    FULL: (3e-5, 1e-4, 3e-4, 1e-3),
    "lit": (1e-4, 3e-4, 1e-3),
    "text-locked": (1e-4, 3e-4, 1e-3),
    LORA: (3e-4, 1e-3, 3e-3),
    REPLAY: (3e-4, 1e-3, 3e-3),
}
PILOT_SEED = 100  # not reported
RATES = {FULL: 1e-4, "lit": 3e-4, "text-locked": 3e-4, LORA: 1e-3, REPLAY: 1e-3}  # the best of PILOTED
ZERO_SHOT = {
    "recoloured": "recoloured emoji",
    "recoloured_other": "recoloured, others than in training",
    "emoji": "new emoji",
    "kept_emoji": "old emoji",
}
SCENES = "kept_scenes"
GAINS = {
    "recoloured": ("recoloured", "recoloured_other"),
    "emoji": ("emoji",),
}  # by domain; the first decides in the pilot
COLUMNS = {(name, "top-1"): title for name, title in ZERO_SHOT.items()} | {
    (SCENES, "text to image R@1"): "old scenes, text to image R@1",
    (SCENES, "image to text R@1"): "old scenes, image to text R@1",
}
EXPORTED = 64  # pictures that the exported towers are compared on
Scores = Mapping[str, float]  # by column, shares in [0, 1]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        out: folder of the whole experiment.
        seed: of the weights and the order of the pictures.
        steps: optimizer steps.
        row: key of `MODES`, or the base.
        domain: key of `GAINS`; empty for the base.
        rate: peak learning rate.
    """

    out: Path
    seed: int
    steps: int
    row: str = BASE
    domain: str = ""
    rate: float = BASE_RATE

    @property
    def folder(self) -> Path:
        piloted = f"-{self.rate:g}" if self.domain and self.seed == PILOT_SEED else ""
        row = self.row.replace(", ", "-").replace(" ", "-")
        return self.out / "-".join(filter(None, (self.domain, row + piloted, str(self.seed))))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def base(self) -> Path:
        return self.out / f"{BASE}-{self.seed}" / "last.ckpt"

    @property
    def split(self) -> str:
        return "pilot" if self.seed == PILOT_SEED else "test"

    def training(self) -> list[str]:
        """Returns the command that trains it."""
        recipes = [word for name in MODES.get(self.row, []) for word in ("--config", name)]
        words = [sys.executable, "-m", "siglip2", "fit", *recipes, "--config", str(RECIPE), "--report=false"]
        words += [f"--seed_everything={self.seed}", *sets(self.out, self.domain, self.split)]
        words += [f"--trainer.default_root_dir={self.folder}", f"--trainer.max_steps={self.steps}"]
        words += [f"--model.optimizer.init_args.lr={self.rate}", f"--model.warmup={self.steps // 20}"]
        words.append(f"--data.tokenizer={self.out / 'world' / 'tokenizer.json'}")
        new, old = (str(self.out / name) for name in (f"{self.domain}-tune", "world/train"))
        if self.row == REPLAY:
            sources = {"new": {"path": new, "weight": 0.5}, "old": {"path": old, "weight": 0.5}}
            return [*words, f"--data.train.sources={json.dumps(sources)}", f"--model.warm_start={self.base}"]
        if self.domain:
            return [*words, f"--data.train.path={new}", f"--model.warm_start={self.base}"]
        keep = {"dirpath": str(self.folder), "filename": "last", "every_n_train_steps": self.steps}
        callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}
        # few steps: temperature and bias must find their place quickly
        rules = [{"match": "logit_(scale|bias)$", "lr": 10}]
        words += [f"--data.train.path={old}", f"--trainer.callbacks+={json.dumps(callback)}"]
        words += [f"--model.rules={json.dumps(rules)}", "--trainer.num_sanity_val_steps=0"]
        return [*words, "--trainer.limit_val_batches=0"]


def sets(out: Path, domain: str, split: str) -> list[str]:
    """Returns the options that name the evaluation sets of a domain, or of all if it is empty."""
    wanted = [name for name in ZERO_SHOT if name.startswith("kept") or not domain or name in GAINS[domain]]
    classes = str(out / "classes.json")
    zero_shot = {name: {"path": str(out / f"{name}-{split}"), "classes": classes} for name in wanted}
    scenes = {"path": str(out / f"{SCENES}-{split}"), "languages": ["en"], "fields": {"caption": "json.captions"}}
    return [f"--data.zero_shot={json.dumps(zero_shot)}", f"--data.retrieval={json.dumps({SCENES: scenes})}"]


def recolour(image_HW3: np.ndarray) -> np.ndarray:
    """Returns a picture whose red, green and blue changed places: what was green is red; shapes stay."""
    return np.ascontiguousarray(image_HW3[..., [1, 2, 0]])


def pools() -> dict[str, tuple[Emoji, ...]]:
    """Returns the emoji that each set of pictures shows, by its name; those of the base are `kept_emoji`."""
    old, new = select(32, num_unseen=16)
    other = old[3::4]
    first = tuple(emoji for emoji in old if emoji not in other)
    return {"recoloured": first, "recoloured_other": other, "emoji": new, "kept_emoji": old, SCENES: old}


def write_data(out: Path, *, tiny: bool) -> None:
    """Writes the base's world, the tokenizer, the pictures of both domains and what is scored, unless all is there.

    Raises:
        ValueError: if pictures of another number are there.
    """
    done, size = out / "data.done", "tiny" if tiny else "full"
    if done.is_file():
        if (found := done.read_text(encoding="utf-8")) != size:
            raise ValueError(f"{out} holds a {found} world, and {size} was asked for: choose another --out")
        return
    shown = pools()
    old, new = shown["kept_emoji"], shown["emoji"]
    shape = {"num_emoji": len(old), "unseen": len(new), "size": 96, "languages": ("en",)}
    scenes, tuned, scored = (200, 64, 64) if tiny else (8000, 1000, 480)
    world = out / "world"
    write_emoji_world(world, scenes=scenes, singles=scenes // 2, val=1, overwrite=True, **shape)
    words = ["--caption", "json.captions", "--vocab-size", "1000", "--out", str(world / "tokenizer.json")]
    siglip2(["tokenizer", "train", str(world / "train"), *words])
    classes = [{"names": {"en": emoji.names["en"]}} for emoji in (*old, *new)]
    (out / "classes.json").write_text(json.dumps({"classes": classes}, ensure_ascii=False), encoding="utf-8")
    labels = {emoji.id: label for label, emoji in enumerate((*old, *new))}
    for name, pool in shown.items():
        for split in ("pilot", "test", *(["tune"] if name in GAINS else [])):
            samples = pictures(f"{name}-{split}", pool, labels, tuned if split == "tune" else scored)
            for _ in write_shards(out / f"{name}-{split}", samples, samples_per_shard=1000):
                pass
    done.write_text(size, encoding="utf-8")


def pictures(
    name: str, pool: Sequence[Emoji], labels: Mapping[str, int], count: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields samples of the emoji of `pool`, drawn as `name` says; another name draws others."""
    kind = "scene" if name.startswith(SCENES) else "single"
    look: Callable[[np.ndarray], np.ndarray] = recolour if name.startswith("recoloured") else np.asarray
    for index in range(count):
        scene = compose(pool, index, kind=kind, seed=1, split=name)
        scene = replace(scene, image=look(scene.image))
        yield f"{name}-{index:07d}", encode(scene, describe(scene, labels))


def train(run: Run) -> None:
    """Trains a run unless it is trained; raises RuntimeError with the end of its log if that fails."""
    done = run.folder / "done"
    if done.is_file():
        return
    began = time.monotonic()
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    logged(run.training(), run.folder / "fit.log")
    done.touch()
    print(f"{run.folder.name}: {time.monotonic() - began:.0f} s", flush=True)


def retention(run: Run) -> tuple[Scores, Scores]:
    """Returns the scores of a run's own retention table, before and after."""
    rows = json.loads((run.folder / "retention.json").read_text(encoding="utf-8"))["rows"]
    return tuple({COLUMNS[r["dataset"], r["measure"]]: r[key] for r in rows} for key in ("before", "after"))  # type: ignore[return-value]


def validated(checkpoint: Path) -> Scores:
    """Returns what `siglip2 validate` finds for a checkpoint, in the precision of the runs; finds it once."""
    path = checkpoint.with_suffix(".json")
    if not path.is_file():
        how = ["--trainer.enable_progress_bar=false", "--trainer.precision=bf16-mixed"]
        cli = SigLIP2CLI(["--ckpt_path", str(checkpoint), *how], command="validate")
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False)
        found = scores_of(cli.trainer.callbacks)
        scores = {COLUMNS[name, measure]: score for (name, _, measure), score in found.items()}
        path.write_text(json.dumps(scores), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def soup(full: Run, alpha: float) -> Path:
    """Returns the checkpoint between the base and a full fine-tune; writes it unless it is there."""
    path = full.folder / f"soup-{alpha:g}.ckpt"
    if not path.is_file():
        siglip2(["soup", str(full.base), str(full.checkpoint), "--alpha", str(alpha), "--out", str(path)])
    return path


@torch.no_grad()
def export_differences(run: Run) -> dict[str, float]:
    """Returns the largest differences between embeddings of towers with live adapters, merged, and exported.

    In float32, unit-norm: of the first test pictures of the run's domain and of all class names.
    """
    from transformers import AutoModel

    stored, weights = read_checkpoint(str(run.checkpoint)), read_weights(str(run.checkpoint))
    live = SigLIP2CLI(["--ckpt_path", str(run.checkpoint)], command="validate").model
    live.on_load_checkpoint(stored)
    live.load_state_dict(stored["state_dict"])
    live.eval()
    shutil.rmtree(run.folder / "hf", ignore_errors=True)
    export_to(str(run.checkpoint), "hf", run.folder / "hf", check=False)
    hf = AutoModel.from_pretrained(run.folder / "hf", local_files_only=True, dtype=torch.float32).eval()

    source = open_source(str(run.out / f"{run.domain}-test"))
    pixels = torch.stack([source.read(i).image() for i in range(min(EXPORTED, len(source)))])
    grid = weights.grid
    images = Patches(patchify(pixels, weights.patch_size), grid_coords(*grid)[None], None, grid)
    names = [c["names"]["en"] for c in json.loads((run.out / "classes.json").read_text(encoding="utf-8"))["classes"]]
    assert weights.tokenizer is not None
    ids_BT = torch.as_tensor(weights.tokenizer.encode(names)).long()
    answer = hf(input_ids=ids_BT, pixel_values=to_unit_range(pixels))
    found = {"exported": (answer.image_embeds, answer.text_embeds)}
    for name, towers in (("adapters", live.model), ("merged", weights.towers().eval())):
        found[name] = (towers.encode_image(images).embedding, towers.encode_text(ids_BT).embedding)
    pairs = (("adapters", "merged"), ("merged", "exported"), ("adapters", "exported"))
    return {f"{a} - {b}": max(map(apart, found[a], found[b])) for a, b in pairs}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest difference of two tensors."""
    return float((one - other).abs().max())


def table(domain: str, found: Mapping[str, Mapping[int, Scores]]) -> str:
    """Returns two Markdown tables of a domain, in per cent: mean and deviation over seeds, and minus the base.

    Args:
        domain: key of `GAINS`.
        found: scores by row and seed, the base's among them.
    """
    columns = [t for (name, _), t in COLUMNS.items() if name in GAINS[domain] or name.startswith("kept")]
    lines = []
    for corner, minus in ((domain, False), (f"{domain}, minus {BASE}", True)):
        lines += ["", f"| {' | '.join((corner, *columns))} |", "|---" * (len(columns) + 1) + "|"]
        for row in found:
            if minus and row == BASE:
                continue
            cells = []
            for column in columns:
                own, base = ({s: scores[column] for s, scores in found[r].items()} for r in (row, BASE))
                cells.append(cell(*paired(own, base), sign="+") if minus else cell(*spread([*own.values()])))
            lines.append(f"| {' | '.join((row, *cells))} |")
    return "\n".join(lines)


def pilot(out: Path, domains: Sequence[str], steps: int, tune_steps: int, jobs: int) -> str:
    """Tunes every mode at every rate from a base of its own; returns a table of gain and retention.

    The best rate has the highest harmonic mean of top-1 in the domain and of the old emoji, as generalised zero-shot
    learning scores what is new beside what is old (https://arxiv.org/abs/1707.00600). Their sum would not do: not to
    train at all has the highest.
    """
    train(Run(out, PILOT_SEED, steps))
    runs = [Run(out, PILOT_SEED, tune_steps, m, d, rate) for d in domains for m in MODES for rate in PILOTED[m]]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, runs))
    lines = []
    for domain in domains:
        gain, *_ = GAINS[domain]
        lines += ["", f"| {domain} | rate: {ZERO_SHOT[gain]}, {ZERO_SHOT['kept_emoji']} | best |", "|---|---|---|"]
        for mode in MODES:
            after = {r.rate: retention(r)[1] for r in runs if (r.domain, r.row) == (domain, mode)}
            both = {rate: [100 * s[ZERO_SHOT[n]] for n in (gain, "kept_emoji")] for rate, s in after.items()}
            cells = "; ".join(f"{rate:g}: {a:.1f}, {b:.1f}" for rate, (a, b) in both.items())
            lines.append(f"| {mode} | {cells} | {max(both, key=lambda rate: harmonic_mean(both[rate])):g} |")
    return "\n".join(lines)


def experiment(out: Path, domains: Sequence[str], seeds: Sequence[int], steps: int, tune_steps: int, jobs: int) -> str:
    """Trains everything, mixes, scores; returns the tables, and below them what was compared as a check."""
    bases = [Run(out, seed, steps) for seed in seeds]
    runs = [Run(out, s, tune_steps, m, d, RATES[m]) for d in domains for s in seeds for m in MODES]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, bases))
        list(pool.map(train, runs))
    before = {run.seed: validated(run.checkpoint) for run in bases}
    lines, most = [], 0.0
    for domain in domains:
        found: dict[str, dict[int, Scores]] = {BASE: before}
        for mode in MODES:
            found[mode] = {r.seed: retention(r)[1] for r in runs if (r.domain, r.row) == (domain, mode)}
        fulls = [r for r in runs if (r.domain, r.row) == (domain, FULL)]
        found |= {row: {r.seed: validated(soup(r, a)) for r in fulls} for row, a in zip(SOUPS, ALPHAS, strict=True)}
        lines.append(table(domain, found))
    for run in runs:
        most = max(most, *(abs(score - before[run.seed][c]) for c, score in retention(run)[0].items()))
    lines.append(f"\nretention tables, before: at most {most:.1e} from `siglip2 validate` of the base")
    for run in runs:
        if run.row == LORA:
            differences = ", ".join(f"{name} {value:.1e}" for name, value in export_differences(run).items())
            lines.append(f"{run.folder.name}, embeddings: {differences}")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, and prints and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-benchmark"), help="Folder of the experiment.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="A base each, and all modes from it.")
    parser.add_argument("--domains", nargs="+", choices=list(GAINS), default=list(GAINS))
    parser.add_argument("--steps", type=int, default=800, help="Optimizer steps of a base.")
    parser.add_argument("--tune-steps", type=int, default=100, help="Optimizer steps of a fine-tune.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time, on one thread each.")
    parser.add_argument("--pilot", action="store_true", help="Compare learning rates, with other pictures and seed.")
    parser.add_argument("--world", choices=("full", "tiny"), default="full", help="tiny is for trying the command out.")
    args = parser.parse_args()
    out, began = args.out.resolve(), time.monotonic()
    write_data(out, tiny=args.world == "tiny")
    how = (args.steps, args.tune_steps, args.jobs)
    text = pilot(out, args.domains, *how) if args.pilot else experiment(out, args.domains, args.seeds, *how)
    (out / ("pilot.md" if args.pilot else "table.md")).write_text(text.lstrip() + "\n", encoding="utf-8")
    print(f"{text}\n\n{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
