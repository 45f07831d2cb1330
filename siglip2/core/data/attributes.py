"""Questions about samples that are answered by yes or no, and the answers of a whole data set."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.data.source import Source

YES_OR_NO = {True: True, False: False, "1": True, "0": False, "true": True, "false": False}
TELL_EVERY = 256  # samples: a progress bar takes longer than one


@dataclass(frozen=True)
class Attribute:
    """A question about a sample that is answered by yes or no.

    Args:
        field: one of the usual fields (`caption`, `label`) or where the answer is stored, as `json.woman`.
        value: what to look for; None asks for the field itself, which is 0 or 1, false or true.
    """

    field: str
    value: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Attribute":
        """Reads `FIELD` or `FIELD=value`.

        Raises:
            ValueError: if the field or the value is empty.
        """
        name, has_value, value = text.partition("=")
        if not name.strip() or (has_value and not value.strip()):
            raise ValueError(f"cannot read {text!r}, expected FIELD or FIELD=value, as json.woman or caption=doctor")
        return cls(name.strip(), value.strip() if has_value else None)

    def __str__(self) -> str:
        return self.field if self.value is None else f"{self.field}={self.value}"

    def holds(self, sample: Sample) -> bool:
        """Whether the answer is yes; where the field is missing it is no.

        A value is looked for in texts as whole words, whatever their case, in all entries of a list or mapping.

        Raises:
            BadSample: if the sample cannot be read.
            ValueError: if no value is looked for and the field is neither 0 nor 1.
        """
        if not sample.has(self.field):
            return False
        found = sample.get(self.field)
        if self.value is not None:
            return _contains(found, self.value)
        answer = YES_OR_NO.get(found.strip().lower() if isinstance(found, str) else found) if _plain(found) else None
        if answer is None:
            raise ValueError(
                f"{sample.place}: sample {sample.key!r}: {self.field} is {found!r:.60}, expected 0 or 1, false or "
                f"true; to look for a value in it, say {self.field}=value"
            )
        return answer


def _plain(found: Any) -> bool:
    return isinstance(found, bool | int | float | str)


def _contains(found: Any, value: str) -> bool:
    if isinstance(found, Mapping):
        return any(_contains(entry, value) for entry in found.values())
    if isinstance(found, list):
        return any(_contains(entry, value) for entry in found)
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(found), re.IGNORECASE) is not None


def fields_for(attributes: Sequence[Attribute], *, pictures: bool) -> Fields:
    """Returns the fields that have to be read to answer the questions.

    Args:
        attributes: the questions.
        pictures: whether to read pictures; shards can be read without, tables and folders are made of them.
    """
    usual = Fields()
    extra = {a.field: a.field for a in attributes if a.field not in usual.names()}
    return replace(usual, image=usual.image if pictures else "json.image", extra=extra)


def read_attributes(
    source: Source, attributes: Sequence[Attribute], progress: Callable[[int], None] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Asks every sample every question.

    Args:
        source: with the fields of `fields_for`.
        attributes: the questions.
        progress: called with the number of samples done, now and then and at the end.

    Returns:
        The answers, bool [N, A], and which samples could be read, bool [N].

    Raises:
        ValueError: if a field is in no sample, or holds something else than 0 and 1.
    """
    answers = np.zeros((len(source), len(attributes)), dtype=bool)
    readable, found = np.zeros(len(source), dtype=bool), dict.fromkeys((a.field for a in attributes), False)
    for i in range(len(source)):
        try:
            sample = source.read(i)
            answers[i] = [attribute.holds(sample) for attribute in attributes]
            readable[i] = True
            if not all(found.values()):
                found = {field: known or sample.has(field) for field, known in found.items()}
        except BadSample:
            answers[i] = False
        if progress is not None and ((i + 1) % TELL_EVERY == 0 or i + 1 == len(source)):
            progress(i + 1)
    if missing := [field for field, known in found.items() if not known]:
        raise ValueError(f"no sample of {source.name} has {missing[0]}: nothing can be balanced by it")
    return answers, readable
