"""The house holds together: layers as declared, and a stranger's package installs, is listed, and trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "siglip2-koleo"


def run(*command, cwd, path=()):
    """Runs a command on one thread, with further folders on PYTHONPATH; returns what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def siglip2(*arguments, cwd, path=()):
    return run(sys.executable, "-m", "siglip2", *arguments, cwd=cwd, path=path)


def test_imports_keep_to_the_layers(tmp_path):
    printed = run(
        Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache", cwd=ROOT
    )
    assert "0 broken" in printed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip installed the example, as a stranger would into an environment."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    run("cp", "-r", EXAMPLE, source, cwd=ROOT)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder)
    run(*pip, source / EXAMPLE.name, cwd=source)
    return folder


@pytest.fixture
def recipe(tmp_path, toy_shards, toy_tokenizer):
    """A recipe of two steps on the toy shards, with KoLeo enabled by one line."""
    path = tmp_path / "koleo.yaml"
    fixed = {"image_size": 32, "patch_size": 16, "batch_size": 4}
    data = {"tokenizer": str(toy_tokenizer), "text": {"length": 16}, "train": {"path": str(toy_shards)}}
    trainer = {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path / "run")}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    written = {
        "plugins": [{"fixed": fixed}, "sigmoid", "koleo"],
        "model": {"size": "tiny/16", "warmup": 1},
        "data": {**data, "num_workers": 0},
        "trainer": {**trainer, **quiet},
    }
    path.write_text(yaml.safe_dump(written))
    return path


@pytest.mark.slow
def test_installed_example_is_listed_with_its_origin(installed, tmp_path):
    listed = siglip2("plugins", "koleo", cwd=tmp_path, path=[installed])
    assert "koleo  objective  siglip2-koleo 0.1.0" in listed
    assert "least distance inside the logarithm" in listed


@pytest.mark.slow
def test_recipe_trains_with_the_installed_example(installed, recipe, tmp_path):
    siglip2("fit", "--config", recipe, "--report=false", cwd=tmp_path, path=[installed])
    assert list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.slow
def test_recipe_without_the_example_installed_says_which_plugin_is_missing(recipe, tmp_path):
    command = [sys.executable, "-m", "siglip2", "fit", "--config", str(recipe)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no plugin called 'koleo'" in done.stderr


@pytest.mark.slow
def test_tests_of_the_example_pass(installed):
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE, cwd=EXAMPLE, path=[installed])
