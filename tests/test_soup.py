"""`siglip2 soup`: the weights between two checkpoints, as a checkpoint, and only between those of one model."""

import copy
import json

import pytest
import torch

from siglip2.cli.main import main
from siglip2.cli.soup import soup
from siglip2.cli.training import SigLIP2CLI, fit
from siglip2.core.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def two(toy_shards, toy_tokenizer, tmp_path_factory):
    """Two checkpoints of one run."""
    folder = tmp_path_factory.mktemp("run")
    options = {"data.train.path": toy_shards, "data.tokenizer": toy_tokenizer, "trainer.default_root_dir": folder}
    fit(["--config", "tests/tiny.yaml", "--report=false", *(f"--{name}={value}" for name, value in options.items())])
    return folder / "step=5.ckpt", folder / "step=10.ckpt"


@pytest.fixture
def read(two):
    """Both, as they are read."""
    return [read_checkpoint(str(path)) for path in two]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_soup_is_the_weighted_mean_of_every_tensor_of_the_product(read, alpha):
    a, b = (c["state_dict"] for c in read)
    mixed = soup(*read, alpha)["state_dict"]
    assert set(mixed) == {name for name in a if name.startswith("model.")}
    for name, tensor in mixed.items():
        expected = (1 - alpha) * a[name].double() + alpha * b[name].double()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-9)
    assert not torch.equal(a["model.text.head.weight"], b["model.text.head.weight"])


def test_command_writes_a_checkpoint_that_validates_and_that_a_run_starts_from(two, capsys, tmp_path):
    out = tmp_path / "mixed.ckpt"
    main(["soup", *map(str, two), "--alpha", "0.3", "--out", str(out)])
    assert "0.7 of" in capsys.readouterr().out
    written = read_checkpoint(str(out))
    assert written["siglip2"]["soup"] == {"of": [str(path) for path in two], "alpha": 0.3}
    path = written["siglip2"]["recipe"]["data"]["train"]["path"]
    pairs = {"pairs": {"path": path, "fields": {"caption": "json.caption"}}}
    cli = SigLIP2CLI(["--ckpt_path", str(out), f"--data.retrieval={json.dumps(pairs)}"], command="validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=str(out), verbose=False)
    assert torch.equal(
        cli.model.state_dict()["model.text.head.weight"], written["state_dict"]["model.text.head.weight"]
    )
    recipe = ["--config", "tests/tiny.yaml", "--data.tokenizer", str(out), f"--trainer.default_root_dir={tmp_path}"]
    start = [f"--model.warm_start={out}", "--model.surgery.schedule=fresh", "--trainer.max_steps=5"]
    fit([*recipe, *start, f"--data.train.path={path}", "--report=false"])
    assert (tmp_path / "step=5.ckpt").is_file()


def test_scaffolding_leaves_the_weights_the_recipe_s_plugins_and_its_rules(read):
    b = copy.copy(read[1])
    b["state_dict"] = {**b["state_dict"], "plugins.silc.head.weight": torch.zeros(2)}
    recipe = {**b["siglip2"]["recipe"], "plugins": {"fixed": {}, "sigmoid": {}, "silc": {"weight": 1.0}}}
    b["siglip2"] = {**b["siglip2"], "recipe": recipe}
    mixed = soup(read[0], b, 0.5)
    assert not any(name.startswith("plugins.") for name in mixed["state_dict"])
    assert mixed["siglip2"]["recipe"]["plugins"] == {"fixed": {}, "sigmoid": {}, "silc": None}
    assert mixed["siglip2"]["recipe"]["model"]["rules"] == []


def test_other_shapes_other_pixels_and_other_texts_are_named(read):
    a, b = read
    other = copy.copy(b)
    other["state_dict"] = {**b["state_dict"], "model.logit_bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"model.logit_bias: A \[1\] torch.float32, B \[3\] torch.float32"):
        soup(a, other, 0.5)
    other = {**b, "siglip2": {**b["siglip2"], "pixels": {**b["siglip2"]["pixels"], "antialias": "odd"}}}
    with pytest.raises(ValueError, match="pixels: antialias: A True, B odd"):
        soup(a, other, 0.5)
    text = copy.deepcopy(b["siglip2"]["text"])
    text["contract"]["length"] = 12
    with pytest.raises(ValueError, match=r"text: .*length"):
        soup(a, {**b, "siglip2": {**b["siglip2"], "text": text}}, 0.5)


def test_share_outside_of_zero_to_one_is_refused(read):
    with pytest.raises(ValueError, match="--alpha is a share"):
        soup(*read, 1.5)


def test_soup_does_not_overwrite_what_it_is_made_of(two, capsys):
    with pytest.raises(SystemExit):
        main(["soup", *map(str, two), "--out", str(two[0])])
    assert "choose another --out" in capsys.readouterr().err
