"""Facts of samples summed up: what a data set holds, what is wrong with it, and what comes more than once."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from siglip2.inspection.collect import Facts, Picture, Text
from siglip2.inspection.duplicates import (
    Duplicates,
    duplicates,
    groups_of,
    merged,
    near_looks,
    near_texts,
)
from siglip2.inspection.groups import GroupReport
from siglip2.inspection.language import normalised, script
from siglip2.inspection.spread import Spread, spread

FORMAT = 1  # of the JSON; a key that changes its meaning raises it
EXAMPLES = 10
RATIOS = tuple(2 ** (step / 4) for step in range(-9, 10))  # from about 1:5 to 5:1
AREAS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
Stage = Callable[[str, int | None], Callable[[int], None]]


@dataclass(frozen=True)
class FieldCount:
    """How many samples have a field.

    Args:
        name: of the field.
        present: samples that have it, usable or not.
        share: of the samples that could be read at all.
        unusable: samples whose field is there, or should be, and cannot be used.
    """

    name: str
    present: int
    share: float
    unusable: int


@dataclass(frozen=True)
class Reason:
    """Something that went wrong, without its particulars.

    Args:
        field: what it concerns; `sample` for a whole sample.
        kind: what is wrong.
        count: how often.
        examples: the first few: where, key and the whole reason.
    """

    field: str
    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class LanguageRow:
    """Captions under one language code.

    Args:
        language: the code, "" for captions without one.
        captions: how many.
        share: of all captions.
        scripts: script -> captions whose letters are mostly of it.
        median_characters: of a caption.
        median_tokens: NaN without a tokenizer.
        cut: share that does not fit into the text length; NaN without a tokenizer.
    """

    language: str
    captions: int
    share: float
    scripts: Mapping[str, int]
    median_characters: float
    median_tokens: float
    cut: float


@dataclass(frozen=True)
class Captions:
    """All captions.

    Args:
        count: how many.
        per_sample: captions of each sample that could be read.
        characters: lengths in Unicode code points.
        words: lengths in words, as spaces part them; of scripts without spaces not meaningful.
        tokens: lengths in ids without BOS and EOS; None without a tokenizer.
        length: ids of the text tower, EOS included.
        cut: share of captions that do not fit, NaN without a tokenizer.
        languages: by code, the most frequent first.
        exact: captions equal to the letter.
        normalised: equal but for capitals, punctuation and spaces.
        near: nearly equal, see `duplicates.near_texts`.
    """

    count: int
    per_sample: Spread
    characters: Spread
    words: Spread
    tokens: Spread | None
    length: int
    cut: float
    languages: tuple[LanguageRow, ...]
    exact: Duplicates
    normalised: Duplicates
    near: Duplicates


@dataclass(frozen=True)
class Pictures:
    """All pictures that could be read.

    Args:
        count: how many.
        decoded: whether they were decoded; if not, damage behind the header was not seen.
        formats: file format -> pictures.
        width: pixels, upright.
        height: pixels, upright.
        ratio: width over height.
        short_side: the smaller of width and height.
        num_bytes: size of the files.
        exact: files equal to the byte.
        near: pictures that look the same, see `duplicates.near_looks`; None if they were not decoded.
    """

    count: int
    decoded: bool
    formats: Mapping[str, int]
    width: Spread
    height: Spread
    ratio: Spread
    short_side: Spread
    num_bytes: Spread
    exact: Duplicates
    near: Duplicates | None


@dataclass(frozen=True)
class Boxes:
    """All usable boxes.

    Args:
        count: how many.
        per_image: boxes of each sample that has the field.
        area: share of the image.
        ratio: width over height, of the box in shares of the image.
    """

    count: int
    per_image: Spread
    area: Spread
    ratio: Spread


@dataclass(frozen=True)
class Inspection:
    """Everything that is known of a data set.

    Args:
        data: what was opened -> samples in it.
        samples: samples read.
        unusable: of these, how many have a fault.
        fields: by name.
        reasons: what cannot be used, the most frequent first.
        notes: parts of samples that cannot be used, likewise.
        captions: all captions.
        pictures: all pictures.
        boxes: all boxes; None if no sample has regions.
        groups: fractal statistics of groups of captions; None if they were not asked for.
        warnings: what was asked for and is in no sample.
    """

    data: Mapping[str, int]
    samples: int
    unusable: int
    fields: tuple[FieldCount, ...]
    reasons: tuple[Reason, ...]
    notes: tuple[Reason, ...]
    captions: Captions
    pictures: Pictures
    boxes: Boxes | None
    groups: GroupReport | None
    warnings: tuple[str, ...] = ()


def summarise(
    facts: Sequence[Facts],
    *,
    data: Mapping[str, int],
    fields: Sequence[str],
    length: int = 64,
    room: int = 63,
    decoded: bool = True,
    groups: GroupReport | None = None,
    asked: Mapping[str, str] | None = None,
    group_by: str | None = None,
    stage: Stage | None = None,
) -> Inspection:
    """Sums up what was read.

    Args:
        facts: one for each sample.
        data: what was opened -> samples in it.
        fields: names of the fields that were asked for.
        length: ids of the text tower.
        room: ids that a caption has of these.
        decoded: whether pictures were decoded.
        groups: fractal statistics, if they were made.
        asked: field -> where it was said to be, of those that somebody expects to be there.
        group_by: where the value was said to be that captions are grouped by; None if it is none of a sample.
        stage: called with a description and a total, returns what is called on progress.
    """
    stage = stage or (lambda text, total: lambda done: None)
    readable = [one for one in facts if not any(fault.field == "sample" for fault in one.faults)]
    has_boxes = any("regions" in one.present for one in facts)
    return Inspection(
        data=data,
        samples=len(facts),
        unusable=sum(bool(one.faults) for one in facts),
        fields=tuple(_field(name, facts, len(readable)) for name in fields),
        reasons=_reasons((fault.field, fault.reason, one) for one in facts for fault in one.faults),
        notes=_reasons(("notes", note, one) for one in facts for note in one.notes),
        captions=_captions(facts, readable, length, room, stage),
        pictures=_pictures(facts, decoded, stage),
        boxes=_boxes(facts) if has_boxes else None,
        groups=groups,
        warnings=_warnings(facts, asked or {}, group_by),
    )


def _warnings(facts: Sequence[Facts], asked: Mapping[str, str], group_by: str | None) -> tuple[str, ...]:
    """What was asked for by name and is in no sample that was read."""
    seen = {name for one in facts for name in one.present} | {fault.field for one in facts for fault in one.faults}
    none = f"none of the {len(facts):,} samples read has"
    missing = [f"{none} the field {name}={spec}: is it right?" for name, spec in asked.items() if name not in seen]
    if group_by is not None and not any(one.group for one in facts):
        missing.append(f"{none} a text or a number under {group_by} to group by: is it right?")
    return tuple(missing)


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Returns the inspection as plain values: keys as the dataclasses have them, `format` first, null for NaN."""
    plain: dict[str, Any] = _plain({"format": FORMAT} | asdict(inspection))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _field(name: str, facts: Sequence[Facts], readable: int) -> FieldCount:
    present = sum(name in one.present for one in facts)
    unusable = sum(any(fault.field == name for fault in one.faults) for one in facts)
    return FieldCount(name, present, present / readable if readable else 0.0, unusable)


