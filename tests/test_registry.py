"""Names, suggestions and overlays of plugins: what a recipe may say and what it is told when it errs."""

import pickle
from types import SimpleNamespace

import pytest

from siglip2 import Plugin, hookimpl
from siglip2.registry import BUILT_IN, catalogue, in_order, lookup, overlay, plugins_class, read_plugins


class Extra(Plugin):
    """Something more."""

    name = "extra"


def package(*classes, name="extra-package", version="1.2"):
    """An entry point as an installed distribution declares it."""

    class Module:
        @hookimpl
        def register_plugins(self):
            return list(classes)

    return SimpleNamespace(name=name, value=name, dist=SimpleNamespace(name=name, version=version), load=Module)


def test_installed_package_enters_the_catalogue_with_its_origin(third_party_plugins):
    third_party_plugins.append(package(Extra))
    assert catalogue()["extra"].origin == "extra-package 1.2"
    assert catalogue()["sigmoid"].origin == BUILT_IN


def test_two_plugins_of_one_name_are_an_error_that_names_both_packages(third_party_plugins):
    third_party_plugins += [package(Extra, name="one"), package(Extra, name="two")]
    with pytest.raises(ValueError, match=r"two plugins are called 'extra': one 1\.2 and two 1\.2"):
        catalogue()


def test_package_that_cannot_be_imported_is_named(third_party_plugins):
    def load():
        raise ImportError("no module named numpie")

    third_party_plugins.append(SimpleNamespace(**{**vars(package()), "load": load}))
    with pytest.raises(ValueError, match=r"extra-package 1\.2 cannot be loaded.*numpie"):
        catalogue()


@pytest.mark.parametrize("name", [None, "two words", "", 3])
def test_name_that_is_no_word_is_an_error(name, third_party_plugins):
    class Nameless(Plugin): ...

    Nameless.name = name
    third_party_plugins.append(package(Nameless))
    with pytest.raises(ValueError, match="expected a word such as"):
        catalogue()


@pytest.mark.parametrize("name", ["half", "train", "keys"])
def test_name_that_torch_uses_is_an_error(name, third_party_plugins):
    """torch's ModuleDict would refuse it later, and not say why."""
    third_party_plugins.append(package(type("Named", (Plugin,), {"name": name})))
    with pytest.raises(ValueError, match=f"no plugin can be called '{name}', which torch's modules use: rename it"):
        catalogue()


@pytest.mark.parametrize(("name", "kind"), [("sigmoid", "objective"), ("fixed", "patchifier")])
def test_kind_is_what_a_plugin_offers(name, kind):
    assert lookup(name).kind == kind


def test_misspelt_plugin_is_told_the_nearest_name():
    with pytest.raises(ValueError, match="no plugin called 'sigmiod', did you mean 'sigmoid'"):
        read_plugins(["sigmiod"])


def test_word_unlike_any_plugin_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"no plugin called 'qqqq'\. Installed: "):
        read_plugins(["qqqq"])


def test_misspelt_option_is_told_the_nearest_and_all_options():
    with pytest.raises(
        ValueError, match="'sigmoid' has no option 'wieght', did you mean 'weight'.*weight, start, stop"
    ):
        read_plugins([{"sigmoid": {"wieght": 2}}])


@pytest.mark.parametrize(
    "written",
    [
        ["fixed", {"sigmoid": {"weight": 2}}],
        [{"fixed": {}}, {"sigmoid": {"weight": 2}}],
        {"fixed": {}, "sigmoid": {"weight": 2}},
        {"fixed": True, "sigmoid": {"weight": 2}},
    ],
    ids=["bare", "empty", "mapping", "on"],
)
def test_list_and_mapping_say_the_same(written):
    assert read_plugins(written) == {"fixed": {}, "sigmoid": {"weight": 2}}


@pytest.mark.parametrize("off", ["off", False, None])  # null: so a printed recipe says of a plugin that is off
def test_off_removes_a_plugin(off):
    base = read_plugins(["fixed", "sigmoid"])
    assert overlay(base, read_plugins({"sigmoid": off})) == {"fixed": {}}


def test_removing_what_is_not_there_changes_nothing():
    assert overlay({"fixed": {}}, {"sigmoid": None}) == {"fixed": {}}


def test_later_options_win_and_earlier_ones_stay():
    base = {"sigmoid": {"weight": 2, "start": 0.1}}
    assert overlay(base, {"sigmoid": {"weight": 3}}) == {"sigmoid": {"weight": 3, "start": 0.1}}


def test_new_names_are_appended_and_old_ones_keep_their_place():
    merged = overlay({"fixed": {}, "sigmoid": {}}, {"locca": {}, "fixed": {"image_size": 64}})
    assert list(merged) == ["fixed", "sigmoid", "locca"]


def test_overlay_leaves_its_arguments_alone():
    base = {"sigmoid": {"weight": 2}}
    overlay(base, {"sigmoid": {"weight": 3}, "fixed": {}})
    assert base == {"sigmoid": {"weight": 2}}


@pytest.mark.parametrize("written", ["sigmoid", 3, None])
def test_plugins_that_are_neither_list_nor_mapping_are_an_error(written):
    with pytest.raises(ValueError, match="should be a list of names"):
        read_plugins(written)


def test_options_that_are_no_mapping_are_an_error():
    with pytest.raises(ValueError, match="'sigmoid': expected options as a mapping, or `off`, found 3"):
        read_plugins({"sigmoid": 3})


def test_instances_come_out_in_recipe_order():
    fixed, sigmoid = lookup("fixed").cls(), lookup("sigmoid").cls()
    for order in (["sigmoid", "fixed"], ["fixed", "sigmoid"]):
        plugins = plugins_class(order)(fixed=fixed, sigmoid=sigmoid)
        assert [p.name for p in in_order(plugins)] == order


def test_plugins_of_a_recipe_travel_to_other_processes_in_their_order():
    """Launchers that spawn pickle the parsed recipe."""
    plugins = pickle.loads(
        pickle.dumps(
            plugins_class(["sigmoid", "fixed"])(fixed=lookup("fixed").cls(), sigmoid=lookup("sigmoid").cls(0.5))
        )
    )
    assert [p.name for p in in_order(plugins)] == ["sigmoid", "fixed"]
    assert plugins.sigmoid.weight == 0.5
