"""The assets hold what the catalogue promises, and a choice of emoji is mixed and free of confusable names."""

import ast
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import siglip2.emoji_world as emoji_world
from siglip2.emoji_world.catalogue import known_languages, load_catalogue, select, sprite
from siglip2.emoji_world.phrases import PHRASES, listing, relation
from siglip2.emoji_world.plan import DEFAULT_LANGUAGES

FOLDER = Path(emoji_world.__file__).parent


def test_catalogue_has_a_thousand_emoji_named_in_every_language():
    complete = [emoji for emoji in load_catalogue() if set(emoji.names) == set(known_languages())]
    assert len(complete) >= 1000
    assert len(known_languages()) >= 24
    assert {"ar", "bn", "el", "he", "hi", "ja", "ko", "ru", "th", "zh"} <= set(known_languages())


def test_ids_are_unique_and_known_emoji_are_where_they_should_be():
    by_id = {emoji.id: emoji for emoji in load_catalogue()}
    assert len(by_id) == len(load_catalogue())
    fox = by_id["1f98a"]
    assert (fox.group, fox.subgroup, fox.names["en"], fox.names["fr"]) == (
        "Animals & Nature",
        "animal-mammal",
        "fox",
        "renard",
    )
    assert "face" in fox.keywords["en"]


def test_every_sprite_of_a_large_choice_shows_something():
    for emoji in select(900)[0]:
        pixels = sprite(emoji.id)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 4
        assert max(pixels.shape[:2]) == 80
        assert (pixels[..., 3] >= 128).mean() > 0.05, emoji.names["en"]


def test_a_cached_sprite_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        sprite("1f600")[0, 0] = 0


def test_unknown_sprite_is_an_error_that_shows_the_form_of_an_id():
    with pytest.raises(ValueError, match=r"no emoji with id '😀'.*'1f600'"):
        sprite("😀")


def test_selected_emoji_have_unique_names_in_every_language_and_do_not_overlap():
    trained, unseen = select(300, num_unseen=50, languages=DEFAULT_LANGUAGES)
    assert (len(trained), len(unseen)) == (300, 50)
    assert len({emoji.id for emoji in trained + unseen}) == 350
    for language in DEFAULT_LANGUAGES:
        assert len({emoji.names[language].casefold() for emoji in trained + unseen}) == 350


def test_small_selections_are_varied_and_hold_no_flags_or_people():
    trained, unseen = select(128, num_unseen=32)
    groups = Counter(emoji.group for emoji in trained)
    assert not {"Flags", "People & Body", "Symbols"} & set(groups)
    assert len(groups) == 6
    assert max(groups.values()) < 0.4 * 128
    assert len({emoji.group for emoji in unseen}) >= 4


def test_selection_repeats_and_depends_on_its_seed():
    assert select(64, num_unseen=8) == select(64, num_unseen=8)
    assert select(64, num_unseen=8) != select(64, num_unseen=8, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_emoji": 5000}, "5000 \\+ 0 emoji were asked for, but only"),
        ({"num_emoji": 0}, "found num_emoji=0"),
        ({"num_emoji": 4, "languages": ("en", "xx")}, "found languages .*'xx'.*expected"),
        ({"num_emoji": 4, "languages": ()}, "expected at least one"),
        ({"num_emoji": 4, "languages": ("en", "en")}, "each once"),
    ],
)
def test_impossible_selections_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**arguments)


def test_connecting_words_exist_for_exactly_the_languages_of_the_catalogue():
    assert set(PHRASES) == set(known_languages())
    for language in PHRASES:
        for text in (listing(["A", "B", "C"], language), relation("left", "A", "B", language)):
            assert text.index("A") < text.index("B")
        assert relation("above", "A", "B", language) != relation("left", "A", "B", language)


def test_lists_read_as_in_print():
    assert listing(["fox"], "en") == "fox"
    assert listing(["fox", "key"], "en") == "fox and key"
    assert listing(["fox", "key", "car"], "en") == "fox, key and car"
    assert listing(["狐狸", "钥匙"], "zh") == "狐狸和钥匙"


def test_licence_texts_lie_beside_the_assets_and_all_stays_small():
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("assets/LICENSE.*.txt")}
    assert "SIL OPEN FONT LICENSE" in texts["LICENSE.fonts-noto-color-emoji.txt"]
    assert "Unicode-DFS-2016" in texts["LICENSE.unicode-cldr-core.txt"]
    assert sum(path.stat().st_size for path in FOLDER.glob("assets/*")) < 6 * 2**20


def test_the_emoji_world_imports_neither_torch_nor_other_parts_of_the_project():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                allowed = top in {*sys.stdlib_module_names, "numpy", "PIL", "rich"}
                assert allowed or name.startswith("siglip2.emoji_world"), f"{path.name} imports {name}"
