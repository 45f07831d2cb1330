"""Packed linear layers compute what the plain ones do, wherever this machine can pack."""

import copy
import io
import pickle

import pytest
import torch
from timm.layers import GELUTanh, Mlp
from torch import nn

import siglip2
from siglip2.core.interop.export import write
from siglip2.core.interop.weights import assemble, square_pixels
from siglip2.prediction.model import Model
from siglip2.prediction.packed import PackedLinear, can_pack, pack
from siglip2.testing import tiny_model, tiny_tokenizer
from siglip2.testing.tiny import PATCHIFIER, TinySource

TEXTS = ["a gold disc", "Kiste in ROT", ""]
packs = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN for x86")
packs_bf16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no AVX-512")


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


@packs
@pytest.mark.parametrize("gelu", [GELUTanh, nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.ReLU])
def test_a_packed_mlp_computes_what_float64_does(gelu):
    mlp = Mlp(24, 40, act_layer=gelu)
    x = torch.randn(5, 7, 24) * 3
    expected = copy.deepcopy(mlp).double()(x.double())
    pack(mlp)
    assert not linears(mlp)
    with torch.inference_mode():
        assert torch.allclose(mlp(x).double(), expected, atol=1e-6)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (600, 3), (2, 5, 3)], ids=str)
def test_any_number_of_rows_and_no_bias(shape, bias):
    linear = nn.Linear(3, 11, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        found = PackedLinear(linear)(x)
    assert torch.allclose(found, linear(x), atol=1e-6)


@packs_bf16
def test_in_bf16_rounding_is_no_larger_than_that_of_plain_layers():
    model, batch = tiny_model(), [TinySource().read(i).record["png"] for i in range(8)]
    exact = Model(copy.deepcopy(model), PATCHIFIER, tiny_tokenizer()).encode_image(batch)
    plain = Model(copy.deepcopy(model).bfloat16(), PATCHIFIER, tiny_tokenizer()).encode_image(batch)
    pack(model.bfloat16())
    packed = Model(model, PATCHIFIER, tiny_tokenizer()).encode_image(batch)
    rms = [(z - exact).pow(2).mean().sqrt() for z in (plain, packed)]
    assert 0 < rms[1] < 1.2 * rms[0]


@packs
def test_load_packs_on_a_cpu_and_the_embeddings_stay(tmp_path):
    state = {name: tensor.detach() for name, tensor in tiny_model().state_dict().items()}
    about = {"heads": {"vision": 2, "text": 2}, "native": False, "pixels": square_pixels(32, 16, filter="bilinear")}
    checkpoint = tmp_path / "out"
    write(assemble("siglip2", state, place="test", tokenizer=tiny_tokenizer(), **about), "hf", checkpoint, check=False)
    plain, packed = siglip2.load(checkpoint, "cpu", packed=False), siglip2.load(checkpoint, "cpu")
    assert linears(plain.model)
    assert not linears(packed.model)
    pictures = [TinySource().read(i).record["png"] for i in range(5)]
    assert torch.allclose(packed.encode_image(pictures), plain.encode_image(pictures), atol=1e-6)
    assert torch.allclose(packed.encode_text(TEXTS), plain.encode_text(TEXTS), atol=1e-6)


@packs
def test_autocast_leaves_packed_layers_in_their_own_precision():
    model = Model(tiny_model(), PATCHIFIER, tiny_tokenizer())
    expected = model.encode_text(TEXTS)
    pack(model.model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model.encode_text(TEXTS), expected, atol=0.05)


@packs
@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("meta"),
        lambda model: model.requires_grad_().encode_text(tiny_tokenizer().encode(TEXTS)),
        lambda model: model.state_dict(),
        lambda model: torch.save(model.state_dict(), io.BytesIO()),
        lambda model: copy.copy(model.text.blocks[0].mlp.fc1),
        copy.deepcopy,
        pickle.dumps,
    ],
    ids=["bf16", "device", "gradient", "state_dict", "save", "copy", "deepcopy", "pickle"],
)
def test_packed_towers_refuse_what_their_weights_cannot_take_part_in_and_stay_as_they_were(act):
    model = Model(tiny_model(), PATCHIFIER, tiny_tokenizer())
    expected = model.encode_text(TEXTS)
    pack(model.model)
    with pytest.raises(RuntimeError, match=r"packed towers cannot be .*siglip2\.load\(\.\.\., packed=False\)"):
        act(model.model)
    assert torch.allclose(model.encode_text(TEXTS), expected, atol=1e-6)


@packs
def test_packed_towers_may_be_sent_to_where_they_are():
    model = Model(tiny_model(), PATCHIFIER, tiny_tokenizer())
    expected = model.encode_text(TEXTS)
    pack(model.model)
    model.model.to("cpu", torch.float32).float().cpu()
    assert torch.allclose(model.encode_text(TEXTS), expected, atol=1e-6)


def test_half_precision_and_other_types_stay_plain():
    assert not can_pack(torch.float16)
    assert not can_pack(torch.float64)
