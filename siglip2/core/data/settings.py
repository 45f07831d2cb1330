"""What a recipe says about its data: frozen, plain, and the same on the command line."""

from dataclasses import dataclass, field

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
class TrainSet:
    """What is trained on.

    Args:
        path: shards (brace notation, a glob, a folder, `a::b`, any fsspec URL), a CSV/TSV table, or an image folder.
        format: tar, table, folder, or auto.
        fields: where image, caption, label and regions are found in a sample.
        languages: share of each language where samples have captions in several; null draws evenly.
        window: shards that are shuffled together; null shuffles the whole set at once.
        cache_dir: folder that keeps local copies of remote shards; null reads ranges.
        max_bytes: files in a sample larger than this make it unusable.
        max_bad: share of unusable samples at which the run stops.
    """

    path: str
    format: str = "auto"
    fields: Fields = field(default_factory=Fields)
    languages: dict[str, float] | None = None
    window: int | None = None
    cache_dir: str | None = None
    max_bytes: int = 64 * 2**20
    max_bad: float = 0.05


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
