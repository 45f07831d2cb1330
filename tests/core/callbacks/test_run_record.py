"""The record of a run survives a resume, and its report cannot harm it."""

import json
import re
from types import SimpleNamespace

from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.batch import Batch
from siglip2.core.callbacks.run_record import RunRecord


def fitted(arguments):
    cli = SigLIP2CLI(arguments, command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    return cli.report


def test_history_of_a_resumed_run_is_that_of_the_whole_run(tiny_recipe, tmp_path):
    whole = fitted(tiny_recipe)
    resumed = fitted([*tiny_recipe, "--ckpt_path", str(tmp_path / "step=5.ckpt")])
    assert list(whole.history["train/loss"]) == list(range(1, 11))
    for name in ("train/loss", "train/sigmoid", "logit_bias", "lr"):
        assert resumed.history[name] == whole.history[name]
    assert resumed._images == whole._images == 10 * 4
    assert resumed._trained_s > 0


def test_images_of_a_host_are_counted_once_although_a_batch_has_the_rows_of_all():
    record, trainer = RunRecord(None, None, None), SimpleNamespace(world_size=2, global_step=1, log_every_n_steps=2)
    record.on_train_batch_end(trainer, None, None, Batch({}, 8, 0, keys=("a", "b", "c", "d")), 0)
    assert record.state_dict()["images"] == 8


def test_report_says_which_parts_of_samples_were_left_out(tiny_recipe, toy_shards, tmp_path):
    short = ["--data.text.length", "8"]  # the captions are longer
    pairs = {"pairs": {"path": str(toy_shards), "languages": ["en"], "fields": {"caption": "json.caption"}}}
    evaluated = ["--data.retrieval", json.dumps(pairs), "--trainer.limit_val_batches", "1.0"]
    main(["fit", *tiny_recipe, *short, *evaluated])
    said = "Parts of samples were left out: in 40 samples seen in training 40 x caption cut; in the evaluation 16 x"
    assert f"{said} caption cut." in (tmp_path / "report.html").read_text()


def test_report_has_the_scores_before_and_after_a_fine_tune(tiny_recipe, toy_shards, tmp_path):
    pairs = {"new": {"path": str(toy_shards), "fields": {"caption": "json.caption"}}}
    callback = {"class_path": "siglip2.core.callbacks.retention.Retention"}
    extra = [f"--data.retrieval={json.dumps(pairs)}", f"--trainer.callbacks+={json.dumps(callback)}"]
    extra += ["--trainer.num_sanity_val_steps=-1", "--trainer.limit_val_batches=1.0", "--trainer.max_steps=5"]
    main(["fit", *tiny_recipe, *extra])
    rows = json.loads((tmp_path / "retention.json").read_text())["rows"]
    assert {row["measure"] for row in rows} == {"text to image R@1", "image to text R@1"}
    page = re.sub("<[^>]+>", " ", (tmp_path / "report.html").read_text())
    for row in rows:
        name, change = f"new · {row['measure']}", f"{100 * row['change']:+.1f}"
        assert re.search(rf"{name} +{row['before']:.1%} +{row['after']:.1%} +{re.escape(change)} ", page)


def test_report_that_cannot_be_written_leaves_the_run_complete(tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "report.html").mkdir()  # where the report should be
    main(["fit", *tiny_recipe])
    assert (tmp_path / "step=10.ckpt").is_file()
    assert "the report could not be written; the run itself is complete and saved" in capsys.readouterr().err


def test_report_can_be_turned_off(tiny_recipe, tmp_path):
    main(["fit", *tiny_recipe, "--report", "false"])
    assert not (tmp_path / "report.html").exists()
