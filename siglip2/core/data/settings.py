"""What a recipe says about its data: frozen, plain, and the same on the command line."""

import math
from dataclasses import dataclass, field, fields, replace

from siglip2.core.data.fields import Fields


@dataclass(frozen=True)
class TextOptions:
    """How captions become ids; everything here travels with the checkpoint.

    Args:
        length: tokens of every text, EOS and padding included; 64 in SigLIP 2.
        lowercase: lower-case first, as the released models were trained.
        lowercase_ascii_only: lower-case only A to Z, as big_vision does; off lower-cases every script.
        canonicalize: also strip ASCII punctuation, as open_clip does; off in the released models.
        bos: begin texts with BOS; the released models do not.
        pad_id: padding id; null finds it in the tokenizer.
        eos_id: end-of-text id; null finds it in the tokenizer.
        bos_id: beginning id; null finds it in the tokenizer.
    """

    length: int = 64
    lowercase: bool = True
    lowercase_ascii_only: bool = False
    canonicalize: bool = False
    bos: bool = False
    pad_id: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None


@dataclass(frozen=True)
class SourceSet:
    """One of several sources of training examples. What is null here is as `data.train` has it.

    Args:
        path: shards, a table or an image folder; see data.train.path.
        weight: share of the training examples that come from here; shares are divided by their sum.
        format: tar, table, folder, or auto.
        fields: where image, caption, label and regions are found in a sample; given as a whole.
        languages: share of each language where samples have captions in several.
        captions: share of each caption field.
        window: shards that are shuffled together.
        weights: name of the example weights to sample by.
        cache_dir: folder that keeps local copies of remote shards.
        max_bytes: files in a sample larger than this make it unusable.
    """

    path: str
    weight: float | None = None
    format: str | None = None
    fields: Fields | None = None
    languages: dict[str, float] | None = None
    captions: dict[str, float] | None = None
    window: int | None = None
    weights: str | None = None
    cache_dir: str | None = None
    max_bytes: int | None = None


INHERITED = tuple(f.name for f in fields(SourceSet) if f.name not in ("path", "weight"))


@dataclass(frozen=True)
class TrainSet:
    """What is trained on: one set (`path`), or a mixture of several (`sources`).

    Args:
        path: shards (brace notation, a glob, a folder, `a::b`, any fsspec URL), a CSV/TSV table, or an image folder.
        sources: several sets by name instead of `path`, each with its share of the examples.
        format: tar, table, folder, or auto.
        fields: where image, caption, label and regions are found in a sample.
        languages: share of each language where samples have captions in several; 0 leaves one out, null draws evenly.
        captions: share of each field that captions are drawn from, `caption` or one of fields.extra; a sample that
            lacks one is drawn from those it has. Null takes the field `caption`.
        window: shards that are shuffled together; null shuffles the whole set at once.
        weights: name of the example weights to sample by, as `siglip2 balance --name` wrote them beside the shards;
            null takes every sample once an epoch.
        cache_dir: folder that keeps local copies of remote shards; null reads ranges.
        max_bytes: files in a sample larger than this make it unusable.
        max_bad: share of unusable samples at which the run stops.
    """

    path: str | None = None
    sources: dict[str, SourceSet] | None = None
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    languages: dict[str, float] | None = None
    captions: dict[str, float] | None = None
    window: int | None = None
    weights: str | None = None
    cache_dir: str | None = None
    max_bytes: int = 64 * 2**20
    max_bad: float = 0.05

    def parts(self) -> "dict[str, TrainSet]":
        """Returns one set with a path for each source, by name; one set alone has the name "".

        Raises:
            ValueError: if there is no path and no source, or there are both; if a caption field or a share is wrong.
        """
        if self.path is not None and self.sources is not None:
            raise ValueError("data.train has both path and sources: give one set as path, or several as sources")
        if self.path is None and not self.sources:
            raise ValueError("data.train needs the option 'path', or 'sources' by name, each with a path and a weight")
        if self.sources is None:
            parts = {"": self}
        else:
            parts = {name: self._with(source) for name, source in self.sources.items()}
        for name, part in parts.items():
            option = f"data.train.sources.{name}" if name else "data.train"
            _check_captions(part, option)
            _check_languages(part, option)
        return parts

    def _with(self, source: SourceSet) -> "TrainSet":
        own = {f: v for f in INHERITED if (v := getattr(source, f)) is not None}
        return replace(self, path=source.path, sources=None, **own)

    def source_shares(self) -> dict[str, float]:
        """Returns the share of the examples that come from each source, by name; they sum to 1.

        Raises:
            ValueError: if a weight is missing, or is no number above 0.
        """
        weights = {name: source.weight for name, source in (self.sources or {}).items()}
        for name, weight in weights.items():
            if weight is None:
                raise ValueError(
                    f"data.train.sources.{name} has no weight: give each source its share of the examples, "
                    f"as in {{path: ..., weight: 0.9}}"
                )
            _check_share(weight, f"data.train.sources.{name}.weight")
        total = sum(filter(None, weights.values()))
        return {name: (weight or 0.0) / total for name, weight in weights.items()}


