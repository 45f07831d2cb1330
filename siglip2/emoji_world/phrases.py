"""Captions in 27 languages from names and a small table of connecting words.

Names are nominatives, so the words are chosen to need no case endings: where "to the left of" would ask for another
case, as in Russian, the phrase reads "on the left A, on the right B" instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """Connecting words of one language; `{a}` and `{b}` stand for names.

    Args:
        pair: joins two names, and the last two of a longer list.
        comma: separates the earlier names of a list of three or more.
        left: a is to the left of b.
        above: a is above b.
    """

    pair: str
    comma: str
    left: str
    above: str


PHRASES = {
    "en": Phrases("{a} and {b}", ", ", "{a} to the left of {b}", "{a} above {b}"),
    "de": Phrases("{a} und {b}", ", ", "links {a}, rechts {b}", "oben {a}, unten {b}"),
    "fr": Phrases("{a} et {b}", ", ", "à gauche {a}, à droite {b}", "en haut {a}, en bas {b}"),
    "es": Phrases("{a} y {b}", ", ", "a la izquierda {a}, a la derecha {b}", "arriba {a}, abajo {b}"),
    "it": Phrases("{a} e {b}", ", ", "a sinistra {a}, a destra {b}", "in alto {a}, in basso {b}"),
    "pt": Phrases("{a} e {b}", ", ", "à esquerda {a}, à direita {b}", "em cima {a}, embaixo {b}"),
    "nl": Phrases("{a} en {b}", ", ", "links {a}, rechts {b}", "boven {a}, onder {b}"),
    "sv": Phrases("{a} och {b}", ", ", "till vänster {a}, till höger {b}", "upptill {a}, nedtill {b}"),
    "fi": Phrases("{a} ja {b}", ", ", "vasemmalla {a}, oikealla {b}", "ylhäällä {a}, alhaalla {b}"),
    "pl": Phrases("{a} i {b}", ", ", "po lewej {a}, po prawej {b}", "u góry {a}, u dołu {b}"),
    "cs": Phrases("{a} a {b}", ", ", "vlevo {a}, vpravo {b}", "nahoře {a}, dole {b}"),
    "ru": Phrases("{a} и {b}", ", ", "слева {a}, справа {b}", "вверху {a}, внизу {b}"),
    "uk": Phrases("{a} і {b}", ", ", "ліворуч {a}, праворуч {b}", "угорі {a}, унизу {b}"),
    "el": Phrases("{a} και {b}", ", ", "αριστερά {a}, δεξιά {b}", "πάνω {a}, κάτω {b}"),
    "tr": Phrases("{a} ve {b}", ", ", "solda {a}, sağda {b}", "üstte {a}, altta {b}"),
    "ar": Phrases("{a} و{b}", "، ", "على اليسار {a}، على اليمين {b}", "في الأعلى {a}، في الأسفل {b}"),
    "he": Phrases("{a} ו{b}", ", ", "משמאל {a}, מימין {b}", "למעלה {a}, למטה {b}"),
    "fa": Phrases("{a} و {b}", "، ", "در سمت چپ {a}، در سمت راست {b}", "بالا {a}، پایین {b}"),
    "hi": Phrases("{a} और {b}", ", ", "बाईं ओर {a}, दाईं ओर {b}", "ऊपर {a}, नीचे {b}"),
    "bn": Phrases("{a} এবং {b}", ", ", "বামে {a}, ডানে {b}", "উপরে {a}, নিচে {b}"),
    "th": Phrases("{a} และ {b}", " ", "ทางซ้าย {a} ทางขวา {b}", "ด้านบน {a} ด้านล่าง {b}"),
    "zh": Phrases("{a}和{b}", "、", "{a}在{b}的左边", "{a}在{b}的上方"),
    "ja": Phrases("{a}と{b}", "、", "左に{a}、右に{b}", "上に{a}、下に{b}"),
    "ko": Phrases("{a} 그리고 {b}", ", ", "왼쪽에 {a}, 오른쪽에 {b}", "위에 {a}, 아래에 {b}"),
    "vi": Phrases("{a} và {b}", ", ", "{a} ở bên trái {b}", "{a} ở phía trên {b}"),
    "id": Phrases("{a} dan {b}", ", ", "{a} di sebelah kiri {b}", "{a} di atas {b}"),
    "sw": Phrases("{a} na {b}", ", ", "kushoto {a}, kulia {b}", "juu {a}, chini {b}"),
}


def listing(names: Sequence[str], language: str) -> str:
    """The names as one phrase: "A", "A and B", "A, B and C".

    Args:
        names: at least one name, already in `language`.
        language: a key of PHRASES.
    """
    words = PHRASES[language]
    if len(names) == 1:
        return names[0]
    return words.pair.format(a=words.comma.join(names[:-1]), b=names[-1])


def relation(kind: str, a: str, b: str, language: str) -> str:
    """`a` is "left" of or "above" `b`, in words of `language`."""
    words = PHRASES[language]
    return (words.left if kind == "left" else words.above).format(a=a, b=b)
