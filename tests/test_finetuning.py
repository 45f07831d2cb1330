"""The fine-tune preset: what it trains and what it leaves alone, what it reports, and LoRA from start to product."""

import json

import pytest
import torch

from siglip2.cli.exporting import export_to
from siglip2.cli.training import SigLIP2CLI, fit
from siglip2.core.checkpoint import read_checkpoint
from siglip2.core.functional import unpatchify
from siglip2.core.model.vision import to_unit_range
from siglip2.testing import TinySource

SCALARS = ("model.logit_scale", "model.logit_bias")


@pytest.fixture(scope="module")
def small(toy_shards, toy_tokenizer):
    """Options that make any recipe tiny, writing into a folder."""

    def options(folder, steps=4):
        trainer = {"max_steps": steps, "default_root_dir": folder, "accelerator": "cpu", "precision": "32-true"}
        trainer |= {"logger": "false", "enable_progress_bar": "false", "enable_model_summary": "false"}
        words = [f"--trainer.{name}={value}" for name, value in trainer.items()]
        words += ["--plugins.fixed.image_size=32", "--plugins.fixed.batch_size=4", "--model.size=tiny/16"]
        words += ["--model.warmup=1", "--data.text.length=16", "--data.num_workers=0", "--report=false"]
        fields = "--data.train.fields.caption=json.caption"
        new = {"new": {"path": str(toy_shards), "fields": {"caption": "json.caption"}}}
        words += [f"--data.train.path={toy_shards}", fields, f"--data.retrieval={json.dumps(new)}"]
        return [*words, f"--data.tokenizer={toy_tokenizer}"]

    return options


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """A checkpoint of a model that was trained for six steps."""
    folder = tmp_path_factory.mktemp("base")
    recipe = ["--config", "finetune", "--model.warm_start=null", "--model.logit_bias=-2.0", "--plugins.temperature=off"]
    recipe += ["--model.optimizer.init_args.lr=1e-3"]
    fit([*recipe, *small(folder, steps=6)])
    return folder / "last.ckpt"


@pytest.fixture
def tune(small, base, tmp_path):
    """Fine-tunes the base under overlays; returns the CLI and the state before and after."""

    def run(*overlays, extra=(), steps=4):
        words = [word for name in ("finetune", *overlays) for word in ("--config", name)]
        cli = SigLIP2CLI([*words, *small(tmp_path, steps), f"--model.warm_start={base}", *extra], command="fit")
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        cli.finish()
        return cli, read_checkpoint(str(base))["state_dict"], read_checkpoint(str(tmp_path / "last.ckpt"))["state_dict"]

    return run


