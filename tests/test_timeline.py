"""The commands of docs/timeline.md run as written, on a smaller world and with fewer steps."""

import re
import shlex
from pathlib import Path

import pytest

from siglip2.cli.main import main
from siglip2.core.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parent.parent / "docs" / "timeline.md"
WORLD = ["--scenes", "64", "--singles", "192", "--emoji", "8", "--unseen", "2", "--val", "32", "--size", "64"]
QUIET = ["--trainer.enable_progress_bar", "false", "--report", "false", "--data.eval_batch_size", "32"]
QUIET += ["--trainer.log_every_n_steps", "1"]
STEPS = {"runs/timeline/96px": 2, "runs/timeline/128px": 2, "runs/timeline/naflex": 9}


def commands():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_timeline_runs_from_the_base_to_its_branches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world = "data/emoji-world"
    main(["data", "emoji-world", "--out", world, *WORLD])
    train = ["--caption", "json.captions", "--vocab-size", "600", "--out", f"{world}/tokenizer.json"]
    main(["tokenizer", "train", f"{world}/train", *train])
    main(["fit", "--config", "quickstart", "--trainer.max_steps", "20", "--model.warmup", "4", *QUIET])
    for fraction, step in {0.8: 16, 0.9: 18, 0.95: 19}.items():
        assert read_checkpoint(f"runs/quickstart/progress-{fraction}.ckpt")["global_step"] == step

    *branches, validate = commands()
    for words in branches:
        folder = words[words.index("--trainer.default_root_dir") + 1]
        main([*words, "--trainer.max_steps", str(STEPS[folder]), *QUIET])
        end = read_checkpoint(f"{folder}/last.ckpt")
        assert end["global_step"] == STEPS[folder]
        assert end["siglip2"]["timeline"]["position"] == 20
        assert any(name.startswith("plugins.silc.") for name in end["state_dict"]) == ("px" in folder)
    capsys.readouterr()
    main(validate)
    assert "Zero-shot" in capsys.readouterr().out
