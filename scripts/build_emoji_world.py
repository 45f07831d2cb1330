"""Build the assets of the emoji world: sprites, names and keywords, licences.

Everything comes from three Debian packages, so that the assets can be made again without a download by hand:

    apt-get install fonts-noto-color-emoji unicode-cldr-core unicode-data
    python scripts/build_emoji_world.py

Pictures are drawn with Pillow, which needs its raqm layout engine (the wheels on PyPI have it) to join ZWJ sequences
and flags into one glyph. Skin tones are left out: they are not concepts of their own at this size. Emoji newer than the
names in `unicode-cldr-core` are left out, too. The same packages and the same Pillow give the same bytes.
"""

import argparse
import io
import json
import lzma
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

ASSETS = Path(__file__).resolve().parents[1] / "siglip2" / "emoji_world" / "assets"
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = Path("/usr/share/unicode/cldr/common")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core", "unicode-data")
# the connecting words of siglip2/emoji_world/phrases.py cover exactly these
LANGUAGES = "en,de,fr,es,it,pt,nl,sv,fi,pl,cs,ru,uk,el,tr,ar,he,fa,hi,bn,th,zh,ja,ko,vi,id,sw".split(",")  # noqa: SIM905
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
STRIKE = 109  # the only bitmap size of the font, in pixels per em; its glyphs are 136 x 128
SPRITE = 80  # pixels of the long side


def read_emoji_test(path: Path) -> list[tuple[str, str, str]]:
    """All fully qualified emoji without skin tones: (characters, group, subgroup), in the order of the standard."""
    rows, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# (group|subgroup): (.+)", line):
            group, subgroup = (heading[2], "") if heading[1] == "group" else (group, heading[2])
        elif row := re.match(r"([0-9A-F ]+?)\s*; fully-qualified", line):
            text = "".join(chr(int(code, 16)) for code in row[1].split())
            if not SKIN_TONES & set(text):
                rows.append((text, group, subgroup))
    return rows


def read_annotations(language: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names (`type="tts"`) and keywords of one CLDR locale, by characters without U+FE0F."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        path = CLDR / folder / f"{language}.xml"
        if not path.exists():
            continue
        for node in ElementTree.parse(path).iter("annotation"):
            text = (node.text or "").strip()
            if "↑" in text or not text:  # CLDR's mark for "inherited from the parent locale"
                continue
            if node.get("type") == "tts":
                names[node.get("cp", "")] = text
            else:
                keywords[node.get("cp", "")] = [word.strip() for word in text.split("|")]
    return names, keywords


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The glyph, RGBA, cropped to what is painted, long side SPRITE pixels; None if it is empty or several glyphs."""
    if font.getlength(text) > 1.5 * STRIKE:  # the sequence fell apart into its pieces
        return None
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), text, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = SPRITE / max(glyph.size)
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)


def write_sprites(path: Path, sprites: dict[str, Image.Image], quality: int) -> None:
    """One uncompressed zip of WebP files `<id>.webp`; the same bytes for the same sprites."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, sprite in sprites.items():
            buffer = io.BytesIO()
            sprite.save(buffer, "WEBP", quality=quality, alpha_quality=80, method=6)
            archive.writestr(zipfile.ZipInfo(f"{name}.webp"), buffer.getvalue())


def write_names(path: Path, rows: dict[str, tuple[str, str, str]]) -> None:
    """One xz-compressed JSON, in columns because they compress better; `rows`: (characters, group, subgroup) by id."""
    keys = [text.replace("\ufe0f", "") for text, _, _ in rows.values()]
    table: dict[str, object] = {
        "ids": list(rows),
        "groups": [group for _, group, _ in rows.values()],
        "subgroups": [subgroup for _, _, subgroup in rows.values()],
    }
    annotations = {language: read_annotations(language) for language in LANGUAGES}
    table["names"] = {language: [names.get(key) for key in keys] for language, (names, _) in annotations.items()}
    table["keywords"] = {language: [words.get(key, []) for key in keys] for language, (_, words) in annotations.items()}
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Write `sprites.zip`, `names.json.xz` and `LICENSE.<package>.txt` into the assets folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--quality", type=int, default=75, help="WebP quality of the sprites, 0 to 100")
    args = parser.parse_args()
    if not features.check("raqm"):
        sys.exit("this Pillow has no raqm layout engine, so ZWJ sequences would fall apart; use the wheel from PyPI")
    font = ImageFont.truetype(FONT, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    english, _ = read_annotations("en")
    sprites: dict[str, Image.Image] = {}
    rows: dict[str, tuple[str, str, str]] = {}
    for text, group, subgroup in read_emoji_test(EMOJI_TEST):
        key = text.replace("\ufe0f", "")
        sprite = draw(font, text) if key in english else None  # newer than this CLDR: no name, no use
        if sprite is not None:
            name = "-".join(f"{ord(character):x}" for character in key)
            sprites[name], rows[name] = sprite, (text, group, subgroup)
    args.out.mkdir(parents=True, exist_ok=True)
    write_sprites(args.out / "sprites.zip", sprites, args.quality)
    write_names(args.out / "names.json.xz", rows)
    for package in PACKAGES:
        licence = Path("/usr/share/doc", package, "copyright").read_bytes()
        (args.out / f"LICENSE.{package}.txt").write_bytes(licence)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{len(rows)} emoji, {len(LANGUAGES)} languages, {size / 2**20:.2f} MiB in {args.out}")


if __name__ == "__main__":
    main()