def moved(before, after):
    """The parameters that training changed."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(("overlay", "locked"), [("lit", "vision"), ("text-locked", "text")])
def test_locked_tower_stays_as_it_is_and_the_other_learns(tune, overlay, locked):
    _, before, after = tune(f"finetune/{overlay}")
    still = {name for name in before if name.startswith(f"model.{locked}.")}
    assert moved(before, after) & still == set()
    assert {n for n in before if n.startswith("model.") and n not in still} - moved(before, after) <= set(SCALARS)


def test_temperature_and_bias_stay_for_their_share_to_the_bit_and_move_afterwards(tune):
    _, before, after = tune(extra=["--plugins.temperature.frozen=1.0"])
    assert moved(before, after) & set(SCALARS) == set()
    assert "model.vision.blocks.0.attn.qkv.weight" in moved(before, after)
    _, before, after = tune(extra=["--plugins.temperature.frozen=0.5"])
    assert set(SCALARS) <= moved(before, after)


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_preset_takes_a_table_and_a_folder_as_they_lie(tune, tmp_path, kind):
    folder, source = tmp_path / "mine", TinySource()
    folder.mkdir()
    lines = ["filepath,caption"]
    for number in range(8):
        record = source.read(number).record
        caption = json.loads(record["json"])["caption"]["en"]
        (folder / f"{number}.png").write_bytes(record["png"])
        (folder / f"{number}.txt").write_text(caption)
        lines.append(f'mine/{number}.png,"{caption}"')
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    path = tmp_path / ("mine.csv" if kind == "table" else "mine")
    cli, before, after = tune(extra=[f"--data.train.path={path}", "--data.train.fields.caption=txt|json.caption"])
    assert len(cli.datamodule.train_source) == 8
    assert "model.text.head.weight" in moved(before, after)


def test_retention_tells_scores_before_and_after_of_new_and_kept_sets(tune, toy_shards, tmp_path):
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": [f"thing {i}" for i in range(8)]}))
    sets = [f"--data.zero_shot={json.dumps({'kept_toy': {'path': str(toy_shards), 'classes': str(classes)}})}"]
    cli, *_ = tune(extra=[*sets, "--model.optimizer.init_args.lr=0.01"], steps=8)
    written = json.loads((tmp_path / "retention.json").read_text())
    assert written["step"] == 8
    kinds = {(row["dataset"], row["kind"]) for row in written["rows"]}
    assert kinds == {("new", "gain"), ("kept_toy", "retained")}
    top1 = next(row for row in written["rows"] if row["measure"] == "top-1")
    assert top1["after"] == cli.zero_shot.rows[0].top1
    again = SigLIP2CLI(["--ckpt_path", str(tmp_path / "last.ckpt"), *sets], command="validate")
    again.trainer.validate(again.model, datamodule=again.datamodule, ckpt_path=again.config.ckpt_path, verbose=False)
    assert again.zero_shot.rows[0].top1 == top1["after"]
    assert top1["before"] == score_of_base(cli, sets)


def score_of_base(cli, sets):
    """Top-1 of the checkpoint that a run started from, by `validate`."""
    path = cli.config.model.warm_start
    found = SigLIP2CLI(["--ckpt_path", path, *sets], command="validate")
    found.trainer.validate(found.model, datamodule=found.datamodule, ckpt_path=path, verbose=False)
    return found.zero_shot.rows[0].top1


def test_early_stop_joins_the_other_callbacks_and_ends_the_run(tune):
    extra = ["--model.optimizer.init_args.lr=0.0", "--trainer.val_check_interval=1"]
    cli, *_ = tune("finetune/early-stop", extra=extra, steps=20)
    assert cli.trainer.global_step == 6  # the first, and five that are no better
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {"InitialLoss", "RewindSpikes", "Retention", "EarlyStopping"} <= names


LORA = ("finetune/lora",)
FC1 = "model.vision.blocks.0.mlp.fc1.weight"


def base_of(name):
    """Where a checkpoint has the weight without the adapter."""
    return "plugins.lora.base." + name.removeprefix("model.").removesuffix(".weight").replace(".", "-")


def test_lora_trains_adapters_and_scalars_alone(tune):
    pytest.importorskip("peft")
    cli, before, after = tune(*LORA)
    trained = {name for name, p in cli.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name in SCALARS for name in trained)
    changed = moved(before, after) - set(SCALARS)
    assert changed
    assert all(name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in changed)
    assert all(torch.equal(after[base_of(name)], before[name]) for name in changed)


def test_checkpoint_of_lora_without_the_plugin_is_the_model_with_its_adapters(tune, tmp_path):
    pytest.importorskip("peft")
    cli, before, _ = tune(*LORA, extra=["--model.optimizer.init_args.lr=0.05"])
    words = ["--ckpt_path", str(tmp_path / "last.ckpt"), "--plugins.lora=off"]
    plain = SigLIP2CLI(words, command="validate")
    checkpoint = read_checkpoint(str(tmp_path / "last.ckpt"))
    plain.model.on_load_checkpoint(checkpoint)
    plain.model.load_state_dict(checkpoint["state_dict"])
    assert not any("lora" in name for name, _ in plain.model.named_parameters())
    batch = next(iter(cli.datamodule.train_batches(max_batches=1)))
    with torch.no_grad():
        ours, theirs = cli.model.eval().embed(batch), plain.model.eval().embed(batch)
    assert not torch.allclose(before[FC1], checkpoint["state_dict"][FC1], atol=1e-3)  # or there is nothing to merge
    for name in ("image", "caption"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_transformers_loads_of_a_lora_run_is_the_model_with_its_adapters(tune, tmp_path):
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    with torch.enable_grad():
        cli, before, after = tune(*LORA, extra=["--model.optimizer.init_args.lr=0.05"])
    assert not torch.allclose(before[FC1], after[FC1], atol=1e-3)  # or there is nothing to merge
    export_to(str(tmp_path / "last.ckpt"), "hf", tmp_path / "hf", check=False)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf", local_files_only=True, dtype=torch.float32).eval()
    batch = next(iter(cli.datamodule.train_batches(max_batches=1)))
    ours, images = cli.model.eval().embed(batch), batch.views["image"]
    pixels = to_unit_range(unpatchify(images.patches, images.grid))
    found = theirs(input_ids=batch.views["caption"].long(), pixel_values=pixels)
    torch.testing.assert_close(found.image_embeds, ours["image"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text_embeds, ours["caption"], rtol=0, atol=1e-6)


def test_lora_that_was_stopped_resumes_to_the_bit(tune, tmp_path):
    pytest.importorskip("peft")
    options = {"dirpath": str(tmp_path / "all"), "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1}
    every_two = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    _, _, whole = tune(*LORA, extra=[f"--trainer.callbacks+={json.dumps(every_two)}"])
    (tmp_path / "last.ckpt").unlink()
    fit(["--ckpt_path", str(tmp_path / "all" / "step=2.ckpt")])
    assert moved(whole, read_checkpoint(str(tmp_path / "last.ckpt"))["state_dict"]) == set()
