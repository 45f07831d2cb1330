"""The fine-tune preset on two ranks is that of one process: locked towers, adapters, guards, the retention table."""

import json
import logging
import math

import pytest
import torch
from lightning.pytorch import Callback
from parallel_ranks import fit, on_ranks
from torch.distributed.tensor import DTensor

from siglip2.core.checkpoint import read_checkpoint

pytestmark = pytest.mark.dist

KINDS = {"ddp": ["--trainer.strategy", "ddp_find_unused_parameters_true"], "fsdp2": ["--trainer.strategy", "fsdp2"]}
BLOCKS = ["--model.compile", "eager", "--model.checkpoint_blocks", "true"]
OVERLAYS = ("lit", "lora")  # and text-locked, with a spike
SCALARS = ("model.logit_scale", "model.logit_bias")
# the large eps keeps float noise in gradients near zero from becoming steps of full size
STEPS = ["--model.optimizer.init_args.lr=0.01", "--model.optimizer.init_args.eps=0.001"]
SAVED, FROZEN = 2, 0.5  # steps of the first checkpoint and evaluation; share of the run with a frozen temperature
SPIKE = ["--trainer.callbacks+=parallel_ranks.SaveInValidation", "--trainer.callbacks+=test_finetuning_ranks.Poison"]
SPIKE += ["--plugins.ema_teacher.momentum=0.5", f"--plugins.ema_teacher.start={FROZEN}"]  # wakes in the step of it


