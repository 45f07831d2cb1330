"""HTML that is escaped by construction, and how numbers and languages are written for a reader."""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

VOID = frozenset({"img", "meta", "br"})

LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "mi": "Maori", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "quz": "Quechua", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili",
    "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


class Html(str):
    """Text that is already HTML; a plain `str` is escaped where it meets one."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """One part of the page: its anchor, its heading, a line that says how to read it, and the rest."""

    anchor: str
    heading: str
    lead: str
    body: Html


def escape(text: str) -> Html:
    """`text` as HTML, safe in content and in quoted attributes; lone surrogates become `?`."""
    return Html(html.escape(text.encode("utf-8", "replace").decode("utf-8")))


def join(parts: Iterable[str]) -> Html:
    """The parts after one another, escaped unless they are HTML."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def el(name: str, /, *children: str, **attributes: str | int | float | None) -> Html:
    """One element with its children.

    Args:
        name: tag name.
        children: HTML, or plain text to be escaped.
        attributes: `cls` stands for `class`, underscores for dashes; None leaves an attribute out.
    """
    written = [
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(written)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def said(text: str, language: str = "", *, tag: str = "span", cls: str | None = None) -> Html:
    """Text in a language the page does not know: the browser finds its direction."""
    return el(tag, text, dir="auto", lang=language or None, cls=cls)


def language_name(code: str) -> str:
    """English name of a language code, its region kept in brackets; an unknown code stands for itself."""
    base, _, region = code.replace("_", "-").partition("-")
    name = LANGUAGES.get(base.lower())
    if name is None:
        return code
    return f"{name} ({region})" if region else name


def percent(fraction: float, *, digits: int = 1) -> str:
    """A fraction as `42.1%`; not finite is a dash."""
    return f"{100 * fraction:.{digits}f}%" if math.isfinite(fraction) else "–"


def probability(score: float) -> str:
    """A probability in few letters: `93%`, `4.2%`, `<0.1%`."""
    if not math.isfinite(score):
        return "–"
    if 0 < score < 0.001:
        return "<0.1%"
    return percent(score, digits=0 if score >= 0.0995 or score == 0 else 1)


def number(value: float) -> str:
    """A measured value with four significant digits: `12,480`, `0.4823`, `3.2e-5`."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count(amount: int, noun: str) -> str:
    """`1 image`, `5,000 images`, `102 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{amount:,} {noun if amount == 1 else plural}"
