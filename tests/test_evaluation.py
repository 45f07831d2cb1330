"""A checkpoint alone is enough to score, use and resume it; and the scores do not depend on how many look."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch import nn
from webdataset import TarWriter

import siglip2.registry
from siglip2 import Objective, hookimpl
from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks import zero_shot
from siglip2.core.views import IMAGE
from siglip2.testing import TinySource


class Extra(Objective):
    """An objective of another package, with a parameter of its own."""

    name = "extra"

    @hookimpl
    def setup(self, model):
        self.head = nn.Linear(model.embed_dim, 1)

    @hookimpl
    def views(self):
        return [IMAGE]

    def loss(self, step):
        return self.head(step.encode_image("image").embedding).square().mean()


class Whole(Objective):
    """Finds every text everywhere: its box is the whole picture."""

    name = "whole"

    @hookimpl
    def views(self):
        return [IMAGE]

    def loss(self, step):
        return step.encode_image("image").embedding.square().mean()

    def caption(self, tokens_BND, tokenizer, *, language="", valid=None):
        return [f"a picture in {language}"] * len(tokens_BND)

    def locate(self, tokens_BND, texts, tokenizer, *, language="", valid=None):
        return torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(texts), 1)

    def describe(self, tokens_BND, boxes_B4, tokenizer, *, language="", valid=None):
        return ["a part of a picture"] * len(boxes_B4)


def install(points, *plugins):
    """Makes plugins known as those of a package; returns what takes it away again."""

    class Module:
        @hookimpl
        def register_plugins(self):
            return list(plugins)

    def remove():
        points.clear()
        siglip2.registry.catalogue.cache_clear()

    dist = SimpleNamespace(name="extra-package", version="1.2")
    points.append(SimpleNamespace(name="extra", value="extra", dist=dist, load=Module))
    siglip2.registry.catalogue.cache_clear()
    return remove


@pytest.fixture
def extra_package(third_party_plugins):
    """Installs a package with the plugin `extra`; `extra_package.remove()` takes it away again."""
    return SimpleNamespace(remove=install(third_party_plugins, Extra))


@pytest.fixture
def whole_package(third_party_plugins):
    """Installs a package with the plugin `whole`."""
    install(third_party_plugins, Whole)


@pytest.fixture
def ran(capsys, monkeypatch):
    """Runs `siglip2 ...` and returns (stdout, stderr), on a terminal wide enough not to break lines."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        capsys.readouterr()
        main([str(a) for a in arguments])
        return capsys.readouterr()

    return run


@pytest.fixture
def evaluation(toy_shards, tmp_path):
    """Arguments for a zero-shot and a retrieval set; batches of five, so that the last one is uneven."""
    names = [{"names": {"en": f"number {i}", "de": f"Nummer {i}"}} for i in range(8)]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": names}))
    toys = {"toys": {"path": str(toy_shards), "classes": str(tmp_path / "classes.json")}}
    pairs = {"pairs": {"path": str(toy_shards), "languages": ["en", "de"], "fields": {"caption": "json.caption"}}}
    sets = ["--data.zero_shot", json.dumps(toys), "--data.retrieval", json.dumps(pairs)]
    return [*sets, "--data.eval_batch_size", "5", "--trainer.limit_val_batches", "1.0", "--report", "false"]


