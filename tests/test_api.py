"""`siglip2.load`: pictures and texts in, embeddings and probabilities out, under the contract of the weights."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import siglip2
from siglip2.core.batch import collate
from siglip2.core.data.image_io import decode_image
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, native_pixels, square_pixels
from siglip2.core.layout import Layout
from siglip2.plugins.naflex import NaFlexPatchifier
from siglip2.prediction.inputs import trimmed
from siglip2.prediction.model import Model
from siglip2.testing import tiny_model, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER, TinySource, fake_batch

TEXTS = ["a gold disc", "Kiste in ROT", ""]


def pngs(count=5):
    return [TinySource().read(i).record["png"] for i in range(count)]


def native(max_scale=None):
    """A patchifier of at most 12 patches."""
    return NaFlexPatchifier(16, 4, (Layout(12, 1),), 12, max_scale, seed=0)


@pytest.fixture
def squares():
    """Tiny towers for squares of 32 pixels."""
    return Model(tiny_model(), PATCHIFIER, tiny_tokenizer())


@pytest.fixture
def naflex():
    """Tiny towers for pictures that keep their aspect ratio and are not enlarged, so that lengths differ."""
    return Model(tiny_model(grid=(4, 4)), native(max_scale=1.0), tiny_tokenizer())


@pytest.fixture(params=["hf", "open_clip", "big_vision"])
def exported(request, tmp_path):
    """Writes tiny weights as another library stores them; returns the folder and the model they came from."""

    def make(*, keeps_ratio):
        model = tiny_model(grid=(4, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)  # biases at 0 would hide a wrong mapping
        pixels = native_pixels(16, 4) if keeps_ratio else square_pixels(64, 16, filter="bilinear")
        heads = {"vision": 2, "text": 2}
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        weights = assemble(
            "siglip2", state, place="test", heads=heads, native=keeps_ratio, pixels=pixels, tokenizer=tiny_tokenizer()
        )
        return write(weights, request.param, tmp_path / "out", check=False).folder, model

    return make


def test_embeddings_are_those_of_the_towers_on_views_made_by_the_loader(squares):
    batch = fake_batch(batch_size=5)
    expected = squares.model.encode_image(batch.views["image"]).embedding
    assert torch.allclose(squares.encode_image(pngs(), batch_size=2), expected, atol=1e-6)
    expected = squares.model.encode_text(tiny_tokenizer().encode(TEXTS)).embedding
    assert torch.allclose(squares.encode_text(TEXTS, batch_size=2), expected, atol=1e-6)


def test_every_kind_of_picture_gives_the_same_embedding(squares, tmp_path):
    png = pngs(1)[0]
    (tmp_path / "a.png").write_bytes(png)
    tensor = decode_image(png)
    array = tensor.permute(1, 2, 0).contiguous().numpy()
    kinds = [png, tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(png)), tensor, array]
    rows = squares.encode_image(kinds)
    assert torch.equal(rows, rows[:1].expand_as(rows))
    for kind in kinds:
        assert torch.allclose(squares.encode_image(kind), rows[:1], atol=1e-6)
    assert torch.allclose(squares.encode_image(tensor[None].repeat(2, 1, 1, 1)), rows[:2], atol=1e-6)


def test_exif_orientation_of_a_pil_picture_is_applied(squares):
    turned, file = Image.open(io.BytesIO(pngs(1)[0])).convert("RGB"), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(file, "PNG", exif=exif)
    upright = Image.open(io.BytesIO(file.getvalue()))
    assert torch.equal(squares.encode_image(upright), squares.encode_image(file.getvalue()))


def test_pictures_of_a_batch_keep_their_order_and_padding_changes_nothing(naflex):
    """Batches are sorted by length and cut to the longest; alone, each picture has all of its padding."""
    sizes = [(16, 16), (48, 64), (30, 16), (64, 48), (16, 40), (20, 48)]  # height, width
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    lengths = [naflex.explain(picture).tokens for picture in pictures]
    assert lengths == [1, 12, 2, 12, 3, 6]
    alone = torch.cat([naflex.model.encode_image(naflex.patches(picture)).embedding for picture in pictures])
    assert torch.allclose(naflex.encode_image(pictures, batch_size=3), alone, atol=1e-6)
    joined = collate([{"image": naflex.patches(picture)} for picture in [*pictures, pictures[1]]])["image"]
    whole = naflex.model.encode_image(trimmed(joined)).embedding
    assert torch.allclose(whole, torch.cat([alone, alone[1:2]]), atol=1e-6)


def test_rank_is_the_sigmoid_with_temperature_and_bias_sorted(squares):
    picture, labels = pngs(1)[0], ["disc", "box", "gold"]
    found = squares.rank(picture, labels, templates=["a {}", "one {} more"])
    z, texts = squares.encode_image(picture).double(), [[f"a {x}", f"one {x} more"] for x in labels]
    means = torch.stack([squares.encode_text(pair).double().mean(0) for pair in texts])
    means = means / means.norm(dim=1, keepdim=True)
    logits = (z @ means.T * squares.model.logit_scale.double().exp() + squares.model.logit_bias.double())[0]
    expected = sorted(zip(logits.sigmoid().tolist(), labels, strict=True), reverse=True)
    assert [r.text for r in found] == [text for _, text in expected]
    assert [r.match for r in found] == pytest.approx([match for match, _ in expected], rel=1e-5)
    assert sum(r.share for r in found) == pytest.approx(1)


@pytest.mark.parametrize("template", ["a photo", "{} {x}", "{} {}", "{{}}", "{:>5}", "{} {", "{0}"])
def test_template_without_one_plain_place_for_the_label_is_refused(squares, template):
    with pytest.raises(ValueError, match="has no place for the label, or other braces: expected one"):
        squares.rank(pngs(1)[0], ["disc"], templates=[template])


def test_one_label_and_one_template_may_stand_without_a_list(squares):
    (found,) = squares.rank(pngs(1)[0], "gold disc", templates="a {{photo}} of a {}")
    expected = squares.probabilities(squares.encode_image(pngs(1)), squares.encode_text("a {photo} of a gold disc"))
    assert (found.text, found.share) == ("gold disc", 1)
    assert found.match == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_less_than_one_are_refused(squares, size):
    for encode, inputs in ((squares.encode_image, pngs(2)), (squares.encode_text, TEXTS)):
        with pytest.raises(ValueError, match=f"batch_size is {size}, expected 1 or more"):
            encode(inputs, batch_size=size)


def test_arrays_that_torch_does_not_take_as_they_are_give_the_same_embedding(squares):
    picture = Image.open(io.BytesIO(pngs(1)[0])).convert("RGB")
    array = np.array(picture)
    backwards = np.ascontiguousarray(array[:, :, ::-1])  # BGR, as OpenCV reads
    read_only = np.asarray(picture)
    assert not read_only.flags.writeable
    rows = squares.encode_image([array, backwards[:, :, ::-1], read_only])
    assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "a picture is NoneType, expected a path"),
        ([None], "a picture is NoneType, expected a path"),
        (np.zeros((0, 10, 3), np.uint8), "a picture is 10 x 0 px, expected at least one pixel"),
        (torch.zeros(3, 10, 0, dtype=torch.uint8), "a picture is 0 x 10 px, expected at least one pixel"),
        (Image.new("RGB", (0, 5)), "a picture is 0 x 5 px, expected at least one pixel"),
        (np.array([], np.uint8), r"pictures of shape \[0\], expected a tensor"),
        (np.array([[[None] * 3]]), r"a picture is object \[1, 1, 3\], expected a path"),
    ],
    ids=["none", "list of none", "no rows", "no columns", "empty pil", "no axes", "objects"],
)
def test_what_is_no_picture_is_named(squares, image, message):
    with pytest.raises(ValueError, match=message):
        squares.encode_image(image)


@pytest.mark.parametrize(("texts", "message"), [([None], "text 0 is NoneType"), (None, "texts are NoneType")])
def test_what_is_no_text_is_named(squares, texts, message):
    with pytest.raises(ValueError, match=message):
        squares.encode_text(texts)


def test_explain_shows_the_grid_and_the_pixels_that_the_tower_reads(naflex):
    tensor = torch.full((3, 80, 44), 7, dtype=torch.uint8)
    tensor[:, 40:] = 200
    found = naflex.explain(tensor)
    assert (found.size, found.grid, found.tokens, found.seq_len) == ((80, 44), (4, 3), 12, 12)
    assert found.resized.shape == (3, 64, 48)
    assert found.scale == pytest.approx((0.8, 48 / 44))
    assert found.resized[:, :28].unique().tolist() == [7]
    assert found.resized[:, 36:].unique().tolist() == [200]
    assert "44 x 80 px -> 48 x 64 px" in str(found)
    assert found.draw().size == (48, 64)


def test_pixels_that_are_scaled_already_are_refused(squares):
    with pytest.raises(ValueError, match=r"a picture is torch.float32 \[3, 8, 8\], expected"):
        squares.encode_image(torch.rand(3, 8, 8))


def test_broken_picture_is_named(squares, tmp_path):
    (tmp_path / "a.png").write_bytes(pngs(1)[0][:90])
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        squares.encode_image([tmp_path / "a.png"])


@pytest.mark.parametrize("keeps_ratio", [False, True], ids=["fixed", "naflex"])
def test_weights_of_other_libraries_bring_their_contracts(exported, keeps_ratio):
    folder, model = exported(keeps_ratio=keeps_ratio)
    patchifier = NaFlexPatchifier(16, 4, (Layout(16, 1),), 16, None, seed=0) if keeps_ratio else None
    loaded = siglip2.load(folder, device="cpu")
    assert loaded.patchifier.contract()["patchifier"] == ("naflex" if keeps_ratio else "fixed")
    expected = Model(model, patchifier or loaded.patchifier, tiny_tokenizer())
    assert torch.allclose(loaded.encode_image(pngs()), expected.encode_image(pngs()), atol=1e-6)
    assert torch.allclose(loaded.encode_text(TEXTS), expected.encode_text(TEXTS), atol=1e-6)


@pytest.mark.parametrize("exported", ["hf"], indirect=True)
def test_half_precision_and_another_length_are_chosen_when_loading(exported):
    folder, _ = exported(keeps_ratio=True)
    whole, half = siglip2.load(folder, "cpu"), siglip2.load(folder, "cpu", torch.bfloat16, seq_len=6)
    assert half.explain(pngs(1)[0]).seq_len == 6
    assert half.model.vision.pos_embed.dtype == torch.bfloat16
    assert not half.model.text.blocks[0].attn.fused_attn  # slow in bf16 on a CPU
    short = siglip2.load(folder, "cpu", seq_len=6)
    assert torch.allclose(half.encode_image(pngs()), short.encode_image(pngs()), atol=0.03)
    assert not torch.allclose(short.encode_image(pngs()), whole.encode_image(pngs()), atol=0.03)


@pytest.mark.parametrize("exported", ["hf"], indirect=True)
def test_weights_without_a_tokenizer_encode_pictures_and_say_what_texts_need(exported, toy_tokenizer):
    folder, _ = exported(keeps_ratio=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    loaded = siglip2.load(folder, device="cpu")
    assert loaded.encode_image(pngs()).shape == (5, 64)
    with pytest.raises(ValueError, match=r"came without a tokenizer: give load\(..., tokenizer=\)"):
        loaded.encode_text(TEXTS)
    assert siglip2.load(folder, device="cpu", tokenizer=toy_tokenizer).encode_text(TEXTS).shape == (3, 64)


@pytest.mark.parity
@pytest.mark.parametrize("exported", ["hf"], indirect=True)
@pytest.mark.parametrize("keeps_ratio", [False, True], ids=["fixed", "naflex"])
def test_pictures_and_texts_give_what_transformers_gives(exported, keeps_ratio):
    """From files to probabilities, each library with its own processor."""
    transformers = pytest.importorskip("transformers")
    folder, _ = exported(keeps_ratio=keeps_ratio)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs()]
    inputs = processor(text=TEXTS, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**inputs)
    ours = siglip2.load(folder, device="cpu")
    found = ours.probabilities(ours.encode_image(pictures), ours.encode_text(TEXTS))
    assert torch.allclose(found, expected.logits_per_image.sigmoid(), atol=1e-5)
