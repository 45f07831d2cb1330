"""Where the picture, the caption and the other parts of a sample are found, whatever the dataset calls them.

A *record* is what was stored for one sample: `{"jpg": b"...", "txt": b"...", "json": b"..."}` out of a tar
shard, a row of a table, the files of one stem in a folder. A *field* is what training asks for by name.
`Fields` maps one to the other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GRAMMAR = (
    "alternatives separated by ';' or '|' (the first one present wins), each a file extension or a column, "
    "or json.a.b for a value inside the JSON file; for example 'txt|json.caption'"
)
TEXT_EXTENSIONS = frozenset({"txt", "text", "caption", "transcript", "cls", "csv", "tsv"})


class BadSample(Exception):
    """One sample that cannot be used: the loader counts it, logs it and takes another in its place.

    Args:
        where: the shard, table or folder it came from.
        key: its key there.
        reason: what is wrong, for a reader who has the file at hand.
    """

    def __init__(self, where: str, key: str, reason: str) -> None:
        super().__init__(where, key, reason)  # all three in args, so that it travels between processes
        self.where, self.key, self.reason = where, key, reason

    def __str__(self) -> str:
        return f"{self.where}: sample {self.key!r}: {self.reason}"


def alternatives(spec: str, name: str = "field") -> tuple[str, ...]:
    """The words of a field spec, in order of preference.

    Args:
        spec: for example `txt|json.caption`.
        name: what to call the field in an error.

    Raises:
        ValueError: if a word, or a step of a dotted word, is empty.
    """
    words = tuple(word.strip() for word in spec.replace("|", ";").split(";")) if isinstance(spec, str) else ()
    if not words or not all(step.strip() for word in words for step in word.split(".")):
        raise ValueError(f"field {name!r}: cannot read {spec!r}; expected {GRAMMAR}")
    return words


def is_json(member: str) -> bool:
    """Whether a member or column is JSON by its name: `json`, `meta.json`."""
    return member.rsplit(".", 1)[-1] == "json"


def resolve(spec: str, record: Mapping[str, Any], *, parsed: dict[str, Any] | None = None) -> Any:
    """The first alternative of `spec` that the record has, decoded; None if it has none of them.

    Text and JSON members come back as `str` and as the parsed value, `cls` as `int` where it is one, all else
    as stored.

    Args:
        spec: field spec, see `Fields`.
        record: extension or column -> stored value.
        parsed: the record's JSON members as parsed so far; filled here, so that each is parsed once.

    Raises:
        ValueError: if the spec is malformed, or a member that had to be read is not UTF-8 or not JSON.
    """
    parsed = {} if parsed is None else parsed
    for word in alternatives(spec):
        value = _look_up(word, record, parsed)
        if value is not None:
            return value
    return None


def _look_up(word: str, record: Mapping[str, Any], parsed: dict[str, Any]) -> Any:
    if word in record:
        return _decode(word, record, parsed)
    steps = word.split(".")
    # the longest prefix first, since an extension may hold dots itself: `meta.json.text`
    for cut in range(len(steps) - 1, 0, -1):
        member = ".".join(steps[:cut])
        if member in record and steps[cut - 1] == "json":
            return _dig(_decode(member, record, parsed), steps[cut:])
    return None


def _dig(value: Any, steps: list[str]) -> Any:
    for step in steps:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _decode(member: str, record: Mapping[str, Any], parsed: dict[str, Any]) -> Any:
    if member in parsed:
        return parsed[member]
    value, kind = record[member], member.rsplit(".", 1)[-1]
    if kind == "json" and isinstance(value, bytes | str):
        try:
            parsed[member] = value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{member!r} is not JSON: {error}") from None
    elif kind in TEXT_EXTENSIONS and isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{member!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if kind == "cls" and isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return value


@dataclass(frozen=True)
class Fields:
    """Where each part of a sample is found: `;` or `|` between alternatives, `json.a.b` inside the JSON.

    Args:
        image: the encoded picture.
        caption: a text, a list of texts, or a mapping of language to either.
        label: class number or name.
        regions: boxes and their texts.
        extra: further fields, name -> spec in the same grammar.
        max_pixels: a picture with more pixels, width x height by its header, makes a sample unusable; null: 89478485,
            and at most twice that. It guards memory: decoding takes three bytes per pixel.

    Raises:
        ValueError: if a spec is malformed, an extra field repeats one of the names above, or max_pixels is below 1.
    """

    image: str = "jpg;jpeg;png;webp"
    caption: str = "txt|json.caption"
    label: str = "cls|json.label"
    regions: str = "json.regions"
    extra: dict[str, str] = field(default_factory=dict, hash=False)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        own = {f.name for f in dataclass_fields(self)}
        for name in self.names():
            alternatives(self.spec(name), name)
        if clash := sorted(own & set(self.extra)):
            raise ValueError(f"extra field {clash[0]!r} repeats a field's name; set data.fields.{clash[0]} itself")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(
                f"max_pixels is {self.max_pixels}, expected a number of pixels, or null for the usual limit"
            )

    def names(self) -> list[str]:
        """Every field, the extra ones last."""
        return ["image", "caption", "label", "regions", *self.extra]

    def words(self) -> frozenset[str]:
        """Every alternative of every field: apart from JSON, no other extension or column is ever asked for."""
        return frozenset(word for name in self.names() for word in alternatives(self.spec(name)))

    def spec(self, name: str) -> str:
        """The spec of one field.

        Raises:
            ValueError: if there is no such field.
        """
        if name not in self.names():
            raise ValueError(f"no field called {name!r}; known: {', '.join(self.names())}. Add it to data.fields.extra")
        spec: str = self.extra[name] if name in self.extra else getattr(self, name)
        return spec


@dataclass
class Sample:
    """One sample as stored, and its fields by name.

    Args:
        key: name of the sample within `where`.
        where: the shard, table or folder it came from.
        record: extension or column -> stored value.
        fields: what the record's entries mean.
        unread: names of what else is stored for it, left out of `record` because no field can be in it.
        source: which of several sources it came from; "" where there is only one.
        notes: what of it could not be used although the sample can: a bad box, a caption cut short.
    """

    key: str
    where: str
    record: dict[str, Any] = field(repr=False)
    fields: Fields = field(default_factory=Fields)
    unread: tuple[str, ...] = ()
    source: str = ""
    notes: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _parsed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _image: "Tensor | None" = field(default=None, init=False, repr=False, compare=False)

    def bad(self, reason: str) -> BadSample:
        """The exception that says this sample cannot be used, and why."""
        return BadSample(self.place, self.key, reason)

    @property
    def place(self) -> str:
        """`where` for a reader, with the name of the source if there are several: `english: 00000.tar`."""
        return f"{self.source}: {self.where}" if self.source else self.where

    def note(self, reason: str) -> None:
        """Remembers that a part of the sample could not be used, once per reason; it is counted and logged."""
        if reason not in self.notes:
            self.notes.append(reason)

    def has(self, name: str) -> bool:
        """Whether the field is there; BadSample if the file it would be in cannot be read."""
        return self._find(name) is not None

    def get(self, name: str) -> Any:
        """The value of a field, decoded as `resolve` says.

        Raises:
            BadSample: if it is missing or cannot be read.
            ValueError: if there is no such field.
        """
        value = self._find(name)
        if value is None:
            raise self.bad(f"no {name} under {self.fields.spec(name)!r}; it has {', '.join(self.available())}")
        return value

    def image(self) -> "Tensor":
        """The picture, uint8 RGB [3, H, W], decoded once and kept; BadSample if missing or broken."""
        if self._image is None:
            # torchvision: only where pictures are decoded
            from siglip2.core.data.image_io import MAX_PIXELS, decode_image

            value = self.get("image")
            if not isinstance(value, bytes | bytearray):
                raise self.bad(f"the image is {type(value).__name__}, expected the bytes of an image file")
            try:
                self._image = decode_image(bytes(value), max_pixels=self.fields.max_pixels or MAX_PIXELS)
            except ValueError as error:
                raise self.bad(str(error)) from None
        return self._image

    def captions(self, name: str = "caption") -> dict[str, list[str]]:
        """Language -> its texts, blank ones left out; texts without a language are under the key "".

        Args:
            name: the field that holds them: `caption`, or an extra field with other captions.

        Raises:
            BadSample: if there is no caption, or it is neither text, list nor mapping.
            ValueError: if there is no such field.
        """
        value = self.get(name)
        by_language = value if isinstance(value, Mapping) else {"": value}
        found: dict[str, list[str]] = {}
        for language, texts in by_language.items():
            texts = texts if isinstance(texts, list) else [texts]
            if not all(isinstance(text, str | None) for text in texts):
                raise self.bad(f"the {name} holds {texts!r:.80}, expected a text, a list of texts or language: text")
            if kept := [text.strip() for text in texts if text and text.strip()]:
                found[str(language)] = kept
        if not found:
            raise self.bad(f"the {name} is blank")
        return found

    def captions_if_any(self, name: str) -> dict[str, list[str]]:
        """As `captions`, but empty where the field is missing; one that cannot be read is noted, and empty."""
        try:
            return self.captions(name) if self.has(name) else {}
        except BadSample as error:
            self.note(error.reason)
            return {}

    def available(self) -> list[str]:
        """What is stored for the sample, keys inside JSON written as a spec would: `jpg`, `json.caption`."""
        names = [*self.record, *self.unread]
        for member in filter(is_json, self.record):
            try:
                value = _decode(member, self.record, self._parsed)
            except ValueError:
                continue
            if isinstance(value, Mapping):
                names += [f"{member}.{key}" for key in value]
        return names

    def _find(self, name: str) -> Any:
        spec = self.fields.spec(name)
        try:
            return resolve(spec, self.record, parsed=self._parsed)
        except ValueError as error:
            raise self.bad(str(error)) from None
