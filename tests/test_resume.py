"""A resumed run is the run that was never stopped, whatever the number of workers."""

import pytest
import torch
from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.checkpoint import read_checkpoint


class Diary(Callback):
    """Notes the sample keys and the loss of every step."""

    def __init__(self):
        self.keys, self.losses = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keys[trainer.global_step] = batch.keys
        self.losses[trainer.global_step] = outputs["loss"].item()


def run(arguments, *extra):
    cli, diary = SigLIP2CLI([*arguments, *extra], command="fit"), Diary()
    cli.trainer.callbacks.append(diary)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    return diary, {name: tensor.clone() for name, tensor in cli.model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    different = [name for name in state if not torch.equal(state[name], other[name])]
    assert not different, f"these differ after resuming: {different}"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ten_steps_are_five_and_five_resumed_bitwise(tiny_recipe, tmp_path, workers):
    whole, weights = run(tiny_recipe, "--data.num_workers", workers)
    middle = str(tmp_path / "step=5.ckpt")
    resumed, resumed_weights = run(tiny_recipe, "--data.num_workers", workers, "--ckpt_path", middle)
    assert resumed.keys == {step: keys for step, keys in whole.keys.items() if step > 5}
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


def test_run_killed_by_an_error_resumes_bitwise_from_its_last_checkpoint(tiny_recipe, tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    whole, weights = run(tiny_recipe, "--trainer.default_root_dir", str(tmp_path / "whole"))
    cli = SigLIP2CLI(tiny_recipe, command="fit")
    cli.trainer.callbacks.append(Crash())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    resumed, resumed_weights = run(tiny_recipe, "--ckpt_path", str(tmp_path / "step=5.ckpt"))
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 5}
    assert_same(weights, resumed_weights)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_sample_order_does_not_depend_on_the_number_of_workers(tiny_recipe):
    keys = [run(tiny_recipe, "--data.num_workers", workers)[0].keys for workers in ("0", "1", "3")]
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 10


def test_checkpoint_carries_recipe_text_and_pixel_contract(tiny_recipe, tmp_path):
    run(tiny_recipe)
    ours = read_checkpoint(str(tmp_path / "step=10.ckpt"))["siglip2"]
    assert ours["recipe"]["plugins"]["fixed"]["image_size"] == 32
    assert ours["recipe"]["model"]["size"] == "tiny/16"
    assert ours["text"]["contract"]["length"] == 16
    assert ours["pixels"]["filter"] == "bilinear"
