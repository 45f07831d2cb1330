"""Captions in groups, scored by one language model, each group measured and held against those written by people."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from siglip2.inspection.collect import Facts, Text
from siglip2.inspection.fractal import (
    CAPTIONS,
    EXPONENTS,
    MAX_CAPTIONS,
    MIN_CAPTIONS,
    Comparison,
    Floats,
    GroupStatistics,
    compare,
    group_statistics,
    measure,
)
from siglip2.inspection.language import normalised, script
from siglip2.inspection.scoring import NgramScorer, Scorer, Token, words

NOBODY = "(none)"
BATCH = 256
GROUPINGS: Mapping[str, Callable[[Facts, Text], str]] = {
    "field": lambda facts, text: text.field,
    "language": lambda facts, text: text.language,
    "script": lambda facts, text: script(text.text),
    "source": lambda facts, text: facts.source,
}


@dataclass(frozen=True)
class GroupReport:
    """The fractal statistics of all groups.

    Args:
        scorer: the language model.
        group_by: what makes a group.
        groups: each group as it is.
        comparisons: each group beside each reference.
        flagged: groups of which one exponent lies outside of every reference that they could be compared with. Mean
            bits flag nothing: they tell topics and registers apart, whoever wrote.
    """

    scorer: str
    group_by: str
    groups: tuple[GroupStatistics, ...]
    comparisons: tuple[Comparison, ...]
    flagged: tuple[str, ...]


def grouped(facts: Iterable[Facts], by: str) -> dict[str, list[str]]:
    """Returns group -> its captions, copies left out, in an order that depends on nothing but the texts.

    Args:
        facts: what was read.
        by: a key of `GROUPINGS`; anything else takes the value that was read with the sample.
    """
    label = GROUPINGS.get(by, lambda facts, text: facts.group)
    found: dict[str, dict[str, str]] = {}
    for one in facts:
        for text in one.texts:
            found.setdefault(label(one, text) or NOBODY, {}).setdefault(normalised(text.text), text.text)
    by_digest = {name: sorted((_digest(key), text) for key, text in texts.items()) for name, texts in found.items()}
    return {name: [text for _, text in by_digest[name]] for name in sorted(by_digest)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def report_groups(
    groups: Mapping[str, Sequence[str]],
    *,
    by: str,
    human: Sequence[str] = (),
    scorer: Scorer | None = None,
    tokenize: Callable[[str], Sequence[Token]] = words,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> GroupReport:
    """Scores and measures all groups, and compares them with those written by people.

    Args:
        groups: group -> its captions, as `grouped` returns them.
        by: what makes a group, for the report.
        human: groups that are the reference; none compares nothing.
        scorer: a language model; None fits n-grams on one half of the captions and scores the other.
        tokenize: tokens of those n-grams.
        seed: of the bootstrap.
        progress: called with the captions scored since the last call.

    Raises:
        ValueError: if there is no such reference group.
    """
    check_references(groups, human)
    scored: Mapping[str, Sequence[str]] = {name: texts[:MAX_CAPTIONS] for name, texts in groups.items()}
    if scorer is None:
        halves = {name: _halves(texts) for name, texts in groups.items()}
        scored = {name: halves[name][1] for name in groups}
        scorer = _fit({name: halves[name][0] for name in groups}, scored, tokenize)
    measured = {name: measure(_score(scorer, texts, progress)) for name, texts in scored.items()}
    comparisons = tuple(
        compare(name, reference, measured[name], measured[reference], seed=seed)
        for name in groups
        for reference in human
        if name not in human
    )
    rows = tuple(group_statistics(name, len(groups[name]), measured[name], seed=seed) for name in groups)
    return GroupReport(scorer.name, by, rows, comparisons, _flagged(comparisons))


def check_references(groups: Mapping[str, Sequence[str]], human: Sequence[str]) -> None:
    """ValueError if a reference is no group."""
    for name in human:
        if name not in groups:
            raise ValueError(f"no group {name!r} to compare with; found {', '.join(map(repr, groups)) or 'none'}")


def _halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is fitted on and what is scored, by the text alone: in all groups one text falls on one side."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        sides[_digest("half:" + normalised(text))[0] & 1].append(text)
    return sides[0][:MAX_CAPTIONS], sides[1][:MAX_CAPTIONS]


def _fit(
    fitted: Mapping[str, Sequence[str]],
    scored: Mapping[str, Sequence[str]],
    tokenize: Callable[[str], Sequence[Token]],
) -> NgramScorer:
    """n-grams of as many captions of every group that is large enough, so that none is at home and others abroad."""

    def judged(texts: Sequence[str]) -> bool:
        return sum(bool(CAPTIONS.cut(len(tokenize(text)))) for text in texts) >= MIN_CAPTIONS

    names = [name for name in fitted if judged(scored[name])]
    num = min((len(fitted[name]) for name in names), default=0)
    return NgramScorer([text for name in names for text in fitted[name][:num]], tokenize=tokenize)


def _score(scorer: Scorer, texts: Sequence[str], progress: Callable[[int], None] | None) -> list[Floats]:
    bits: list[Floats] = []
    for begin in range(0, len(texts), BATCH):
        batch = texts[begin : begin + BATCH]
        bits += scorer.bits(batch)
        if progress is not None:
            progress(len(batch))
    return bits


def _flagged(comparisons: Iterable[Comparison]) -> tuple[str, ...]:
    """Groups with an exponent outside of every reference that they could be compared with."""
    common: dict[str, set[str]] = {}
    for one in comparisons:
        if not one.reason:
            outside = set(one.outside) & set(EXPONENTS)
            common[one.group] = common[one.group] & outside if one.group in common else outside
    return tuple(name for name, statistics in common.items() if statistics)