def _check_captions(part: TrainSet, option: str) -> None:
    if part.captions is None:
        return
    if not part.captions:
        raise ValueError(f"{option}.captions is empty: give shares as in {{caption: 0.6, synthetic: 0.4}}, or null")
    known = ["caption", *part.fields.extra]
    for name, share in part.captions.items():
        if name not in known:
            raise ValueError(
                f"{option}.captions names {name!r}, which is no field with captions; known: {', '.join(known)}. "
                f"Add it to data.train.fields.extra, as in {{extra: {{{name}: json.{name}}}}}"
            )
        _check_share(share, f"{option}.captions.{name}")


def _check_languages(part: TrainSet, option: str) -> None:
    if part.languages is None:
        return
    for code, share in part.languages.items():
        if not 0 <= share < math.inf:
            raise ValueError(f"{option}.languages.{code} is {share:g}, expected a share of 0 or more")
    if not any(part.languages.values()):
        raise ValueError(f"{option}.languages has no share above 0: give some as in {{en: 3, de: 1}}, or null for all")


def _check_share(share: float, option: str) -> None:
    if not 0 < share < math.inf:
        raise ValueError(f"{option} is {share:g}, expected a share above 0; leave out what is not wanted")


@dataclass(frozen=True)
class ZeroShotSet:
    """Labelled images, classified by the text embeddings of class names.

    Args:
        path: shards, a table or an image folder; see data.train.path.
        classes: JSON file {"classes": [{"names": {language: name}} or name, ...]} in the order of the labels.
        languages: the languages to evaluate; null takes all that every class has.
        templates: prompts with `{}` for the class name; class vectors are the mean over them.
        format: tar, table, folder, or auto.
        fields: where image and label are found in a sample.
        limit: use only so many images.
    """

    path: str
    classes: str
    languages: list[str] | None = None
    templates: list[str] = field(default_factory=lambda: ["{}"])
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    limit: int | None = None


@dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions, searched in both directions.

    Args:
        path: shards, a table or an image folder; see data.train.path.
        languages: one search per language; null if captions have none.
        format: tar, table, folder, or auto.
        fields: where image and caption are found in a sample.
        limit: use only so many images.
    """

    path: str
    languages: list[str] | None = None
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    limit: int | None = None


@dataclass(frozen=True)
class ReferringSet:
    """Images with boxes whose texts are located by a trained decoder; one region of each image is asked for.

    Args:
        path: shards, a table or an image folder; see data.train.path.
        languages: texts are located in each of them; null if texts have none.
        format: tar, table, folder, or auto.
        fields: where image and regions are found in a sample.
        limit: use only so many images.
    """

    path: str
    languages: list[str] | None = None
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    limit: int | None = None


@dataclass(frozen=True)
class PredictSet:
    """Pictures to describe and texts to choose from.

    Args:
        images: image files, globs, or folders.
        texts: free texts, in any language the model was trained on.
    """

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
