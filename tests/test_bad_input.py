"""What users get wrong: the message says what was found, where, and the next move, and nothing is lost."""

import io
import json
import math
import re
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from siglip2.cli.main import main
from siglip2.cli.training import SigLIP2CLI
from siglip2.core.batch import Batch, Fault
from siglip2.core.callbacks.faults import FaultCounter

STAGED = str(Path(__file__).parent / "staged.yaml")


@pytest.fixture
def failed(capsys):
    """Runs `siglip2 ...`, expects exit status 2, and returns what was printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def shards(toy_shards, tmp_path):
    """A copy of the toy shards that a test may damage."""
    return shutil.copytree(toy_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("*.index"))


def rewrite(path, change):
    """Passes every member (name, bytes) of a tar through `change`, which returns the new bytes or None to drop it."""
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            data = change(member.name, data)
            if data is not None:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_unknown_plugin_suggests_the_right_name(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--plugins.sigmod.weight", "2")
    assert "no plugin called 'sigmod', did you mean 'sigmoid'? Installed: acid, ema_teacher, fixed, locca," in message


def test_unknown_plugin_option_lists_the_options(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--plugins.sigmoid.wieght", "2")
    assert "plugin 'sigmoid' has no option 'wieght', did you mean 'weight'? Its options: weight, start, stop" in message


def test_unknown_plugin_in_a_file_names_the_file(failed, tiny_recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text("plugins:\n  - sigmod\n")
    message = failed("fit", *tiny_recipe, "--config", tmp_path / "mine.yaml")
    assert "mine.yaml" in message
    assert "did you mean 'sigmoid'" in message


def test_misspelt_model_option_suggests_the_right_one(failed, tiny_recipe):
    assert "did you mean 'model.warmup'?" in failed("fit", *tiny_recipe, "--model.warmpu", "2")


def test_value_of_the_wrong_type_names_option_and_type(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--plugins.fixed.image_size", "large")
    assert "plugins.fixed" in message
    assert "image_size" in message
    assert "Expected a <class 'int'>" in message


def test_recipe_without_a_patchifier_says_which_to_enable(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--plugins.fixed", "off")
    assert "a recipe needs exactly one patchifier, found none" in message


def test_two_patchifiers_are_an_error_that_names_both():
    from siglip2 import Plugin, hookimpl
    from siglip2.plugins.fixed import Fixed
    from siglip2.testing import tiny_module

    class Second(Plugin):
        name = "second"

        @hookimpl
        def patchifier(self):
            return Fixed(image_size=32)._patchifier

    with pytest.raises(ValueError, match="found fixed and second: remove one \\(--plugins.fixed off"):
        tiny_module([Fixed(image_size=32, batch_size=4), Second()])


@pytest.mark.parametrize("plugin", ["silc", "tips"])
def test_self_distillation_without_a_teacher_names_the_plugin_to_add(failed, tiny_recipe, plugin):
    message = failed("fit", *tiny_recipe, f"--plugins.{plugin}", "on")
    assert f"plugin '{plugin}' needs the encoder 'teacher': add `ema_teacher` to the recipe's plugins" in message


def test_teacher_that_wakes_after_its_pupil_is_an_error(failed, tiny_recipe):
    late = ["--plugins.ema_teacher.start", "0.9", "--plugins.silc.start", "0.5"]
    assert "'ema_teacher' is awake from 0.9 to 1: give both the same `start`" in failed("fit", *tiny_recipe, *late)


def test_two_descriptions_of_the_global_view_print_both(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--config", STAGED, "--plugins.silc.global_scale", "[0.5,1.0]")
    assert "view 'global' is described twice" in message
    assert "scale=(0.5, 1.0)" in message
    assert "scale=(0.4, 1.0)" in message


def test_recipe_without_an_objective_is_stopped_by_the_rehearsal(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--plugins.sigmoid", "off")
    assert "no objective is awake at progress 0 to 1" in message


def test_missing_shards_say_what_was_looked_for(failed, tiny_recipe, tmp_path):
    message = failed("fit", *tiny_recipe, "--data.train.path", tmp_path / "nowhere" / "{0000..0003}.tar")
    assert f"no shard {tmp_path}/nowhere/0000.tar (and 3 more of 4 shards)" in message
    assert f"{tmp_path} holds " in message
    assert "Check the path" in message


def test_empty_folder_says_what_was_expected(failed, tiny_recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    message = failed("fit", *tiny_recipe, "--data.train.path", tmp_path / "empty")
    assert f"no pictures (jpeg, jpg, png, webp) under {tmp_path / 'empty'}" in message
    assert f"{tmp_path / 'empty'} holds nothing. Check the path" in message
    assert "tar shards in folders of folders are named as data/*/*.tar" in message


def test_missing_training_data_names_the_option(failed, tiny_recipe):
    at = tiny_recipe.index("--data.train.path")
    without = tiny_recipe[:at] + tiny_recipe[at + 2 :]
    assert "error: data.train needs the option 'path'" in failed("fit", *without)
    message = failed("fit", *without, "--data.train", "null")
    assert "data.train is not set: give at least data.train.path" in message


def test_missing_caption_key_is_found_before_training_and_named(failed, tiny_recipe, shards):
    for tar in shards.glob("*.tar"):
        rewrite(tar, lambda name, data: b'{"text": "hello"}' if name.endswith("json") else data)
    message = failed("fit", *tiny_recipe, "--data.train.path", shards)
    assert "data.fields.caption" in message
    assert "json.text" in message


def test_missing_tokenizer_says_how_to_get_one(failed, tiny_recipe, tmp_path):
    message = failed("fit", *tiny_recipe, "--data.tokenizer", tmp_path / "none.json")
    assert "none.json" in message
    assert "siglip2 tokenizer train" in message


def test_warmup_longer_than_the_run_is_an_error(failed, tiny_recipe):
    assert "model.warmup is 10 steps, expected fewer than" in failed("fit", *tiny_recipe, "--model.warmup", "10")


def test_run_without_a_number_of_steps_is_told_to_give_one(failed, tiny_recipe):
    assert "trainer.max_steps is not set" in failed("fit", *tiny_recipe, "--trainer.max_steps", "-1")


def test_accumulation_is_refused_for_a_loss_over_pairs(failed, tiny_recipe):
    message = failed("fit", *tiny_recipe, "--trainer.accumulate_grad_batches", "2")
    assert "sigmoid would see only the pairs inside each micro-batch" in message


def test_checkpoint_of_another_size_lists_the_differences(failed, tiny_recipe, tmp_path):
    main(["fit", *tiny_recipe])
    wide = ["--model.vision.width", "128", "--ckpt_path", str(tmp_path / "step=5.ckpt")]
    message = failed("fit", *tiny_recipe, *wide)
    assert "the checkpoint holds another model than this recipe builds" in message
    assert "model.vision.embed.weight: found [64, 768], expected [128, 768]" in message


def test_checkpoint_with_another_text_contract_is_refused(failed, tiny_recipe, tmp_path):
    main(["fit", *tiny_recipe])
    message = failed("fit", *tiny_recipe, "--data.text.canonicalize", "true", "--ckpt_path", tmp_path / "step=5.ckpt")
    assert "the checkpoint was trained with another text contract" in message
    assert "canonicalize" in message


def test_file_that_is_no_checkpoint_is_named(failed, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    assert "broken.ckpt cannot be read as a checkpoint" in failed("predict", "--ckpt_path", tmp_path / "broken.ckpt")


def counted(arguments):
    cli = SigLIP2CLI([str(a) for a in arguments], command="fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return next(c for c in cli.trainer.callbacks if isinstance(c, FaultCounter))


def test_undecodable_image_is_counted_named_and_skipped(tiny_recipe, shards):
    rewrite(shards / "00001.tar", lambda name, data: b"\xff\xd8broken" if name == "0012.png" else data)
    counter = counted([*tiny_recipe, "--data.train.path", shards])
    assert counter.bad >= 1
    assert any("00001.tar: 0012" in line for line in counter.examples)


def test_sample_without_caption_is_counted_and_skipped(tiny_recipe, shards):
    rewrite(shards / "00001.tar", lambda name, data: b"{}" if name == "0012.json" else data)
    counter = counted([*tiny_recipe, "--data.train.path", shards])
    assert counter.bad >= 1
    assert any("no caption" in line for line in counter.examples)


BAD_REGIONS = {
    "0001": [{"box": [0.2, 0.2, 1.4, 0.5], "captions": {"en": "beyond the edge"}}],
    "0002": [{"box": [0.5, 0.2, 0.5, 0.6], "captions": {"en": "no width"}}],
    "0003": [{"captions": {"en": "no box"}}],
    "0004": [{"box": [0.1, 0.1, 0.5, 0.5], "captions": {"en": " "}}],
    "0005": None,
    "0006": [{"box": [0.1, 0.1, float("nan"), 0.5], "captions": {"en": "not a number"}}],
}


def test_bad_regions_and_long_captions_are_noted_and_the_rest_is_trained_on(tiny_recipe, shards):
    """Boxes outside [0, 1], without area, missing or no numbers; no text; no regions; more tokens than fit."""

    def spoil(name, data):
        key, _, kind = name.partition(".")
        if kind != "json":
            return data
        meta = json.loads(data)
        if key in BAD_REGIONS:
            meta["regions"] = BAD_REGIONS[key]
        if key == "0007":
            meta["caption"] = {"en": "a red disc and " * 40}
        return json.dumps(meta).encode()

    for shard in shards.glob("*.tar"):
        rewrite(shard, spoil)
    cli = SigLIP2CLI([*tiny_recipe, "--config", STAGED, "--data.train.path", str(shards)], command="fit")
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    cli.trainer.callbacks.append(Watch())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    counter = next(c for c in cli.trainer.callbacks if isinstance(c, FaultCounter))
    assert counter.bad == 0
    assert {"bad box", "no region text", "caption cut", "caption cut for the decoder"} <= set(counter.notes)
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)
    assert all(tensor.isfinite().all() for tensor in cli.model.state_dict().values())


def test_notes_are_logged_by_name_and_survive_a_checkpoint(caplog):
    counter, again = FaultCounter(), FaultCounter()
    batch = Batch({}, 4, 0, notes=(Fault("a.tar", "0001", "bad box: region 0 has [2, 0, 3, 1]"),))
    for _ in range(2):
        counter.on_train_batch_start(None, None, batch, 0)
    assert "a.tar: 0001: bad box: region 0 has [2, 0, 3, 1]" in caplog.text
    again.load_state_dict(counter.state_dict())
    assert again.notes == {"bad box": 2}
    assert again.bad == 0


def test_tar_cut_in_the_middle_keeps_the_samples_before_the_cut_and_says_what_to_do(
    tiny_recipe, shards, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")  # so that the log line is not broken
    cut = shards / "00001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    source = SigLIP2CLI([*tiny_recipe, "--data.train.path", str(shards)], command="fit").datamodule.train_source
    assert 8 < len(source) < 16
    assert [source.read(i).key for i in range(len(source))] == [f"{i:04d}" for i in range(len(source))]
    said = re.findall(
        rf"damaged shard in {shards}: 00001\.tar: cut at byte (\d+).*; (\d+) samples before it are kept(.*)",
        capsys.readouterr().err,
    )
    assert [(int(byte), int(kept)) for byte, kept, _ in said] == [(cut.stat().st_size, len(source) - 8)]
    assert "write or download it again, then run `siglip2 index`" in said[0][2]


def test_run_past_the_rate_of_bad_samples_stops_with_a_report():
    from siglip2.core.batch import Batch, Fault

    counter = FaultCounter(max_bad=0.1, patience=10)
    faults = (Fault("a.tar", "k1", "no caption"), Fault("a.tar", "k2", "no caption"))
    bad = Batch({}, 4, 0, keys=("a", "b", "c", "d"), faults=faults)
    counter.on_train_batch_start(None, None, bad, 0)  # 6 seen: too early to judge
    with pytest.raises(RuntimeError, match=r"4 of 12 samples .* \(4 x no caption\).*a\.tar: k2.*max_bad = 0\.1"):
        counter.on_train_batch_start(None, None, bad, 1)


def test_disk_full_while_saving_keeps_the_last_checkpoint_and_says_where(failed, tiny_recipe, tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, as it does there."""
    main(["fit", *tiny_recipe])
    kept = tmp_path / "step=5.ckpt"
    before = kept.read_bytes()
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        message = failed("fit", *tiny_recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "could not be written to" in message
    assert "Earlier checkpoints are untouched" in message
    assert "--ckpt_path" in message
    assert kept.read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))
    assert torch.load(kept, weights_only=True)["global_step"] == 5


