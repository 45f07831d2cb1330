"""Write an emoji world as WebDataset tar shards: the same options give the same bytes.

OUT/train/000000.tar ..      singles and scenes mixed, planted noise if asked for
OUT/val-single/  val-scene/  new pictures of the same emoji, never any noise
OUT/unseen/                  singles of emoji that never occur in training
OUT/classes.json             {"languages", "classes": [{"id", "names", "group"}]} in label order
OUT/unseen-classes.json      the same for the held-out emoji
OUT/README.md  world.json    what is what; options and counts, written last
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from siglip2.emoji_world.catalogue import Emoji, select
from siglip2.emoji_world.plan import TrainPlan, WorldOptions, plan_train
from siglip2.emoji_world.scene import Scene, SceneOptions, compose
from siglip2.emoji_world.shards import describe, encode, write_shards

FORMAT = 1  # raise it when the same options come to mean other bytes
# options that worlds of this format did not always name, and what they were then
ADDED = {"scene_aspect": 2.0, "single_aspect": 1.0}
SPLITS = ("train", "val-single", "val-scene", "unseen")
README = """# An emoji world

Pictures composed from Noto Color Emoji, with names from Unicode CLDR, made by `siglip2 data emoji-world`.
The options and the numbers of samples are in `world.json`.

| path | what |
|---|---|
| `train/*.tar` | singles (one large emoji) and scenes (one to five emoji), mixed; how wide or tall is in `world.json` |
| `val-single/`, `val-scene/` | new pictures of the same emoji, without planted noise |
| `unseen/` | singles of emoji that never occur in training |
| `classes.json`, `unseen-classes.json` | the emoji in label order, with names by language |

A sample is `KEY.jpg`, `KEY.json` and `KEY.mask.png` (uint8; 0 background, k the k-th region). In the JSON:

- `kind` ("single" or "scene"), `captions` by language, `emoji` (ids), `width` and `height` in pixels;
- `label`, an index into the classes (singles only);
- `regions`, nearest first, each with `box` ([xmin, ymin, xmax, ymax] of the visible part, shares of width and height),
  `captions`, `label`, `emoji`, distance `z` (the unturned long side is 0.52 / z times the smaller of
  sqrt(width * height) and 1.45 short sides) and `visible`, the share of its pixels that nothing nearer covers;
- `relation`, what the captions claim about two emoji: "left", "above" or "";
- `attributes.background`, "warm" or "cool"; with a bias it depends on the group of the nearest emoji, in training only;
- `wrong_caption`: true where noise was planted, with `caption_of`, the sample that the captions belong to (label and
  regions stay true, `relation` is emptied);
- `duplicate_of`: the earlier sample that this one repeats.

## Licences

Pictures: Noto Color Emoji, copyright 2013-2017 Google Inc., SIL Open Font License 1.1. Names: Unicode CLDR, copyright
1991-2022 Unicode, Inc., Unicode-DFS-2016. The texts are in `siglip2/emoji_world/assets/LICENSE.*.txt`.
"""

Progress = Callable[[int, int], None]
Sample = tuple[str, dict[str, bytes]]


def write_emoji_world(
    out: str | Path,
    *,
    scenes: int = WorldOptions.scenes,
    singles: int = WorldOptions.singles,
    val: int = WorldOptions.val,
    seed: int = WorldOptions.seed,
    num_emoji: int = WorldOptions.num_emoji,
    unseen: int = WorldOptions.unseen,
    languages: Sequence[str] = WorldOptions.languages,
    size: int = WorldOptions.size,
    samples_per_shard: int = WorldOptions.samples_per_shard,
    wrong_captions: float = WorldOptions.wrong_captions,
    duplicates: float = WorldOptions.duplicates,
    bias: float = WorldOptions.bias,
    scene_aspect: float = WorldOptions.scene_aspect,
    single_aspect: float = WorldOptions.single_aspect,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Write a world, or find that it is there already. The options are those of `WorldOptions`; see there.

    Args:
        out: folder to write to; new, empty, or holding a world.
        overwrite: replace another or an unfinished world in `out`. Other files in there stay.
        progress: called with (samples done, samples in all) after each sample.

    Returns:
        What `world.json` holds: "format", "options", "counts" (samples by split), "wrong_captions", "duplicates",
        "bytes" of all samples; and "up_to_date", true if nothing had to be written.

    Raises:
        ValueError: if the options cannot be met, or `out` holds something else and `overwrite` is false.
    """
    options = WorldOptions(
        scenes=scenes,
        singles=singles,
        val=val,
        seed=seed,
        num_emoji=num_emoji,
        unseen=unseen,
        languages=tuple(languages),
        size=size,
        samples_per_shard=samples_per_shard,
        wrong_captions=wrong_captions,
        duplicates=duplicates,
        bias=bias,
        scene_aspect=scene_aspect,
        single_aspect=single_aspect,
    )
    return write_world(Path(out), options, overwrite=overwrite, progress=progress)


