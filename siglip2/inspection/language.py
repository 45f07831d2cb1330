"""What can be said of a text without a model: its script, and what it is but for capitals and punctuation."""

import unicodedata
from collections import Counter
from functools import lru_cache

NO_SCRIPT = "none"
# First words of Unicode names that say how a letter is drawn or how old it is, not what script it belongs to.
ADJECTIVES = frozenset({"MODIFIER", "OLD", "NEW", "SMALL", "CAPITAL", "TURNED", "REVERSED", "INVERTED"})


def script(text: str) -> str:
    """Returns the script that most letters of a text are in, as Unicode names it: `Latin`, `Cyrillic`, `Han`.

    A script is not a language: Latin letters write hundreds. Japanese is `Hiragana` or `Katakana` where kana outnumber
    the characters it shares with Chinese, else `Han`. A text without letters has the script `none`.
    """
    counts = Counter(filter(None, map(_script_of, unicodedata.normalize("NFKC", text))))
    return max(sorted(counts), key=counts.__getitem__) if counts else NO_SCRIPT


@lru_cache(maxsize=2**16)
def _script_of(letter: str) -> str:
    if not unicodedata.category(letter).startswith("L"):
        return ""
    names = unicodedata.name(letter, "").replace("-", " ").split()
    first = next((name for name in names if name not in ADJECTIVES), "").capitalize()
    return "Han" if first == "Cjk" else first


def normalised(text: str) -> str:
    """Returns a text without what a copy may differ in: compatibility forms, capitals, punctuation, runs of spaces.

    A text of nothing but punctuation or symbols stays as it is, apart from its spaces.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(letter if _is_kept(letter) else " " for letter in folded)
    return " ".join(kept.split()) or " ".join(text.split())


@lru_cache(maxsize=2**16)
def _is_kept(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "LMNS"