def _reasons(found: Iterable[tuple[str, str, Facts]]) -> tuple[Reason, ...]:
    """Faults by kind: the particulars follow a colon, as everywhere in the loader."""
    lines: dict[tuple[str, str], list[str]] = {}
    for field, reason, one in found:
        lines.setdefault((field, reason.split(":")[0]), []).append(f"{one.where}: {one.key}: {reason}")
    ordered = sorted(lines.items(), key=lambda item: -len(item[1]))
    return tuple(Reason(field, kind, len(some), tuple(some[:EXAMPLES])) for (field, kind), some in ordered)


def _captions(facts: Sequence[Facts], readable: Sequence[Facts], length: int, room: int, stage: Stage) -> Captions:
    texts = [text for one in facts for text in one.texts]
    tokens = [text.tokens for text in texts if text.tokens is not None]
    names = [one.key for one in facts]
    exact = groups_of((text.text, number) for number, one in enumerate(facts) for text in one.texts)
    plain = {text: normalised(text) for text in exact}
    folded = merged(exact, plain)
    leaders = near_texts(list(folded), progress=stage("comparing captions", len(folded)))
    near = merged(folded, leaders)
    spelled = _first_spellings(plain)
    alike: dict[str, list[str]] = {}
    for text, leader in leaders.items():
        alike.setdefault(leader, []).append(spelled[text][0])
    return Captions(
        count=len(texts),
        per_sample=spread([len(one.texts) for one in readable]),
        characters=spread([len(text.text) for text in texts]),
        words=spread([len(text.text.split()) for text in texts]),
        tokens=spread(tokens) if tokens else None,
        length=length,
        cut=_share(tokens, room),
        languages=_languages(texts, room),
        exact=duplicates(exact, names, {text: [text] for text in exact}),
        normalised=duplicates(folded, names, spelled),
        near=duplicates(near, names, alike),
    )