def test_command_that_does_not_exist_suggests_one(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tokeniser", "train"])
    assert "did you mean 'tokenizer train'" in str(stopped.value)


def test_predict_without_texts_shows_an_example(failed, tiny_recipe, tmp_path):
    main(["fit", *tiny_recipe])
    message = failed("predict", "--ckpt_path", tmp_path / "step=10.ckpt", "--images", tmp_path)
    assert "--texts" in message


def test_predict_names_a_picture_that_is_not_there(failed, tiny_recipe, tmp_path):
    main(["fit", *tiny_recipe])
    message = failed("predict", "--ckpt_path", tmp_path / "step=10.ckpt", "--images", "nope.png", "--texts", "a")
    assert "no picture at 'nope.png'" in message


def test_zero_shot_classes_without_a_language_are_named(failed, tiny_recipe, toy_shards, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [{"names": {"en": str(i)}} for i in range(8)]}))
    toys = {"toys": {"path": str(toy_shards), "classes": str(tmp_path / "classes.json"), "languages": ["fr"]}}
    extra = [
        "--data.zero_shot",
        json.dumps(toys),
        "--trainer.limit_val_batches",
        "1",
        "--trainer.val_check_interval",
        "5",
    ]
    assert "no name for some class in fr" in failed("fit", *tiny_recipe, *extra)
