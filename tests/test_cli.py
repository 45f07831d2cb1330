"""The commands, as a user types them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from siglip2.cli.main import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def printed(capsys):
    """Runs `siglip2 ...` and returns what it printed."""

    def run(*arguments):
        with contextlib.suppress(SystemExit):  # what only prints ends with one; a failure prints nothing to stdout
            main([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


def test_module_runs_as_a_program_and_lists_plugins():
    command = [sys.executable, "-m", "siglip2", "plugins", "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert listed["sigmoid"]["kind"] == "objective"
    assert listed["fixed"]["kind"] == "patchifier"
    assert listed["fixed"]["origin"] == "built-in"
    assert listed["fixed"]["options"]["image_size"]["help"] == "side of the square in pixels."


def test_plugins_prints_name_kind_origin_summary_and_options(printed):
    text = printed("plugins", "sigmoid")
    for expected in ("sigmoid", "objective", "built-in", "Sigmoid loss over all image-text pairs", "weight", "1.0"):
        assert expected in text


def test_importing_the_package_imports_no_torch():
    code = "import sys, siglip2; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_printed_config_fed_back_prints_itself(printed, tiny_recipe, tmp_path):
    full = printed("fit", *tiny_recipe, "--plugins.sigmoid.weight", "0.5", "--print_config")
    (tmp_path / "full.yaml").write_text(full)
    assert printed("fit", "--config", tmp_path / "full.yaml", "--print_config") == full
    assert yaml.safe_load(full)["plugins"]["sigmoid"]["weight"] == 0.5


def test_command_line_enables_sets_and_disables_plugins_by_name(printed, tiny_recipe):
    both = yaml.safe_load(printed("fit", *tiny_recipe, "--plugins.sigmoid.start", "0.5", "--print_config"))
    assert both["plugins"]["sigmoid"]["start"] == 0.5
    off = yaml.safe_load(printed("fit", *tiny_recipe, "--plugins.sigmoid", "off", "--print_config"))
    assert off["plugins"].get("sigmoid") is None


def test_overlay_file_sets_and_disables_plugins_by_name(printed, tiny_recipe, tmp_path):
    (tmp_path / "over.yaml").write_text("plugins:\n  - fixed: {image_size: 48}\n  - sigmoid: off\n")
    merged = yaml.safe_load(printed("fit", *tiny_recipe, "--config", tmp_path / "over.yaml", "--print_config"))
    assert merged["plugins"]["fixed"]["image_size"] == 48
    assert merged["plugins"]["fixed"]["batch_size"] == 4  # from the recipe below
    assert merged["plugins"].get("sigmoid") is None


def test_interpolation_follows_overrides(printed, tiny_recipe):
    config = yaml.safe_load(printed("fit", *tiny_recipe, "--seed_everything", "7", "--print_config"))
    assert config["data"]["seed"] == 7


def test_shipped_recipe_is_reached_by_name_from_any_folder(printed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(
        printed("fit", "--config", "siglip2-b16-256", "--data.tokenizer", "t.json", "--print_config")
    )
    assert config["model"]["size"] == "B/16"
    assert config["model"]["optimizer"]["init_args"]["weight_decay"] == 0.1
    assert config["trainer"]["max_steps"] == 1220703


def test_help_of_a_plugin_is_its_docstring(printed):
    assert "side of the square in pixels" in printed("fit", "--plugins.fixed.help")


def test_tensorboard_is_one_option(tiny_recipe, tmp_path):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir"]
    main(["fit", *tiny_recipe, *logger, str(tmp_path / "tb")])
    assert list((tmp_path / "tb").rglob("events.out.tfevents*"))


def test_index_writes_counts_and_offsets(printed, toy_shards, tmp_path):
    for tar in toy_shards.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    assert "16" in printed("index", tmp_path)
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 8, "00001.tar": 8}


def test_tokenizer_train_reads_captions_of_every_language(printed, toy_shards, tmp_path):
    out = tmp_path / "tokenizer.json"
    printed("tokenizer", "train", toy_shards, "--caption", "json.caption", "--vocab-size", "320", "--out", out)
    from siglip2.core.data.text import Tokenizer

    tokenizer = Tokenizer.load(out)
    assert tokenizer.decode(tokenizer("kiste in grün")) == "kiste in grün"


def test_emoji_world_is_written_by_the_command(printed, tmp_path):
    options = ["--scenes", "6", "--singles", "6", "--val", "4", "--emoji", "8", "--unseen", "2", "--size", "48"]
    assert "train 12" in printed("data", "emoji-world", "--out", tmp_path / "world", *options)


def test_predict_ranks_free_texts_with_the_contract_of_the_checkpoint(printed, tiny_recipe, tmp_path):
    from siglip2.testing import TinySource

    main(["fit", *tiny_recipe])
    (tmp_path / "a.png").write_bytes(TinySource().read(3).record["png"])
    (tmp_path / "tokenizer.json").write_text("never read: the checkpoint carries its own")
    arguments = ["--ckpt_path", tmp_path / "step=10.ckpt", "--images", tmp_path / "a.png"]
    lines = printed("predict", *arguments, "--json", "--texts", "a gold disc", "A GOLD DISC", "eine Kiste").splitlines()
    texts = json.loads(lines[-1])["texts"]
    assert sum(t["share"] for t in texts) == pytest.approx(1)
    assert [t["match"] for t in texts] == sorted((t["match"] for t in texts), reverse=True)
    by_text = {t["text"]: t["match"] for t in texts}
    assert by_text["a gold disc"] == pytest.approx(by_text["A GOLD DISC"])  # lower-cased, as trained


def test_fit_writes_report_and_evaluates_every_language(tiny_recipe, toy_shards, tmp_path, capsys):
    names = [{"names": {"en": f"number {i}", "de": f"Nummer {i}"}} for i in range(8)]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": names}))
    toys = {"toys": {"path": str(toy_shards), "classes": str(tmp_path / "classes.json")}}
    pairs = {"pairs": {"path": str(toy_shards), "languages": ["en", "de"], "fields": {"caption": "json.caption"}}}
    evaluation = ["--data.zero_shot", json.dumps(toys), "--data.retrieval", json.dumps(pairs)]
    more = ["--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "5", "--data.eval_batch_size", "5"]
    main(["fit", *tiny_recipe, *evaluation, *more])
    page = (tmp_path / "report.html").read_text()
    for expected in ("English", "German", "toys", "pairs", "train/sigmoid"):
        assert expected in page
    assert "Zero-shot classification" in capsys.readouterr().out


@pytest.mark.slow
def test_built_wheel_carries_its_recipes_and_works_from_any_folder(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import siglip2, sys; from siglip2.cli.main import main; print(siglip2.__file__); main(sys.argv[1:])"
    options = ["fit", "--config", "quickstart", "--config", "size/b32", "--print_config"]
    run = [sys.executable, "-c", code, *options]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "size: B/32" in done.stdout
