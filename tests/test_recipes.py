"""Recipes are found by name or path, laid over one another, and every shipped one is sound."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from siglip2.recipes import expand_arguments, find_recipe, load_recipe, recipes_folder, shipped
from siglip2.registry import catalogue, read_plugins
from siglip2.testing import rehearse


def written(folder, name, recipe):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def recipes_of(arguments):
    """The recipes among expanded arguments, last one last."""
    return [json.loads(value) for flag, value in pairwise(arguments) if flag == "--config"]


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe_expands_to_known_plugins_and_options(name):
    expanded, order = expand_arguments(["--config", name])
    assert set(order) <= set(catalogue())
    assert recipes_of(expanded)[-1].keys() == load_recipe(name).keys()


@pytest.mark.parametrize("name", [n for n in shipped() if "/" not in n])
def test_shipped_recipe_has_one_patchifier_and_an_objective(name):
    _, order = expand_arguments(["--config", name])
    kinds = [catalogue()[plugin].kind for plugin in order]
    assert kinds.count("patchifier") == 1
    assert "objective" in kinds


def test_recipe_is_found_by_name_and_by_path(tmp_path):
    assert find_recipe("quickstart") == recipes_folder() / "quickstart.yaml"
    path = written(tmp_path, "mine", {"plugins": ["sigmoid"]})
    assert find_recipe(path) == Path(path)


def test_misspelt_recipe_is_told_the_nearest_name():
    with pytest.raises(FileNotFoundError, match="no recipe 'quikstart', did you mean 'quickstart'"):
        find_recipe("quikstart")


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a", "should hold a mapping")])
def test_file_that_is_no_recipe_is_named(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.yaml.*{message}"):
        load_recipe(str(path))


def test_interpolations_reach_the_parser_untouched(tmp_path):
    path = written(tmp_path, "a", {"seed_everything": 3, "data": {"seed": "${seed_everything}"}})
    assert recipes_of(expand_arguments(["--config", path])[0])[0]["data"]["seed"] == "${seed_everything}"


def test_later_recipe_overlays_an_earlier_one_by_plugin_name(tmp_path):
    base = written(tmp_path, "a", {"plugins": [{"fixed": {"image_size": 64}}, {"sigmoid": {"weight": 2}}]})
    later = written(tmp_path, "b", {"plugins": [{"fixed": {"batch_size": 8}}, {"sigmoid": "off"}]})
    expanded, order = expand_arguments(["--config", base, f"--config={later}"])
    assert order == ["fixed"]
    assert recipes_of(expanded)[-1]["plugins"] == {"fixed": {"image_size": 64, "batch_size": 8}, "sigmoid": None}


def test_recipe_without_plugins_leaves_the_plugins_alone(tmp_path):
    base = written(tmp_path, "a", {"plugins": ["fixed", "sigmoid"]})
    later = written(tmp_path, "b", {"trainer": {"max_steps": 3}})
    assert expand_arguments(["-c", base, "-c", later])[1] == ["fixed", "sigmoid"]


def test_typo_in_a_recipe_names_the_recipe(tmp_path):
    path = written(tmp_path, "typo", {"plugins": ["sigmod"]})
    with pytest.raises(ValueError, match="typo.yaml: no plugin called 'sigmod', did you mean 'sigmoid'"):
        expand_arguments(["--config", path])


@pytest.mark.parametrize(
    ("arguments", "expected", "order"),
    [
        (["--plugins.sigmoid", "off"], ["--plugins.sigmoid", "null"], ["fixed"]),
        (["--plugins.sigmoid=off"], ["--plugins.sigmoid", "null"], ["fixed"]),
        (["--plugins.sigmoid", "on"], ["--plugins.sigmoid", "{}"], ["fixed", "sigmoid"]),
        (["--plugins.sigmoid.weight", "2"], ["--plugins.sigmoid.weight", "2"], ["fixed", "sigmoid"]),
        (["--plugins.sigmoid.weight=2"], ["--plugins.sigmoid.weight", "2"], ["fixed", "sigmoid"]),
    ],
)
def test_plugin_is_reached_by_name_on_the_command_line(arguments, expected, order):
    base = {"plugins": ["fixed", "sigmoid"]}
    expanded, found = expand_arguments(arguments, base)
    assert expanded[2:] == expected
    assert found == order


def test_misspelt_option_on_the_command_line_is_told_the_nearest():
    with pytest.raises(ValueError, match="no option 'wight', did you mean 'weight'"):
        expand_arguments(["--plugins.sigmoid.wight", "2"])


def test_other_arguments_pass_through_in_order():
    assert expand_arguments(["--trainer.max_steps", "3", "--report=false"])[0] == [
        "--trainer.max_steps",
        "3",
        "--report=false",
    ]


def test_quickstart_plugins_rehearse_with_tiny_towers():
    options = {**read_plugins(load_recipe("quickstart")["plugins"])}
    rehearse([catalogue()[name].cls(**given) for name, given in options.items() if given is not None])
