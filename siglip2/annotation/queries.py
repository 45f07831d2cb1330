"""Which texts a detector is asked for: word n-grams of an image's own captions, and categories from a file.

Source: OWLv2, https://arxiv.org/abs/2306.09683, appendix A.1 (categories) and A.2 (n-grams). LocCa and SigLIP 2 take
their boxes from that recipe.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from siglip2.core.data.storage import read_file

MAX_WORDS = 10  # OWLv2, A.2
MAX_QUERIES = 300  # per image; OWLv2, A.2


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# OWLv2, A.2: NLTK's English stop words. An n-gram of nothing else is no query
STOP_WORDS = _words(
    """
    a about above after again against all am an and any are as at be because been before being below between both but
    by can did do does doing don down during each few for from further had has have having he her here hers herself him
    himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or
    other our ours ourselves out over own s same she should so some such t than that the their theirs them themselves
    then there these they this those through to too under until up very was we were what when where which while who
    whom why will with you your yours yourself yourselves
    """
)
# OWLv2, A.2: words of alt-texts that say nothing about a picture; they are taken out before n-grams are formed
GENERIC_WORDS = _words(
    """
    alibaba aliexpress amazon available background blog buy co com description diy download facebook free gif hd ideas
    illustration illustrations image images img instagram jpg online org original page pdf photo photography photos
    picclick picture pictures png porn premium resolution royalty sale sex shutterstock stock svg thumbnail tumblr
    tumgir twitter uk uploaded vector vectors video videos wallpaper wallpapers wholesale www xxx youtube
    """
)


@dataclass(frozen=True)
class Query:
    """A text to look for.

    Args:
        text: lower-case, not blank.
        language: its code, "" if nobody said.
        kind: `ngram` or `category`.
        weight: what a score is multiplied by before queries are compared and thresholds applied, in (0, 1].
    """

    text: str
    language: str = ""
    kind: str = "ngram"
    weight: float = 1.0


def ngrams(caption: str, *, max_words: int = MAX_WORDS) -> Iterator[str]:
    """Yields the word n-grams of a caption: all that begin at its first word, short ones first, then at its second.

    That order is the one of `nltk.everygrams`, which the source calls. Words are what stands between white space,
    in lower case; punctuation stays where it is. An n-gram that occurs twice is yielded twice.

    Args:
        caption: any text.
        max_words: of one n-gram.
    """
    words = [word for word in caption.lower().split() if word not in GENERIC_WORDS]
    for first in range(len(words)):
        for last in range(first + 1, min(first + max_words, len(words)) + 1):
            ngram = words[first:last]
            if not STOP_WORDS.issuperset(ngram):
                yield " ".join(ngram)


def ngram_queries(
    captions: Mapping[str, Sequence[str]], *, max_words: int = MAX_WORDS, max_queries: int = MAX_QUERIES
) -> list[Query]:
    """Returns the first `max_queries` different n-grams of an image's captions, in order.

    The source has one caption per image, and counts repetitions within it towards the limit; we do not.

    Args:
        captions: language -> texts.
        max_words: of one n-gram.
        max_queries: per image.
    """
    found: dict[str, Query] = {}
    for language, texts in captions.items():
        for caption in texts:
            for text in ngrams(caption, max_words=max_words):
                if len(found) >= max_queries:
                    return list(found.values())
                found.setdefault(text, Query(text, language))
    return list(found.values())


def categories(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names in lower case, each once, without blank ones and without plurals whose singular is there (A.1)."""
    unique = dict.fromkeys(filter(None, (" ".join(name.lower().split()) for name in names)))
    plurals = {name + ending for name in unique for ending in ("s", "es")}
    return tuple(name for name in unique if name not in plurals)


def read_categories(path: str) -> tuple[str, ...]:
    """Returns the categories in a file, one per line; a path or an fsspec URL.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8 or holds no name.
    """
    try:
        found = categories(read_file(path).decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not found:
        raise ValueError(f"no category in {path}; expected one name per line, such as `traffic light`")
    return found
