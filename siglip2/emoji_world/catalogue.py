"""The emoji catalogue: Noto Color Emoji pictures with the names and keywords of Unicode CLDR in 27 languages.

The assets are made by `scripts/build_emoji_world.py` and lie in `assets/`, beside the licence texts of their sources.
"""

import io
import json
import lzma
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

# How often a group is drawn while concepts are chosen: varied visible things first, faces sparingly. ours
_TURNS = (
    ("Animals & Nature", 4),
    ("Food & Drink", 4),
    ("Objects", 4),
    ("Travel & Places", 3),
    ("Activities", 3),
    ("Smileys & Emotion", 1),
)
_LAST_GROUPS = ("People & Body", "Symbols", "Flags")  # only when the others are used up, in this order
_LAST_SUBGROUPS = frozenset({"time", "geometric", "hotel", "cat-face"})  # many look or read alike


@dataclass(frozen=True)
class Emoji:
    """One concept: a picture with its names.

    Args:
        id: code points in lower-case hex, joined by "-", without U+FE0F; for example "1f600".
        group: Unicode group, for example "Animals & Nature".
        subgroup: Unicode subgroup, for example "animal-bird".
        names: CLDR short name by language code; nearly every emoji has one in every language.
        keywords: CLDR keywords by language code, possibly none.
    """

    id: str
    group: str
    subgroup: str
    names: dict[str, str]
    keywords: dict[str, tuple[str, ...]]


@cache
def load_catalogue() -> tuple[Emoji, ...]:
    """All emoji with a picture and an English name, in Unicode order (about 1850)."""
    table = json.loads(lzma.decompress(files(__package__).joinpath("assets", "names.json.xz").read_bytes()))
    return tuple(_emoji(table, row) for row in range(len(table["ids"])))


def _emoji(table: dict, row: int) -> Emoji:
    names = {language: column[row] for language, column in table["names"].items() if column[row]}
    keywords = {language: tuple(column[row]) for language, column in table["keywords"].items()}
    return Emoji(table["ids"][row], table["groups"][row], table["subgroups"][row], names, keywords)


@cache
def known_languages() -> tuple[str, ...]:
    """Codes of the languages that names exist in, English first."""
    return tuple(load_catalogue()[0].names)


@cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(files(__package__).joinpath("assets", "sprites.zip").read_bytes()))


@cache
def sprite(emoji_id: str) -> np.ndarray:
    """The picture of an emoji, cropped to what is painted; a read-only cached array.

    Args:
        emoji_id: `Emoji.id`.

    Returns:
        RGBA, uint8 [H, W, 4]; the long side is 80 pixels; not premultiplied.

    Raises:
        ValueError: if there is no such emoji.
    """
    try:
        data = _archive().read(f"{emoji_id}.webp")
    except KeyError:
        raise ValueError(
            f"no emoji with id {emoji_id!r}; expected hex code points such as '1f600', see load_catalogue()"
        ) from None
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    pixels.setflags(write=False)
    return pixels


def select(
    num_emoji: int, *, num_unseen: int = 0, languages: Sequence[str] = ("en",), seed: int = 0
) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...]]:
    """Choose well-mixed concepts: varied visible things first, and no two that share a name or a picture.

    Args:
        num_emoji: how many to train on.
        num_unseen: how many more to hold out, drawn from the same mixture.
        languages: every chosen emoji has a name in each of these, and no two chosen emoji share one.
        seed: shuffles within the groups. Another number is another choice of concepts.

    Returns:
        The trained and the held-out emoji, each in Unicode order, without overlap.

    Raises:
        ValueError: if a count is negative, a language is unknown or there are not as many usable emoji.
    """
    check_languages(languages)
    if num_emoji < 1 or num_unseen < 0:
        raise ValueError(f"found num_emoji={num_emoji}, num_unseen={num_unseen}; expected at least 1 and at least 0")
    usable = list(_distinct(_mixed(random.Random(seed)), languages))
    total = num_emoji + num_unseen
    if total > len(usable):
        raise ValueError(
            f"{num_emoji} + {num_unseen} emoji were asked for, but only {len(usable)} have a picture and a plain name"
            f" of their own in {', '.join(languages)}; ask for fewer emoji or fewer languages"
        )
    # one out of every equal stretch of the order of choice, so that both parts hold the same mixture
    rng = random.Random(seed)
    held_out = {rng.randrange(k * total // num_unseen, (k + 1) * total // num_unseen) for k in range(num_unseen)}
    order = {emoji.id: position for position, emoji in enumerate(load_catalogue())}
    parts: tuple[list[Emoji], list[Emoji]] = ([], [])
    for position, emoji in enumerate(usable[:total]):
        parts[position in held_out].append(emoji)
    trained, unseen = (tuple(sorted(part, key=lambda emoji: order[emoji.id])) for part in parts)
    return trained, unseen


def check_languages(chosen: Sequence[str]) -> None:
    """Raise ValueError unless `chosen` is a list of distinct known language codes."""
    unknown = [language for language in chosen if language not in known_languages()]
    if not chosen or unknown or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"found languages {list(chosen)}; expected at least one, each once, out of {', '.join(known_languages())}"
        )


def _mixed(rng: random.Random) -> Iterator[Emoji]:
    """All emoji in the order of choice: weighted turns over the first groups, then the rest group by group."""
    early: dict[str, list[Emoji]] = {group: [] for group, _ in _TURNS}
    late: dict[str, list[Emoji]] = {group: [] for group in (*early, *_LAST_GROUPS)}
    for emoji in load_catalogue():
        queues = late if emoji.group in _LAST_GROUPS or emoji.subgroup in _LAST_SUBGROUPS else early
        queues[emoji.group].append(emoji)
    for queue in (*early.values(), *late.values()):
        rng.shuffle(queue)
    while any(early.values()):
        for group, turns in _TURNS:
            for _ in range(min(turns, len(early[group]))):
                yield early[group].pop()
    for queue in late.values():
        yield from queue


def _distinct(candidates: Iterator[Emoji], chosen: Sequence[str]) -> Iterator[Emoji]:
    """Drop candidates that lack a plain name, or share a name or the very same picture with an earlier one."""
    taken: set[tuple[str, object]] = set()
    for emoji in candidates:
        # a comma or colon ("kiss: man, man") would make a list of names ambiguous
        if any(re.search("[,،、:]", emoji.names.get(language, ",")) for language in chosen):
            continue
        keys: set[tuple[str, object]] = {(language, emoji.names[language].casefold()) for language in chosen}
        # "dog" and "dog face" are two pictures of one thing: keep whichever comes first
        keys.add(("thing", re.sub(r" (face|tilted left|tilted right)$", "", emoji.names["en"])))
        keys.add(("picture", _archive().getinfo(f"{emoji.id}.webp").CRC))
        if not keys & taken:
            taken |= keys
            yield emoji
