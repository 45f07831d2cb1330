"""What a world is made of: its options, and which training sample is what, planted noise included."""

from dataclasses import dataclass

import numpy as np

from siglip2.emoji_world.catalogue import check_languages

# English first, then scripts and families that differ. ours
DEFAULT_LANGUAGES = ("en", "de", "es", "fr", "ru", "ar", "hi", "zh", "ja", "sw")
SHORTEST = 16  # pixels of a short side at least: the furthest emoji of a scene is then 5 pixels large. ours


@dataclass(frozen=True)
class WorldOptions:
    """Everything that the bytes of a world depend on.

    Args:
        scenes: training pictures of one to five emoji.
        singles: training pictures of one large emoji.
        val: pictures in each of the splits val-single, val-scene and unseen.
        seed: seed of all pictures and of the planted noise; which emoji are chosen does not depend on it.
        num_emoji: emoji that occur in training, the classes.
        unseen: further emoji that never occur in training.
        languages: languages of captions and class names, comma-separated on the command line.
        size: long side of the pictures in pixels.
        samples_per_shard: samples in one tar file.
        wrong_captions: share of the training samples that carry the captions of another one, in [0, 1].
        duplicates: share of the training samples that repeat an earlier one, in [0, 1].
        bias: planted association of warm or cool backgrounds with groups of emoji in training, in [0, 1].
        scene_aspect: pictures of several emoji are wide or tall: the largest ratio of the long to the short side,
            log-uniform from 1. Emoji keep to the short side, so raise the size with it.
        single_aspect: the same for pictures of one large emoji; 1 is a square.
    """

    scenes: int = 8000
    singles: int = 8000
    val: int = 1000
    seed: int = 0
    num_emoji: int = 256
    unseen: int = 32
    languages: tuple[str, ...] = DEFAULT_LANGUAGES
    size: int = 96
    samples_per_shard: int = 1000
    wrong_captions: float = 0.0
    duplicates: float = 0.0
    bias: float = 0.0
    scene_aspect: float = 2.0
    single_aspect: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the option, its value and the expected range."""
        check_languages(self.languages)
        least = {"scenes": 0, "singles": 0, "val": 0, "seed": 0, "num_emoji": 1, "unseen": 0, "samples_per_shard": 1}
        for name, low in least.items():
            value = getattr(self, name)
            _check(name, value, isinstance(value, int) and value >= low, f"an integer of at least {low}")
        _check("size", self.size, isinstance(self.size, int) and 32 <= self.size <= 512, "32 to 512 pixels")
        for name in ("wrong_captions", "duplicates", "bias"):
            value = getattr(self, name)
            _check(name, value, 0 <= value <= 1, "a share in [0, 1]")  # false for nan, too
        for name in ("scene_aspect", "single_aspect"):
            value, most = getattr(self, name), self.size / SHORTEST
            _check(name, value, 1 <= value <= most, f"1 to {most:g}, a short side of {SHORTEST} pixels or more")
        if self.wrong_captions + self.duplicates > 1:
            raise ValueError(
                f"wrong_captions={self.wrong_captions} and duplicates={self.duplicates} add up to more than 1; a sample"
                " is only ever one of the two, so lower either"
            )
        if self.train < 1:
            raise ValueError("found scenes=0 and singles=0; expected at least one training sample, so raise either")

    @property
    def train(self) -> int:
        """Number of training samples."""
        return self.scenes + self.singles


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"found {name}={value}; expected {expected}")


@dataclass(frozen=True)
class TrainPlan:
    """Which training sample is what; singles and scenes are mixed evenly.

    Args:
        options: of the world.
        wrong: positions whose captions come from another sample.
        duplicates: position of a copy to the earlier position that it copies, which has no noise itself.
    """

    options: WorldOptions
    wrong: frozenset[int]
    duplicates: dict[int, int]

    def draw(self, position: int) -> tuple[str, int]:
        """Kind of the sample at a position, and its index among the samples of that kind."""
        scenes, total = self.options.scenes, self.options.train
        before, after = position * scenes // total, (position + 1) * scenes // total
        return ("scene", before) if after > before else ("single", position - before)

    def donors(self, position: int) -> list[int]:
        """Positions to take wrong captions from, in the order to try them: a few others of the same kind first."""
        rng = np.random.default_rng((self.options.seed, 2, position))
        others = [int(other) for other in rng.integers(0, self.options.train, 64) if other != position]
        return sorted(others, key=lambda other: self.draw(other)[0] != self.draw(position)[0])


def plan_train(options: WorldOptions) -> TrainPlan:
    """Choose the samples with wrong captions and the duplicates: exact shares, chosen at random from the seed.

    Raises:
        ValueError: if noise is asked for in a world with a single training sample or a single emoji.
    """
    num_wrong, num_copies = (round(share * options.train) for share in (options.wrong_captions, options.duplicates))
    if num_wrong and (options.train < 2 or options.num_emoji < 2):
        raise ValueError(
            f"wrong_captions={options.wrong_captions} needs another sample to take captions from; found {options.train}"
            f" samples of {options.num_emoji} emoji, expected at least two of each"
        )
    rng = np.random.default_rng((options.seed, 1))
    shuffled = rng.permutation(options.train)
    if num_copies:  # the first sample stays clean, so that every copy has something to copy
        shuffled = shuffled[shuffled != 0]
    copies, wrong = np.sort(shuffled[:num_copies]), shuffled[num_copies : num_copies + num_wrong]
    originals = np.setdiff1d(np.arange(options.train), shuffled[: num_copies + num_wrong])
    earlier = np.searchsorted(originals, copies)
    sources = originals[rng.integers(earlier)] if num_copies else copies
    return TrainPlan(options, frozenset(wrong.tolist()), dict(zip(copies.tolist(), sources.tolist(), strict=True)))