def write_world(out: Path, options: WorldOptions, *, overwrite: bool = False, progress: Progress | None = None) -> dict:
    """`write_emoji_world` with the options in one piece; arguments, result and errors are the same."""
    trained, unseen = select(options.num_emoji, num_unseen=options.unseen, languages=options.languages)
    plan = plan_train(options)
    if summary := _existing(out, options, overwrite):
        return summary | {"up_to_date": True}
    _clear(out)
    for name, classes in (("classes", trained), ("unseen-classes", unseen)):
        (out / f"{name}.json").write_text(_class_table(classes, options.languages), encoding="utf-8")
    (out / "README.md").write_text(README, encoding="utf-8")
    counts = {"train": options.train, "val-single": options.val, "val-scene": options.val}
    counts["unseen"] = options.val if unseen else 0
    done, size = 0, 0
    for split, count in counts.items():
        pool = unseen if split == "unseen" else trained
        samples = _train(pool, plan) if split == "train" else _held_out(pool, split, count, options)
        for written in write_shards(out / split, samples, options.samples_per_shard):
            done, size = done + 1, size + written
            if progress:
                progress(done, sum(counts.values()))
    summary = {"format": FORMAT, "options": _plain(options), "counts": counts}
    summary |= {"wrong_captions": len(plan.wrong), "duplicates": len(plan.duplicates), "bytes": size}
    (out / "world.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary | {"up_to_date": False}


def _plain(options: WorldOptions) -> dict:
    return asdict(options) | {"languages": list(options.languages)}


def _existing(out: Path, options: WorldOptions, overwrite: bool) -> dict | None:
    """The summary of a finished world with the same options, or None if there is room for a new one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder to write shards into, so choose another")
    world = out / "world.json"
    found = json.loads(world.read_text(encoding="utf-8")) if world.exists() else None
    if found and found.get("format") == FORMAT and ADDED | found.get("options", {}) == _plain(options):
        return found
    if overwrite or not out.exists() or not any(out.iterdir()):
        return None
    what = "files but no finished world"
    if found:
        old, new = ADDED | found.get("options", {}), _plain(options)
        differing = [f"{name}={old.get(name)} (asked for: {new[name]})" for name in new if old.get(name) != new[name]]
        what = f"a world with {', '.join(differing) or 'an older format'}"
    raise ValueError(f"{out} holds {what}; choose another folder, or pass overwrite (--overwrite) to replace it")


def _clear(out: Path) -> None:
    """Remove what an earlier run wrote, nothing else; world.json first, so that half a world never looks finished."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("world.json", "classes.json", "unseen-classes.json", "README.md"):
        (out / name).unlink(missing_ok=True)
    for split in SPLITS:
        for shard in (out / split).glob("[0-9]*.tar"):
            shard.unlink()
        if (out / split).is_dir() and not any((out / split).iterdir()):
            (out / split).rmdir()


def _class_table(classes: Sequence[Emoji], languages: Sequence[str]) -> str:
    rows = [
        {"id": emoji.id, "names": {language: emoji.names[language] for language in languages}, "group": emoji.group}
        for emoji in classes
    ]
    return json.dumps({"languages": list(languages), "classes": rows}, ensure_ascii=False, indent=1) + "\n"


def _labels(pool: Sequence[Emoji]) -> dict[str, int]:
    return {emoji.id: label for label, emoji in enumerate(pool)}


def _key(split: str, position: int) -> str:
    return f"{split}-{position:07d}"


def _held_out(pool: Sequence[Emoji], split: str, count: int, options: WorldOptions) -> Iterator[Sample]:
    """Samples of a split for evaluation, without planted noise or bias."""
    kind = "scene" if split == "val-scene" else "single"
    look, labels = _look(options, bias=0.0), _labels(pool)
    for index in range(count):
        scene = compose(pool, index, kind=kind, seed=options.seed, split=split, options=look)
        yield _key(split, index), encode(scene, describe(scene, labels))


def _train(pool: Sequence[Emoji], plan: TrainPlan) -> Iterator[Sample]:
    """Training samples in order, with the planned noise."""
    labels = _labels(pool)
    for position in range(plan.options.train):
        scene = _compose(pool, plan, position)
        record = describe(scene, labels)
        if position in plan.duplicates:
            record["duplicate_of"] = _key("train", plan.duplicates[position])
        if position in plan.wrong:
            donor, captions = _other_captions(pool, plan, position, scene)
            record |= {"captions": captions, "relation": "", "wrong_caption": True, "caption_of": _key("train", donor)}
        yield _key("train", position), encode(scene, record)


def _compose(pool: Sequence[Emoji], plan: TrainPlan, position: int) -> Scene:
    kind, index = plan.draw(plan.duplicates.get(position, position))
    look = _look(plan.options, bias=plan.options.bias)
    return compose(pool, index, kind=kind, seed=plan.options.seed, split="train", options=look)


def _look(options: WorldOptions, *, bias: float) -> SceneOptions:
    return SceneOptions(options.languages, options.size, bias, options.scene_aspect, options.single_aspect)


def _other_captions(pool: Sequence[Emoji], plan: TrainPlan, position: int, scene: Scene) -> tuple[int, dict[str, str]]:
    """Captions, as they truly are, of another training sample that shows other emoji; and its position."""
    here = {region.emoji.id for region in scene.regions}
    for donor in plan.donors(position):
        other = _compose(pool, plan, donor)
        if here != {region.emoji.id for region in other.regions}:
            return donor, other.captions
    raise ValueError(
        f"training sample {position} found none with other emoji to take wrong captions from; make more samples or use"
        " more emoji, or set wrong_captions=0"
    )
