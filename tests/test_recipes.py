"""Recipes are found by name or path, laid over one another, and every shipped one is sound."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.rehearsal import rehearse as rehearse_phases
from siglip2.core.schedules import Schedule
from siglip2.core.warm_start import Surgery, fit_state
from siglip2.plugins.locca import Prefixes
from siglip2.recipes import expand_arguments, find_recipe, load_recipe, recipes_folder, shipped
from siglip2.registry import catalogue, overlay, read_plugins
from siglip2.testing import TinyModule, tiny_tokenizer


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


WHOLE = [n for n in shipped() if "/" not in n and n != "finetune"]  # which needs weights to begin with
NARROW = {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 2}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_recipe_builds_at_two_narrow_layers_and_rehearses(name):
    recipe = load_recipe(name)
    options = {n: given for n, given in read_plugins(recipe["plugins"]).items() if given is not None}
    plugins = [catalogue()[n].cls(**typed(n, given)) for n, given in options.items()]
    shapes = {"vision": ShapeOptions(**NARROW), "text": ShapeOptions(**NARROW)}
    tokenizer = tiny_tokenizer(recipe.get("data", {}).get("text", {}).get("length", 64))
    module = TinyModule(plugins, tokenizer, size=recipe["model"]["size"], **shapes)
    rehearse_phases(module, module.phases, lambda phase: module.fake_batch(phase.start, batch_size=2))
    starts = {phase.start for phase in module.phases}
    assert starts == {0.0, 0.8}


def typed(name, given):
    """Options with what the parser would make of nested ones."""
    types = {"prefixes": Prefixes, "teacher_temperature": Schedule}
    return {k: types[k](**v) if k in types and isinstance(v, dict) else v for k, v in given.items()}


@pytest.mark.parametrize(
    ("name", "size", "factor"),
    [
        ("siglip2-b16-256", "B/16", 0.25),
        ("siglip2-l16-256", "L/16", 0.5),
        ("siglip2-so400m14-256", "So400m/14", 1.0),
        ("siglip2-so400m16-256", "So400m/16", 1.0),
        ("siglip2-g-opt16-256", "g-opt/16", 0.5),
    ],
)
def test_published_recipe_has_the_published_numbers(name, size, factor):
    """SigLIP 2, sections 2.1 and 2.3; torch's decay is the paper's over its learning rate."""
    recipe = load_recipe(name)
    plugins = read_plugins(recipe["plugins"])
    assert list(plugins) == ["fixed", "sigmoid", "locca", "ema_teacher", "silc", "tips"]
    assert plugins["fixed"]["batch_size"] == 32768
    assert plugins["locca"]["weight"] == 1.0
    assert (plugins["silc"]["weight"], plugins["tips"]["weight"]) == (factor, 0.25 * factor)
    assert {plugins[n]["start"] for n in ("ema_teacher", "silc", "tips")} == {0.8}
    assert recipe["model"]["size"] == size
    adam = recipe["model"]["optimizer"]["init_args"]
    assert (adam["lr"], adam["betas"], adam["weight_decay"]) == (1e-3, [0.9, 0.95], pytest.approx(1e-4 / 1e-3))
    assert recipe["model"]["warmup"] == 20000
    assert recipe["trainer"]["max_steps"] == 40_000_000_000 // 32768
    assert recipe["trainer"]["gradient_clip_val"] == 1.0


@pytest.mark.parametrize(
    ("overlay", "left"),
    [
        ("siglip1", ["fixed", "sigmoid"]),
        ("no-sigmoid", ["fixed", "locca", "ema_teacher", "silc", "tips"]),
        ("no-locca", ["fixed", "sigmoid", "ema_teacher", "silc", "tips"]),
        ("no-silc", ["fixed", "sigmoid", "locca", "ema_teacher", "tips"]),
        ("no-tips", ["fixed", "sigmoid", "locca", "ema_teacher", "silc"]),
        ("no-ssl", ["fixed", "sigmoid", "locca"]),
    ],
)
def test_overlay_turns_losses_off_in_every_recipe(overlay, left):
    for name in WHOLE:
        _, order = expand_arguments(["--config", name, "--config", f"losses/{overlay}"])
        assert order == left


STAGES = {  # base, rows of patches, kernel resized, share at which it branches, times the steps that were left
    "p16-224": ("siglip2-b16-256", 14, False, 0.95, 1),
    "p16-256": ("siglip2-g-opt16-256", 16, False, 0.95, 1),
    "p16-384": ("siglip2-l16-256", 24, False, 0.95, 1),
    "p16-512": ("siglip2-so400m16-256", 32, False, 0.95, 1),
    "so400m14-224": ("siglip2-so400m16-256", 16, True, 0.95, 1),
    "so400m14-384": ("siglip2-so400m16-256", 27, True, 0.95, 1),
    "b32-256": ("siglip2-b16-256", 8, True, 0.95, 1),
    "naflex": ("siglip2-b16-256", 16, False, 0.9, 3.75 * 6 / 5),  # 6 batches with the examples of 5
}


def narrow(options, size):
    """The module of a recipe's plugins with two narrow layers."""
    plugins = [catalogue()[n].cls(**typed(n, given)) for n, given in options.items()]
    shapes = {"vision": ShapeOptions(**NARROW), "text": ShapeOptions(**NARROW)}
    return TinyModule(plugins, tiny_tokenizer(64), size=size, **shapes)


def test_every_stage_is_tested():
    curated = {"acid-b16", "acid-b32"}  # tests/plugins/test_acid.py
    assert {f"stage/{name}" for name in {*STAGES, *curated}} == {
        name for name in shipped() if name.startswith("stage/")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_stage_takes_over_its_base_cut_to_size(stage):
    base, rows, kernel, share, times = STAGES[stage]
    recipe, over = load_recipe(base), load_recipe(f"stage/{stage}")
    options = read_plugins(recipe["plugins"])
    size = over.get("model", {}).get("size", recipe["model"]["size"])
    before = narrow(options, recipe["model"]["size"])
    after = narrow(overlay(options, read_plugins(over["plugins"])), size)
    assert after.patchifier.grid == (rows, rows)
    fitted = fit_state(before.state_dict(), after, Surgery())
    expected = [name for name, resized in (("pos_embed", rows != 16), ("embed.weight", kernel)) if resized]
    towers = ["model.vision", "plugins.ema_teacher.vision"] if "ema_teacher" in after.plugins else ["model.vision"]
    assert sorted(fitted.resized) == sorted(f"{tower}.{name}" for tower in towers for name in expected)
    assert not fitted.fresh
    total = recipe["trainer"]["max_steps"]
    assert over["trainer"]["max_steps"] == round((total - math.ceil(share * total)) * times)


def test_naflex_stage_halves_the_batch_of_the_longest_sequence_and_doubles_its_steps():
    (_, options), *_ = [item for item in read_plugins(load_recipe("stage/naflex")["plugins"]).items() if item[1]]
    patchifier = catalogue()["naflex"].cls(**options).patchifier()
    round_of_six = sorted((layout.seq_len, layout.batch_size) for layout in map(patchifier.layout, range(6)))
    assert round_of_six == [(n, 32768) for n in (128, 256, 576, 784)] + [(1024, 16384)] * 2


def test_folder_of_recipes_is_described():
    page = (recipes_folder() / "README.md").read_text()
    missing = [name for name in shipped() if not name.startswith("size/") and name.split("/")[-1] not in page]
    assert missing == []
