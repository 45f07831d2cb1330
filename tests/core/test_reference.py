"""A reference is built from its file alone, reads images as it was trained to, and leaves no trace in checkpoints."""

import copy

import pytest
import torch
from torch import nn

from siglip2 import CAPTION, IMAGE
from siglip2.core.data.text import Tokenizer
from siglip2.core.data.train_tokenizer import train_tokenizer
from siglip2.core.model.sizes import ShapeOptions
from siglip2.core.reference import NativeView, Reference, SquareView, contract_view, load_reference
from siglip2.plugins.fixed import Fixed, FixedPatchifier
from siglip2.plugins.naflex import NaFlex
from siglip2.testing import TinyModule, TinySource, fake_batch, tiny_model, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER, same

PIXELS = PATCHIFIER.contract()


def saved(folder, module, *, model=None, pixels=None):
    """A checkpoint of a module, as far as a reference reads it."""
    ours = {
        "recipe": {"model": {"size": "tiny/16", **(model or {})}},
        "text": module.tokenizer.to_state(),
        "pixels": pixels or module.patchifier.contract(),
    }
    path = folder / "reference.ckpt"
    torch.save({"state_dict": module.state_dict(), "siglip2": ours}, path)
    return str(path)


def built(plugin, **options):
    return TinyModule([plugin], tiny_tokenizer(), **{"size": "tiny/16", **options})


MODELS = {
    "the run's own": (Fixed(image_size=32, batch_size=8), {}),
    "another resolution and another scale": (Fixed(image_size=64, batch_size=8), {"logit_scale": 1.5}),
    "a kind of its own": (NaFlex(seq_lens=[4, 9], batch_size=8, table=3), {}),
    "other widths": (Fixed(image_size=32, batch_size=8), {"vision": {"depth": 3}, "text": {"width": 32}}),
    "timm": (Fixed(image_size=32, batch_size=8), {"timm": "vit_tiny_patch16_224"}),
}


@pytest.mark.parametrize(("plugin", "model"), MODELS.values(), ids=MODELS)
def test_reference_scores_as_the_model_in_its_file(plugin, model, tmp_path):
    options = {k: ShapeOptions(**v) if isinstance(v, dict) else v for k, v in model.items()}
    module = built(plugin, **options)
    reference = load_reference(saved(tmp_path, module, model=model), tiny_tokenizer(), PATCHIFIER)
    batch = fake_batch([IMAGE, CAPTION], patchifier=module.patchifier)
    theirs = fake_batch([contract_view("theirs", reference.pixels, module.patchifier.layout(0).seq_len), CAPTION])
    image = reference.towers.encode_image(theirs.views["theirs"]).embedding
    text = reference.towers.encode_text(theirs.views["caption"]).embedding
    assert not image.requires_grad
    assert not text.requires_grad
    close = {"rtol": 0, "atol": 1e-6}  # kernels round by how memory is aligned, and by whether a gradient is wanted
    torch.testing.assert_close(image, module.model.encode_image(batch.views["image"]).embedding.detach(), **close)
    torch.testing.assert_close(text, module.model.encode_text(batch.views["caption"]).embedding.detach(), **close)
    assert torch.equal(reference.towers.logit_scale, module.model.logit_scale)


def test_views_are_the_images_of_the_patchifier_that_has_the_contract():
    sample = TinySource().read(3)
    fixed = FixedPatchifier(image_size=44, patch_size=14, batch_size=8, filter="bicubic", antialias=False)
    native = NaFlex(seq_lens=[9], batch_size=8, table=3, max_scale=2.0).patchifier()
    for patchifier, kind in ((fixed, SquareView), (native, NativeView)):
        view = contract_view("theirs", patchifier.contract())
        assert isinstance(view, kind)
        assert same(view(sample, None), patchifier(sample.image(), IMAGE, patchifier.layout(0)))


def test_views_have_as_many_patches_as_are_asked_for():
    assert contract_view("small", PIXELS, 9) == SquareView("small", 48, 16, "bilinear", antialias=True)
    assert contract_view("small", NaFlex().patchifier().contract(), 50) == NativeView("small", 50, 16, None)
    with pytest.raises(ValueError, match="squashed to squares, and 10 patches are none: take 9 or 16"):
        contract_view("small", PIXELS, 10)


def test_reference_is_frozen_and_stays_in_evaluation_mode(towers):
    parent = nn.ModuleDict({"reference": Reference(towers, PIXELS)})
    parent.train()
    assert not any(module.training for module in parent["reference"].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def parent_of(reference):
    """A module that has a reference between two parts of its own."""
    return nn.ModuleDict({"before": nn.Linear(2, 2), "deep": nn.ModuleDict({"own": reference}), "z": nn.Linear(2, 2)})


def test_reference_is_neither_written_to_a_state_dict_nor_expected_in_one():
    mine, other = (parent_of(Reference(tiny_model(seed=seed), PIXELS)) for seed in (0, 1))
    before = copy.deepcopy(dict(other["deep"].named_parameters()))
    state = mine.state_dict()
    assert list(state) == ["before.weight", "before.bias", "z.weight", "z.bias"]
    other.load_state_dict(state)  # strict
    assert torch.equal(other["z"].weight, mine["z"].weight)
    assert all(torch.equal(value, before[name]) for name, value in other["deep"].named_parameters())


def test_what_else_is_missing_in_a_state_dict_is_still_an_error():
    module = parent_of(Reference(tiny_model(), PIXELS))
    state = module.state_dict()
    del state["before.bias"], state["z.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "before.bias", "z.weight"\.'):
        module.load_state_dict(state)


def test_random_state_is_that_of_a_run_without_a_reference(tmp_path):
    path = saved(tmp_path, built(Fixed(image_size=32, batch_size=8)))
    state = torch.get_rng_state()
    load_reference(path, tiny_tokenizer(), PATCHIFIER)
    assert torch.equal(torch.get_rng_state(), state)


def test_reference_with_other_texts_is_refused_with_what_differs_vocabulary_first(tmp_path):
    path = saved(tmp_path, built(Fixed(image_size=32, batch_size=8)))
    file = train_tokenizer(["other words", "than those"], vocab_size=320, out=tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"reads other texts.*: tokenizer file: sha256 .* there; .*length.* 12"):
        load_reference(path, Tokenizer.load(file, length=12), PATCHIFIER)


def test_reference_on_images_that_nobody_here_can_make_is_refused_unless_they_are_the_runs(tmp_path):
    class Rings:
        patch_size, grid = 16, (2, 2)

        def contract(self):
            return {"patchifier": "rings", "radius": 3}

    path = saved(tmp_path, built(Fixed(image_size=32, batch_size=8)), pixels=Rings().contract())
    with pytest.raises(ValueError, match="patchifier 'rings', which cannot be made here: expected squares or native"):
        load_reference(path, tiny_tokenizer(), PATCHIFIER)
    assert load_reference(path, tiny_tokenizer(), Rings()).pixels["radius"] == 3
    with pytest.raises(ValueError, match="images of the patchifier 'rings' cannot be made in another size"):
        contract_view("small", Rings().contract(), 4)


def test_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.ckpt: give the .ckpt file"):
        load_reference(str(tmp_path / "nowhere.ckpt"), tiny_tokenizer(), PATCHIFIER)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt was not written by siglip2"):
        load_reference(str(tmp_path / "other.ckpt"), tiny_tokenizer(), PATCHIFIER)
