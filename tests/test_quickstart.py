"""The quickstart in small: the same commands and the same recipe, fewer emoji and fewer steps."""

import json
import tarfile
from pathlib import Path

import pytest

from siglip2.cli.main import main
from siglip2.core.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
CLASSES = 8
WORLD = [
    "--scenes",
    "400",
    "--singles",
    "1200",
    "--emoji",
    str(CLASSES),
    "--unseen",
    "2",
    "--val",
    "96",
    "--size",
    "64",
]


def test_small_quickstart_learns_writes_its_report_and_answers_free_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world = "data/emoji-world"
    main(["data", "emoji-world", "--out", world, *WORLD])
    train = ["--caption", "json.captions", "--vocab-size", "800", "--out", f"{world}/tokenizer.json"]
    main(["tokenizer", "train", f"{world}/train", *train])
    short = ["--trainer.max_steps", "450", "--model.warmup", "10", "--plugins.fixed.batch_size", "64"]
    main(
        ["fit", "--config", "quickstart", *short, "--model.logit_bias", "-4", "--trainer.enable_progress_bar", "false"]
    )

    assert read_checkpoint("runs/quickstart/last.ckpt")["global_step"] == 450
    page = Path("runs/quickstart/report.html").read_text(encoding="utf-8")
    assert "English" in page

    with tarfile.open(f"{world}/val-single/000000.tar") as tar:
        pictures = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    names = {c["id"]: c["names"]["en"] for c in json.loads(Path(f"{world}/classes.json").read_text())["classes"]}
    asked = [name for name in pictures if name.endswith(".jpg")][:48]
    for name in asked:
        Path(name).write_bytes(pictures[name])
    capsys.readouterr()
    found = ["--images", *asked, "--texts", *names.values(), "--json"]
    main(["predict", "--ckpt_path", "runs/quickstart/last.ckpt", *found])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    truth = [names[json.loads(pictures[name.replace(".jpg", ".json")])["emoji"][0]] for name in asked]
    right = sum(a["texts"][0]["text"] == t for a, t in zip(answers, truth, strict=True))
    # 48 guesses among 8 names: a model that learned nothing is right 6 times, and 15 times or more in 1 of 1000 runs
    assert right >= 16, f"{right} of {len(asked)}"
