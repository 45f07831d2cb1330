"""A loss that jumps takes the run back to weights from before it, the same ones every time, and not for ever."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.spikes import RewindSpikes
from siglip2.core.checkpoint import read_checkpoint

STEPS, BAD, EVERY = 30, 14, 5


class Poison(Callback):
    """Multiplies the towers' weights in one step, so that its loss jumps, and keeps a diary."""

    def __init__(self, at=BAD, until=BAD):
        self.at, self.until, self.states, self.losses = at, until, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states[trainer.global_step] = {n: t.clone() for n, t in pl_module.state_dict().items()}
        if self.at <= trainer.global_step + 1 <= self.until:
            with torch.no_grad():
                pl_module.model.logit_bias.add_(50.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.fixture
def train(tiny_recipe, tmp_path):
    """Trains under a detector and a poison; returns both and the module."""

    def run(poison, folder="run", start=None, **options):
        words = [*tiny_recipe, f"--trainer.max_steps={STEPS}", f"--trainer.default_root_dir={tmp_path / folder}"]
        cli = SigLIP2CLI(words, command="fit")
        detector = RewindSpikes(**{"every": EVERY, "window": 16, "least": 5.0, **options})
        cli.trainer.callbacks[:0] = [detector, poison]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=start)
        return detector, cli

    return run


def test_run_goes_back_to_the_snapshot_and_on_with_the_next_batch(train, capsys):
    detector, cli = train(poison := Poison())
    (rewind,) = detector.rewinds
    assert (rewind["step"], rewind["to"]) == (BAD, 10)
    before, after = poison.states[10], poison.states[BAD]
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert cli.trainer.global_step == STEPS
    assert max(loss for step, loss in poison.losses.items() if step != BAD) < rewind["loss"] / 5
    assert "back to the weights of step 10" in " ".join(capsys.readouterr().err.split())


def test_optimizer_goes_back_with_the_weights(train):
    _, cli = train(Poison())
    steps = {int(state["step"]) for state in cli.trainer.optimizers[0].state.values()}
    assert steps == {STEPS - (BAD - 10)}  # those that were left out are not counted


def test_same_run_rewinds_to_the_same_bits(train):
    ends = [train(Poison(), folder)[1].model.state_dict() for folder in ("a", "b")]
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []


def test_run_that_is_resumed_rewinds_to_the_weights_that_it_was_saved_with(train, tmp_path):
    """The last snapshot before the spike is that of the checkpoint, since none is due by itself."""
    whole, cli = train(Poison(), every=1000)
    assert whole.rewinds[0]["to"] == 10
    resumed, again = train(Poison(), every=1000, start=tmp_path / "run" / "step=10.ckpt")
    assert resumed.rewinds == whole.rewinds
    ends = [c.model.state_dict() for c in (cli, again)]
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []


def test_losses_and_rewinds_are_in_the_checkpoint(train, tmp_path):
    detector, _ = train(Poison())
    saved = read_checkpoint(str(tmp_path / "run" / "step=30.ckpt"))["callbacks"]["RewindSpikes"]
    again = RewindSpikes(window=16)
    again.load_state_dict(saved)
    assert again.rewinds == detector.rewinds
    assert list(again.losses) == list(detector.losses)


def test_loss_that_keeps_jumping_ends_the_run(train):
    with pytest.raises(RuntimeError, match=r"jumped to .* at step 16 .* after 2 rewinds at the steps 14, 15"):
        train(Poison(until=STEPS), attempts=2)


@pytest.mark.parametrize(("loss", "expected"), [(math.nan, True), (math.inf, True), (1.3, False), (1.7, True)])
def test_spike_is_what_stands_out_of_the_last_losses(loss, expected):
    detector = RewindSpikes(window=8, threshold=10.0, least=0.1)
    detector.losses.extend([1.0, 0.95, 1.05, 1.0, 1.1, 0.9, 0.95, 1.05])  # median 1, median deviation 0.05
    assert detector.is_spike(loss) == expected


@pytest.mark.parametrize("options", [{"every": 0}, {"attempts": 0}, {"window": 2}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="RewindSpikes: "):
        RewindSpikes(**options)