def _first_spellings(plain: Mapping[str, str]) -> dict[str, list[str]]:
    """Normalised text -> how it is spelled, in order."""
    found: dict[str, list[str]] = {}
    for text, folded in plain.items():
        found.setdefault(folded, []).append(text)
    return found


def _languages(texts: Sequence[Text], room: int) -> tuple[LanguageRow, ...]:
    by_code: dict[str, list[Text]] = {}
    for text in texts:
        by_code.setdefault(text.language, []).append(text)
    rows = []
    for code, members in sorted(by_code.items(), key=lambda item: (-len(item[1]), item[0])):
        tokens = [text.tokens for text in members if text.tokens is not None]
        scripts = Counter(script(text.text) for text in members)
        rows.append(
            LanguageRow(
                language=code,
                captions=len(members),
                share=len(members) / len(texts),
                scripts=dict(scripts.most_common()),
                median_characters=spread([len(text.text) for text in members]).median,
                median_tokens=spread(tokens).median,
                cut=_share(tokens, room),
            )
        )
    return tuple(rows)


def _share(tokens: Sequence[int], room: int) -> float:
    return sum(count > room for count in tokens) / len(tokens) if tokens else math.nan


def _pictures(facts: Sequence[Facts], decoded: bool, stage: Stage) -> Pictures:
    found: dict[int, Picture] = {i: one.picture for i, one in enumerate(facts) if one.picture is not None}
    pictures, names = list(found.values()), [one.key for one in facts]
    exact = groups_of((picture.digest, i) for i, picture in found.items())
    near = None
    if decoded:
        looks = {picture.digest: picture.look for picture in pictures if picture.look is not None}
        near = duplicates(merged(exact, near_looks(looks, progress=stage("comparing pictures", len(looks)))), names)
    return Pictures(
        count=len(pictures),
        decoded=decoded,
        formats=dict(Counter(picture.format for picture in pictures).most_common()),
        width=spread([picture.width for picture in pictures]),
        height=spread([picture.height for picture in pictures]),
        ratio=spread([picture.width / picture.height for picture in pictures], edges=RATIOS),
        short_side=spread([min(picture.width, picture.height) for picture in pictures]),
        num_bytes=spread([picture.num_bytes for picture in pictures]),
        exact=duplicates(exact, names),
        near=near,
    )


def _boxes(facts: Sequence[Facts]) -> Boxes:
    having = [one for one in facts if "regions" in one.present]
    sizes = [size for one in having for size in one.boxes]
    return Boxes(
        count=len(sizes),
        per_image=spread([len(one.boxes) for one in having]),
        area=spread([width * height for width, height in sizes], edges=AREAS),
        ratio=spread([width / height for width, height in sizes], edges=RATIOS),
    )
