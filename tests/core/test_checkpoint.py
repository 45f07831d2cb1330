"""What a checkpoint must share with a recipe, what may differ, and how files fail."""

import logging

import pytest
import torch

from siglip2.core.checkpoint import AtomicCheckpointIO, fresh_plugins, read_checkpoint, reconcile


def state(*names, size=2, value=0.0):
    return {name: torch.full((size,), value) for name in names}


SAVED = state("model.a", "model.b", "plugins.silc.head", value=1.0)


def test_product_and_known_plugins_come_from_the_file():
    merged = reconcile(SAVED, state(*SAVED))
    assert all(torch.equal(merged[name], SAVED[name]) for name in SAVED)


def test_plugin_that_the_file_does_not_know_starts_fresh_and_is_reported(caplog):
    current = {**state(*SAVED), **state("plugins.tips.head", value=5.0)}
    with caplog.at_level(logging.WARNING):
        merged = reconcile(SAVED, current)
    assert torch.equal(merged["plugins.tips.head"], current["plugins.tips.head"])
    assert "plugin 'tips' is not in the checkpoint" in caplog.text


def test_plugin_that_the_recipe_left_out_is_dropped_and_reported(caplog):
    with caplog.at_level(logging.WARNING):
        merged = reconcile(SAVED, state("model.a", "model.b"))
    assert list(merged) == ["model.a", "model.b"]
    assert "plugin 'silc' is in the checkpoint but not in this recipe: it is dropped" in caplog.text


def test_plugin_of_another_shape_starts_fresh_as_a_whole():
    saved = state("model.a", "plugins.silc.head", "plugins.silc.centre", value=1.0)
    current = {**state("model.a", "plugins.silc.centre"), **state("plugins.silc.head", size=3)}
    merged = reconcile(saved, current)
    assert not merged["plugins.silc.head"].any()
    assert not merged["plugins.silc.centre"].any()


def test_plugins_that_start_fresh_are_those_with_a_tensor_that_is_new_or_of_another_shape():
    saved = state("model.a", "plugins.same.w", "plugins.wider.w", "plugins.wider.b", "plugins.gone.w", "plugins.less.w")
    saved |= state("plugins.less.part.w")
    current = state("model.a", "plugins.same.w", "plugins.wider.b", "plugins.new.w", "plugins.less.w")
    current |= state("plugins.wider.w", size=3)
    assert fresh_plugins(saved, current) == {"wider", "new"}


def test_part_that_only_the_file_has_is_named_and_its_plugin_goes_on(caplog):
    heads = [f"plugins.ema_teacher.heads.{name}" for name in ("silc.w", "tips.mlp.w", "tips.mlp.b")]
    saved = state("model.a", "plugins.ema_teacher.vision.w", *heads, value=1.0)
    with caplog.at_level(logging.WARNING):
        merged = reconcile(saved, state("model.a", "plugins.ema_teacher.vision.w", heads[0]))
    assert merged["plugins.ema_teacher.vision.w"].all()
    assert [record.getMessage() for record in caplog.records] == [
        "plugin 'ema_teacher' goes on without its part 'heads.tips', which only the checkpoint has"
    ]


def test_plugin_that_starts_fresh_anyway_is_not_said_to_lose_a_part(caplog):
    saved = state("model.a", "plugins.ema_teacher.vision.w", "plugins.ema_teacher.heads.tips.w", value=1.0)
    with caplog.at_level(logging.WARNING):
        reconcile(saved, state("model.a", "plugins.ema_teacher.vision.w", "plugins.ema_teacher.heads.silc.w"))
    assert [record.getMessage() for record in caplog.records] == [
        "plugin 'ema_teacher' is not in the checkpoint as this recipe builds it: it starts fresh"
    ]


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (state("model.a"), r"model.b: found \[2\], expected absent"),
        (state("model.a", "model.b", "model.c"), r"model.c: found absent, expected \[2\]"),
        ({**state("model.a"), **state("model.b", size=3)}, r"model.b: found \[2\], expected \[3\]"),
    ],
    ids=["fewer", "more", "shape"],
)
def test_another_model_is_an_error_that_lists_the_difference(current, message):
    with pytest.raises(ValueError, match=f"another model than this recipe builds:\n  {message}"):
        reconcile(SAVED, current)


def test_many_differences_are_counted():
    with pytest.raises(ValueError, match="... and 4 more"):
        reconcile({}, state(*(f"model.{i}" for i in range(10))))


def test_checkpoint_is_read_as_it_was_saved(tmp_path):
    path = tmp_path / "step.ckpt"
    AtomicCheckpointIO().save_checkpoint({"siglip2": {"woken": ["silc"]}, "state_dict": SAVED}, path)
    read = read_checkpoint(str(path))
    assert read["siglip2"] == {"woken": ["silc"]}
    assert all(torch.equal(read["state_dict"][name], SAVED[name]) for name in SAVED)


def test_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.ckpt: give the .ckpt file"):
        read_checkpoint(str(tmp_path / "none.ckpt"))


def test_checkpoint_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.ckpt"
    torch.save({"siglip2": {}, "state_dict": SAVED}, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="cut.ckpt cannot be read as a checkpoint.*try an earlier one"):
        read_checkpoint(str(path))


def test_checkpoint_of_another_program_is_named(tmp_path):
    torch.save({"weights": SAVED}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"was not written by siglip2 \(it holds weights\)"):
        read_checkpoint(str(tmp_path / "other.ckpt"))


class Unsavable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_failed_write_leaves_the_earlier_file_and_says_how_to_resume(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"siglip2": {}, "global_step": 1}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"step 2 could not be written.*resume with --ckpt_path .*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"siglip2": Unsavable(), "global_step": 2}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
