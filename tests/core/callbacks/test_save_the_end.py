"""The last step of a run is saved and scored, whatever the interval."""

import json

import pytest
import torch

from siglip2.cli.training import SigLIP2CLI


@pytest.fixture
def finished(tiny_recipe, toy_shards, tmp_path, capsys):
    """Runs `siglip2 fit` with a retrieval set, scored every five steps; returns what is left of it."""

    def run(*more):
        pairs = {"pairs": {"path": str(toy_shards), "languages": ["en"], "fields": {"caption": "json.caption"}}}
        arguments = ["--data.retrieval", json.dumps(pairs), "--trainer.val_check_interval", "5"]
        evaluation = [*arguments, "--trainer.limit_val_batches", "1.0", "--report", "false"]
        cli = SigLIP2CLI([*tiny_recipe, *evaluation, *more], command="fit")
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        before = cli.retrieval.step
        cli.finish()
        return cli, before

    return run


def test_run_that_ends_between_two_intervals_saves_and_scores_its_last_step(finished, tmp_path):
    cli, before = finished("--trainer.max_steps", "7")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=5.ckpt", "step=7.ckpt"]
    saved = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    weights = cli.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved["state_dict"].items())
    assert before == 5
    assert cli.zero_shot.step == cli.retrieval.step == 7
    assert [row.num_images for row in cli.retrieval.rows] == [16]


def test_run_that_ends_on_an_interval_saves_and_scores_its_last_step_once(finished, tmp_path):
    cli, before = finished()
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=10.ckpt", "step=5.ckpt"]
    assert before == cli.retrieval.step == 10


def test_run_resumed_from_the_saved_end_has_nothing_left_to_do(finished, tiny_recipe, tmp_path):
    finished("--trainer.max_steps", "7")
    ended = str(tmp_path / "step=7.ckpt")
    cli = SigLIP2CLI([*tiny_recipe, "--trainer.max_steps", "7", "--ckpt_path", ended], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ended)
    assert cli.trainer.global_step == 7
