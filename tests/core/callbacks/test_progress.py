"""The progress bar makes the device wait only when it redraws."""

import pytest

from siglip2.cli.training import SigLIP2CLI
from siglip2.core.callbacks.progress import StepProgressBar


class Reads(StepProgressBar):
    """Notes the steps at which the metrics are read."""

    def __init__(self, refresh_rate):
        super().__init__(refresh_rate)
        self.steps = []

    def get_metrics(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.shown = super().get_metrics(trainer, pl_module)
        return self.shown


@pytest.mark.parametrize(("refresh_rate", "expected"), [(1, set(range(1, 11))), (4, {4, 8, 10}), (0, set())])
def test_metrics_are_read_only_every_refresh_rate_steps_and_at_the_end(tiny_recipe, refresh_rate, expected):
    cli, bar = SigLIP2CLI(tiny_recipe, command="fit"), Reads(refresh_rate)
    cli.trainer.callbacks.append(bar)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert set(bar.steps) == expected
    assert not expected or {"train/sigmoid"} <= bar.shown.keys()
    assert not expected or "v_num" not in bar.shown