def scores(printed):
    """The rows of the printed tables: set, language and numbers, as text."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert sorted((row[0], row[1]) for row in rows) == [(name, x) for name in ("pairs", "toys") for x in ("de", "en")]
    return rows


def test_checkpoint_alone_scores_as_the_end_of_the_run(ran, tiny_recipe, evaluation, tmp_path):
    expected = scores(ran("fit", *tiny_recipe, *evaluation).out)
    assert [row[2] for row in expected] == ["16"] * 4
    for command in ("validate", "test"):
        assert scores(ran(command, "--ckpt_path", tmp_path / "step=10.ckpt").out) == expected
    earlier = scores(ran("validate", f"--ckpt_path={tmp_path / 'step=5.ckpt'}").out)
    assert earlier != expected  # the scores are those of the weights in the file


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_scoring_without_a_checkpoint_is_refused(command, tiny_recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, *tiny_recipe])
    assert stopped.value.code == 2
    message = f"`siglip2 {command}` needs trained weights: give --ckpt_path, a file that `siglip2 fit` wrote"
    assert message in capsys.readouterr().err


@pytest.mark.dist
def test_two_processes_print_the_scores_and_counts_of_one(ran, tiny_recipe, evaluation, tmp_path):
    """Sixteen samples in batches of five on two ranks: the last batch of each is partly or wholly filled up."""
    ran("fit", *tiny_recipe, *evaluation)
    expected = scores(ran("validate", "--ckpt_path", tmp_path / "step=10.ckpt").out)
    command = [sys.executable, "-m", "siglip2", "validate", "--ckpt_path", str(tmp_path / "step=10.ckpt")]
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, *ranks], cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert scores(done.stdout) == expected
    assert "2 processes" in done.stderr or "MEMBER: 2/2" in done.stderr


def evaluated(arguments):
    """Every score of `siglip2 validate`, to the last digit, and how many rows each tower encoded."""
    whole, rows = zero_shot.class_vectors, {"vision": 0, "text": 0}
    zero_shot.class_vectors = partial(whole, batch_size=3)  # several batches of prompts, the last one uneven
    try:
        cli = SigLIP2CLI(arguments, command="validate")
        for name in rows:

            def count(module, inputs, name=name):
                rows[name] += getattr(inputs[0], "num_images", None) or len(inputs[0])

            getattr(cli.model.model, name).register_forward_pre_hook(count)
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False)
    finally:
        zero_shot.class_vectors = whole
    found = [*cli.zero_shot.rows, *cli.retrieval.rows, *cli.referring.rows]
    return [repr(asdict(row)) for row in found], rows


def one_rank(number, port, arguments, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(number)}
    torch.save(evaluated(arguments), f"{folder}/{number}.pt")


@pytest.mark.dist
def test_two_ranks_share_the_work_and_find_the_scores_of_one_to_the_last_digit(
    ran, tiny_recipe, toy_shards, evaluation, tmp_path
):
    places = ["--data.referring", json.dumps({"places": {"path": str(toy_shards), "languages": ["en", "de"]}})]
    ran("fit", *tiny_recipe, "--plugins.locca", "{length: 40, depth: 1}", *evaluation, *places)
    arguments = ["--ckpt_path", str(tmp_path / "step=10.ckpt"), "--trainer.accelerator", "cpu"]
    expected, alone = evaluated([*arguments, "--trainer.devices", "1"])
    assert len(expected) == 6
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [*arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    mp.spawn(one_rank, args=(port, ranks, str(tmp_path)), nprocs=2)
    for number in range(2):
        found, rows = torch.load(tmp_path / f"{number}.pt")
        assert found == expected
        assert rows["vision"] == alone["vision"] / 2
        assert rows["text"] < 0.7 * alone["text"]


def test_predict_as_json_prints_one_object_per_picture_and_nothing_else(ran, tiny_recipe, tmp_path):
    ran("fit", *tiny_recipe, "--report", "false")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(TinySource().read(i).record["png"])
    use = ["predict", "--ckpt_path", tmp_path / "step=10.ckpt", "--images", *paths, "--texts", "a", "b", "--json"]
    assert [json.loads(line)["image"] for line in ran(*use).out.splitlines()] == [str(path) for path in paths]


def test_plugin_that_is_not_installed_is_not_needed_to_predict(ran, tiny_recipe, tmp_path, extra_package):
    ran("fit", *tiny_recipe, "--plugins.extra", "on", "--report", "false")
    picture = tmp_path / "a.png"
    picture.write_bytes(TinySource().read(3).record["png"])
    use = ["predict", "--ckpt_path", tmp_path / "step=10.ckpt", "--images", picture, "--json", "--texts", "a", "b"]
    with_it = ran(*use)
    extra_package.remove()
    without = ran(*use)
    assert json.loads(without.out) == json.loads(with_it.out)
    assert "trained with the plugin 'extra', which is not installed: doing without" in without.err
    assert "plugin 'extra' is in the checkpoint but not in this recipe: it is dropped" in without.err
    assert "not installed" not in with_it.err


def test_printed_recipe_with_a_plugin_off_works_where_it_is_not_installed(ran, tiny_recipe, tmp_path, extra_package):
    def printed(*arguments):
        with pytest.raises(SystemExit):
            ran("fit", *arguments, "--print_config")

    for name in ("here", "there"):
        given = tiny_recipe if name == "here" else ["--config", str(tmp_path / "here.yaml")]
        with pytest.MonkeyPatch.context() as patch, (tmp_path / f"{name}.yaml").open("w") as file:
            patch.setattr(sys, "stdout", file)
            printed(*given)
        extra_package.remove()
    here, there = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("here", "there"))
    assert "extra" in here["plugins"]
    assert here["plugins"].pop("extra") is None
    assert there == here


def test_checkpoint_alone_is_resumed_with_the_recipe_in_it(ran, tiny_recipe, tmp_path):
    ran("fit", *tiny_recipe, "--model.warmup", "3", "--report", "false")
    last = tmp_path / "step=10.ckpt"
    whole = torch.load(last, weights_only=True)
    last.unlink()
    ran("fit", "--ckpt_path", tmp_path / "step=5.ckpt")
    resumed = torch.load(last, weights_only=True)
    assert resumed["global_step"] == 10
    assert resumed["siglip2"]["recipe"]["model"] == whole["siglip2"]["recipe"]["model"]
    assert resumed["siglip2"]["recipe"]["model"]["warmup"] == 3
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in resumed["state_dict"].items())


def test_broken_picture_is_named_and_left_out_of_the_scores(ran, tiny_recipe, evaluation, tmp_path):
    ran("fit", *tiny_recipe, *evaluation)
    folder, source = tmp_path / "broken", TinySource()
    folder.mkdir()
    with open(folder / "a.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
        for i in range(16):
            sample = source.read(i)
            picture = b"\x89PNG broken" if i == 12 else sample.record["png"]
            tar.write({"__key__": sample.key, "png": picture, "json": sample.record["json"]})
    sets = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]
    for kind in ("zero_shot", "retrieval"):
        for settings in sets[kind].values():
            settings["path"] = str(folder)
    changed = [x for kind in ("zero_shot", "retrieval") for x in (f"--data.{kind}", json.dumps(sets[kind]))]
    printed = ran("validate", "--ckpt_path", tmp_path / "step=10.ckpt", *changed)
    assert [row[2] for row in scores(printed.out)] == ["15"] * 4
    named = re.findall(r"left out of the evaluation: (\S+): (\w+): (.*)", printed.err)
    assert [(where, key) for where, key, _ in named] == [(str(folder / "a.tar"), "0012")]


def test_referring_set_is_scored_logged_and_shown_in_the_report(ran, tiny_recipe, toy_shards, tmp_path, whole_package):
    sets = {"places": {"path": str(toy_shards), "languages": ["en", "de"]}}
    pairs = {"pairs": {"path": str(toy_shards), "languages": ["de"], "fields": {"caption": "json.caption"}}}
    evaluation = ["--data.referring", json.dumps(sets), "--data.retrieval", json.dumps(pairs)]
    often = ["--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "5", "--data.eval_batch_size", "5"]
    printed = ran("fit", *tiny_recipe, *evaluation, *often, "--plugins.whole", "on").out
    boxes = [json.loads(TinySource().read(i).record["json"])["regions"][0]["box"] for i in range(16)]
    share = sum((xmax - xmin) * (ymax - ymin) for xmin, ymin, xmax, ymax in boxes) / 16  # of the picture, so the IoU
    rows = [line for line in printed.splitlines() if line.startswith("│ places")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rows]
    assert cells == [["places", x, "16", "0.0%", f"{share:.3f}"] for x in ("en", "de")]
    assert [line in ran("validate", "--ckpt_path", tmp_path / "step=10.ckpt").out for line in rows] == [True, True]
    record = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["callbacks"]["RunRecord"]
    assert record["history"]["val/referring/places/en/iou"][5] == pytest.approx(share, abs=1e-5)
    page = (tmp_path / "report.html").read_text()
    for expected in ('id="referring"', 'id="boxes"', 'id="captions"', "a picture in de", "Referring accuracy, English"):
        assert expected in page


def test_recipe_without_a_decoder_trains_with_a_referring_set_and_says_what_is_not_scored(
    ran, tiny_recipe, toy_shards, tmp_path
):
    sets = {"places": {"path": str(toy_shards)}}
    printed = ran("fit", *tiny_recipe, "--data.referring", json.dumps(sets), "--trainer.limit_val_batches", "1.0")
    assert "no plugin can locate texts yet: referring sets (places) are not scored" in printed.err
    assert "Referring" not in printed.out
    assert 'id="boxes"' not in (tmp_path / "report.html").read_text()
