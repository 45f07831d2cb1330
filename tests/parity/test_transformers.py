"""Our towers with our weights are transformers' `SiglipModel` and, with padding, `Siglip2Model`; gradients included."""

# B batch, N patches, P patch values

import pytest
import torch
from reference_weights import to_transformers
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from siglip2.core.batch import Patches
from siglip2.core.functional import grid_coords, sigmoid_loss
from siglip2.core.model.vision import to_unit_range

pytestmark = pytest.mark.parity
TOLERANCE = {"rtol": 0, "atol": 1e-5}  # float32 through three blocks in another order of operations; measured < 5e-6
GRIDS = [(4, 4), (3, 7), (2, 5)]


def configs(model):
    """The two tower configurations that describe our model."""
    vision, text = model.vision.blocks[0], model.text.blocks[0]
    common = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
    return {
        "vision_config": {
            "hidden_size": model.vision.width,
            "intermediate_size": vision.mlp.fc1.out_features,
            "num_hidden_layers": len(model.vision.blocks),
            "num_attention_heads": vision.attn.num_heads,
            "patch_size": 16,
            "vision_use_head": True,
            **common,
        },
        "text_config": {
            "hidden_size": model.text.width,
            "intermediate_size": text.mlp.fc1.out_features,
            "num_hidden_layers": len(model.text.blocks),
            "num_attention_heads": text.attn.num_heads,
            "vocab_size": model.text.token_embed.num_embeddings,
            "max_position_embeddings": model.text.context_length,
            "projection_size": model.embed_dim,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **common,
        },
    }


def siglip(model):
    """transformers' fixed-resolution model with our weights."""
    described = configs(model)
    config = SiglipConfig(
        vision_config={**described["vision_config"], "image_size": 64}, text_config=described["text_config"]
    )
    config._attn_implementation = "eager"
    theirs = SiglipModel(config)
    theirs.load_state_dict(to_transformers(model.state_dict(), convolution=True))
    return theirs.eval()


def siglip2(model):
    """transformers' NaFlex model with our weights."""
    described = configs(model)
    config = Siglip2Config(
        vision_config={**described["vision_config"], "num_patches": 16}, text_config=described["text_config"]
    )
    config._attn_implementation = "eager"
    theirs = Siglip2Model(config)
    theirs.load_state_dict(to_transformers(model.state_dict(), convolution=False))
    return theirs.eval()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=[48, 32], ids=["square head", "head from 32 to 48 as in g-opt"])
def both(request, make_towers, pixels, images, ids):
    """Our model, theirs, and what each makes of the same images and texts."""
    ours = make_towers(text_width=request.param)
    theirs = siglip(ours)
    answer = theirs(input_ids=ids, pixel_values=pixels / 127.5 - 1, return_loss=True)
    return ours, theirs, ours.encode_image(images), ours.encode_text(ids), answer


def test_image_tokens_and_embeddings_are_those_of_siglip_model(both):
    _, _, image, _, answer = both
    torch.testing.assert_close(image.tokens, answer.vision_model_output.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(image.pooled, answer.vision_model_output.pooler_output, **TOLERANCE)
    torch.testing.assert_close(image.embedding, answer.image_embeds, **TOLERANCE)


def test_text_embeddings_are_those_of_siglip_model(both):
    _, _, _, text, answer = both
    torch.testing.assert_close(text.tokens, answer.text_model_output.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(text.embedding, answer.text_embeds, **TOLERANCE)


def test_logits_are_those_of_siglip_model(both):
    ours, _, image, text, answer = both
    torch.testing.assert_close(ours.logits(image.embedding, text.embedding), answer.logits_per_image, **TOLERANCE)


def test_loss_and_all_gradients_are_those_of_siglip_model(both):
    ours, theirs, image, text, answer = both
    loss = sigmoid_loss(image.embedding, text.embedding, scale=ours.logit_scale, bias=ours.logit_bias)
    torch.testing.assert_close(loss, answer.loss, **TOLERANCE)
    loss.backward()
    answer.loss.backward()
    expected = gradients(theirs)
    converted = to_transformers(gradients(ours), convolution=True)
    assert converted.keys() == expected.keys()
    for name, gradient in converted.items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def naflex():
    """Three images of different grids in 24 patches, and their grids."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randint(0, 256, (3, 24, 768), generator=generator, dtype=torch.uint8)
    coords = torch.zeros(3, 24, 2, dtype=torch.int16)
    valid = torch.zeros(3, 24, dtype=torch.bool)
    for i, (rows, columns) in enumerate(GRIDS):
        coords[i, : rows * columns] = grid_coords(rows, columns)
        valid[i, : rows * columns] = True
    return Patches(patches, coords, valid, sizes=torch.tensor(GRIDS)[:, None])


def naflex_inputs(images):
    return {
        "pixel_values": to_unit_range(images.patches),
        "pixel_attention_mask": images.valid.int(),
        "spatial_shapes": torch.tensor(GRIDS),
    }


def test_padded_images_of_three_grids_have_the_embeddings_of_siglip2_model(make_towers, naflex, ids):
    ours = make_towers()
    found = ours.encode_image(naflex)
    answer = siglip2(ours)(input_ids=ids, **naflex_inputs(naflex))
    hidden = answer.vision_model_output.last_hidden_state
    torch.testing.assert_close(found.tokens[naflex.valid], hidden[naflex.valid], **TOLERANCE)
    torch.testing.assert_close(found.embedding, answer.image_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.encode_text(ids).embedding, answer.text_embeds, **TOLERANCE)


def test_padded_images_have_the_gradients_of_siglip2_model(make_towers, naflex, ids):
    ours = make_towers()
    theirs = siglip2(ours)
    ids = ids[:3]
    answer = theirs(input_ids=ids, **naflex_inputs(naflex), return_loss=True)
    image, text = ours.encode_image(naflex), ours.encode_text(ids)
    loss = sigmoid_loss(image.embedding, text.embedding, scale=ours.logit_scale, bias=ours.logit_bias)
    torch.testing.assert_close(loss, answer.loss, **TOLERANCE)
    loss.backward()
    answer.loss.backward()
    expected = gradients(theirs)
    for name, gradient in to_transformers(gradients(ours), convolution=False).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
