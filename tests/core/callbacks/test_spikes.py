"""A loss that jumps takes the run back to weights from before it, the same ones every time, and not for ever."""

import math
import pickle

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


class NoNumber(Callback):
    """Makes the gradients of one step NaN, behind a loss like any other."""

    def __init__(self, at):
        self.at = at

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.at:
            for parameter in pl_module.parameters():
                parameter.grad.fill_(math.nan)


class SaveFirst(Poison):
    """Saves the step of the jump before the detector has looked at its loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/jumped.ckpt")


@pytest.fixture
def train(tiny_recipe, tmp_path):
    """Trains under a detector and what troubles it, listed before it or behind; returns detector and CLI."""

    def run(*trouble, folder="run", start=None, words=(), before=False, **options):
        words = [*tiny_recipe, f"--trainer.max_steps={STEPS}", *words]
        cli = SigLIP2CLI([*words, f"--trainer.default_root_dir={tmp_path / folder}"], command="fit")
        detector = RewindSpikes(**{"every": EVERY, "window": 16, "least": 5.0, **options})
        cli.trainer.callbacks[:0] = [*trouble, detector] if before else [detector, *trouble]
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
    ends = [train(Poison(), folder=folder)[1].model.state_dict() for folder in ("a", "b")]
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


def test_teacher_that_woke_since_the_snapshot_is_woken_again(train):
    words = ["--plugins.ema_teacher.momentum=0.5", f"--plugins.ema_teacher.start={12 / STEPS}"]
    _, cli = train(poison := Poison(), words=words)
    name = "vision.blocks.0.mlp.fc1.weight"
    asleep, woken, moved = (poison.states[step][f"plugins.ema_teacher.{name}"] for step in (10, BAD - 1, BAD + 1))
    kept, trained = poison.states[BAD][f"model.{name}"], poison.states[BAD + 1][f"model.{name}"]
    assert not torch.equal(woken, asleep)  # it woke in step 13, and the spike came in step 14
    assert torch.equal(poison.states[BAD][f"plugins.ema_teacher.{name}"], asleep)
    torch.testing.assert_close(moved, (kept + trained) / 2)
    assert cli.model.woken == {"fixed", "sigmoid", "ema_teacher"}


def test_weights_that_a_bad_gradient_ruined_are_left_behind(train, capsys):
    """They are what the checkpoint of step 10 holds and what the snapshot of that step kept; that of step 5 is good."""
    detector, cli = train(NoNumber(at=10))
    assert [(rewind["step"], rewind["to"]) for rewind in detector.rewinds] == [(11, 10), (12, 5)]
    assert all(tensor.isfinite().all() for tensor in cli.model.state_dict().values())
    assert "weights of step 10 were bad themselves" in " ".join(capsys.readouterr().err.split())


def test_ruined_weights_are_left_behind_even_if_every_step_is_saved(train):
    saving = {"every_n_train_steps": 1, "save_top_k": -1, "dirpath": None}
    words = [f"--trainer.callbacks.init_args.{option}={value}" for option, value in saving.items()]
    detector, cli = train(NoNumber(at=10), words=words)
    assert [(rewind["step"], rewind["to"]) for rewind in detector.rewinds] == [(11, 10), (12, 9)]
    assert all(tensor.isfinite().all() for tensor in cli.model.state_dict().values())


def test_checkpoint_saved_before_the_loss_was_looked_at_is_nothing_to_go_back_to(train):
    detector, _ = train(poison := SaveFirst(), before=True)
    assert [(rewind["step"], rewind["to"]) for rewind in detector.rewinds] == [(BAD, 10)]
    before, after = poison.states[10], poison.states[BAD]
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


def test_no_copy_of_the_model_is_left_when_the_run_is_through(train):
    """The strategy `xla` pickles what callbacks hold in the end; `log` and `log_dict` are Lightning's."""
    detector, _ = train(Poison())
    held = {name: value for name, value in vars(detector).items() if name not in ("log", "log_dict")}
    assert len(pickle.dumps(held)) < 10_000


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