class Poison(Callback):
    """Makes the bias no number before the step behind the first evaluation: of a model that is whole, on one rank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        bias, last = pl_module.model.logit_bias, trainer.global_rank == trainer.world_size - 1
        if trainer.global_step == SAVED and (last or isinstance(bias, DTensor)):
            with torch.no_grad():
                bias.fill_(math.nan)


class Said(Callback):
    """Writes what is said of the first loss into the folder of the run."""

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.file = logging.FileHandler(f"{trainer.default_root_dir}/first-loss.txt", mode="w")
            logging.getLogger("siglip2.core.callbacks.initial_loss").addHandler(self.file)

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            logging.getLogger("siglip2.core.callbacks.initial_loss").removeHandler(self.file)
            self.file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def tiny(toy_shards, toy_tokenizer, folder):
    """Makes arguments of the preset in tiny: four steps of eight pairs, each second one saved and all sets scored."""
    (folder / "classes.json").write_text(json.dumps({"classes": [f"thing {i}" for i in range(8)]}))
    new = {"new": {"path": str(toy_shards), "fields": {"caption": "json.caption"}}}
    kept = {"kept_toy": {"path": str(toy_shards), "classes": str(folder / "classes.json")}}
    trainer = {"max_steps": 2 * SAVED, "val_check_interval": SAVED, "accelerator": "cpu", "devices": 1}
    trainer |= {"precision": "32-true", "logger": "false", "enable_progress_bar": "false"}
    trainer |= {"enable_model_summary": "false"}

    def into(name, *more):
        every = {"dirpath": str(folder / name), "filename": "{step}", "every_n_train_steps": SAVED, "save_top_k": -1}
        saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every}
        words = ["--config", "finetune", *[str(word) for word in more]]
        words += [f"--trainer.{option}={value}" for option, value in trainer.items()]
        words += ["--plugins.fixed.image_size=32", "--plugins.fixed.batch_size=8", "--model.size=tiny/16"]
        words += ["--model.warmup=1", "--data.text.length=16", "--data.num_workers=0", "--report=false"]
        words += [f"--trainer.callbacks+={json.dumps(saving)}", "--trainer.callbacks+=test_finetuning_ranks.Said"]
        words += [f"--data.train.path={toy_shards}", "--data.train.fields.caption=json.caption"]
        words += [f"--data.retrieval={json.dumps(new)}", f"--data.zero_shot={json.dumps(kept)}"]
        return [*words, *STEPS, f"--data.tokenizer={toy_tokenizer}", f"--trainer.default_root_dir={folder / name}"]

    return into


@pytest.fixture(scope="module")
def tuning(tiny, folder):
    """Makes arguments of a fine-tune, of a model whose cosines are not magnified: noise of float32 would be, too."""
    fresh = ["--model.warm_start=null", "--model.logit_bias=-2.0", "--model.logit_scale=0.5"]
    fit(tiny("base", *fresh, "--plugins.temperature=off"))

    def into(name, overlay, *more):
        start = [f"--model.warm_start={folder / 'base' / 'step=4.ckpt'}", f"--plugins.temperature.frozen={FROZEN}"]
        return tiny(name, "--config", f"finetune/{overlay}", *start, *more)

    return into


@pytest.fixture(scope="module")
def alone(tuning):
    """What one process noted under each overlay, and of a loss that is no number."""
    runs = {overlay: fit(tuning(f"one {overlay}", overlay)).steps for overlay in OVERLAYS}
    return {**runs, "spike": fit(tuning("one spike", "text-locked", *SPIKE)).steps}


@pytest.fixture(scope="module")
def two(tuning, alone, folder):
    """What two ranks noted of the same, and of a resumed run."""
    runs = {f"{kind} {o}": tuning(f"{kind} {o}", o, *KINDS[kind]) for o in OVERLAYS for kind in KINDS}
    runs |= {f"{kind} spike": tuning(f"{kind} spike", "text-locked", *KINDS[kind], *SPIKE) for kind in KINDS}
    runs["fsdp2 blocks"] = tuning("fsdp2 blocks", "lora", *KINDS["fsdp2"], *BLOCKS)
    start = folder / "fsdp2 lora" / f"step={SAVED}.ckpt"
    runs["resumed"] = tuning("resumed", "lora", *KINDS["fsdp2"], "--ckpt_path", start)
    return {name: found["steps"] for name, found in on_ranks(2, runs, folder).items()}


def assert_same(found, wanted, *, tolerance=1e-6):
    """Two sets of tensors have the same names, and no number differs by more than the tolerance."""
    assert found.keys() == wanted.keys()
    off = {name: float((found[name].float() - tensor.float()).abs().max()) for name, tensor in wanted.items()}
    assert {name: by for name, by in off.items() if not by <= tolerance} == {}


@pytest.mark.parametrize(
    ("run", "overlay"), [(f"{k} {o}", o) for o in OVERLAYS for k in KINDS] + [("fsdp2 blocks", "lora")]
)
def test_two_ranks_tune_as_one_process_does(alone, two, run, overlay):
    for here, there in zip(two[run], alone[overlay], strict=True):
        torch.testing.assert_close(here["loss"], there["loss"], rtol=1e-6, atol=1e-6)
        assert_same(here["gradients"], there["gradients"])
        assert_same(here["state"], there["state"])
    largest = [float(gradient.abs().max()) for gradient in alone[overlay][-1]["gradients"].values()]
    assert min(largest) > 1e-4  # all that is trained has a gradient in the last step, far above the tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_and_bias_stay_for_their_share_to_the_bit_on_two_ranks(two, folder, kind):
    base = read_checkpoint(str(folder / "base" / "step=4.ckpt"))["state_dict"]
    same = [[torch.equal(step["state"][name], base[name]) for name in SCALARS] for step in two[f"{kind} lora"]]
    assert same == [[True, True], [True, True], [False, False], [False, False]]


def test_checkpoint_of_fsdp2_holds_the_sums_as_that_of_one_process(two, folder):
    ours, theirs = (read_checkpoint(str(folder / f"{name} lora" / "step=4.ckpt")) for name in ("fsdp2", "one"))
    base = read_checkpoint(str(folder / "base" / "step=4.ckpt"))["state_dict"]
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert {n for n in ours["state_dict"] if n.startswith("model.")} == {n for n in base if n.startswith("model.")}
    name = "vision.blocks.0.mlp.fc1.weight"
    assert (ours["state_dict"][f"model.{name}"] - base[f"model.{name}"]).abs().max() > 1e-3
    before = ours["state_dict"]["plugins.lora.base." + name.removesuffix(".weight").replace(".", "-")]
    assert torch.equal(before, base[f"model.{name}"])
    groups = [found["optimizer_states"][0]["param_groups"] for found in (ours, theirs)]
    assert groups[0] == groups[1]


def test_adapters_under_fsdp2_resume_to_the_bit(two):
    for again, first in zip(two["resumed"], two["fsdp2 lora"][SAVED:], strict=True):
        assert torch.equal(again["loss"], first["loss"])
        assert_same(again["state"], first["state"], tolerance=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_go_back_together_to_what_was_kept_in_an_evaluation(alone, two, folder, kind):
    """One rank's loss is no number under DDP; under FSDP2 a bias that all have."""
    for number, (here, there) in enumerate(zip(two[f"{kind} spike"], alone["spike"], strict=True)):
        torch.testing.assert_close(here["loss"], there["loss"], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert_same(here["state"], there["state"])
        if number != SAVED:
            assert_same(here["gradients"], there["gradients"])
    saved = read_checkpoint(str(folder / f"{kind} spike" / "step=4.ckpt"))["callbacks"]["RewindSpikes"]
    assert [(rewind["step"], rewind["to"]) for rewind in saved["rewinds"]] == [(SAVED + 1, SAVED)]


@pytest.mark.parametrize("kind", KINDS)
def test_guards_and_tables_of_two_ranks_say_what_those_of_one_say(two, folder, kind):
    one, ranks = folder / "one lora", folder / f"{kind} lora"
    said = (ranks / "first-loss.txt").read_text()
    assert said == (one / "first-loss.txt").read_text()
    assert "and 8 pairs" in said
    ours, theirs = (json.loads((place / "retention.json").read_text()) for place in (ranks, one))
    assert ours["step"] == theirs["step"] == 4
    assert {row["kind"] for row in theirs["rows"]} == {"gain", "retained"}
    assert any(row["change"] for row in theirs["rows"])
    assert ours["rows"] == [pytest.approx(row) for row in theirs["rows"]]
