"""Our vision tower with our weights is timm's SigLIP trunk, if that trunk is told to use the tanh GELU."""

import pytest
import timm
import torch
from reference_weights import to_timm
from timm.models.vision_transformer import VisionTransformer

from siglip2.core.model.two_towers import build_two_towers
from siglip2.core.model.vision import to_unit_range

pytestmark = pytest.mark.parity


def trunk(tower, act_layer):
    """A small VisionTransformer as timm's vit_*_siglip_* entries configure it, with our weights."""
    block = tower.blocks[0]
    model = VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=tower.width,
        depth=len(tower.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=(block.mlp.fc1.out_features + 0.5) / tower.width,
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer=act_layer,
    )
    model.load_state_dict(to_timm(tower.state_dict()))
    return model.eval()


def test_vision_tower_is_timms_trunk_with_tanh_gelu(make_towers, pixels, images):
    ours = make_towers().vision
    theirs = trunk(ours, "gelu_tanh")
    tokens = theirs.forward_features(to_unit_range(pixels))
    found = ours(images)
    torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=1e-5)  # float32; measured < 5e-6
    torch.testing.assert_close(found.pooled, theirs.forward_head(tokens), rtol=0, atol=1e-5)


def test_exact_gelu_is_told_apart(make_towers, pixels, images):
    """timm's B/16, L/16 and So400m/14 SigLIP entries use it: without the override parity fails visibly."""
    ours = make_towers().vision
    theirs = trunk(ours, "gelu")
    assert (ours(images).pooled - theirs(to_unit_range(pixels))).abs().max() > 3e-5


@pytest.mark.parametrize(
    ("size", "patch_size", "name"),
    [
        ("B/32", 32, "vit_base_patch32_siglip_256"),
        ("L/16", 16, "vit_large_patch16_siglip_256"),
        ("So400m/16", 16, "vit_so400m_patch16_siglip_256"),
        ("g-opt/16", 16, "vit_giantopt_patch16_siglip_256"),
    ],
)
def test_vision_towers_have_the_parameters_of_timms_published_trunks(size, patch_size, name):
    grid = (256 // patch_size, 256 // patch_size)
    with torch.device("meta"):
        ours = build_two_towers(size, patch_size=patch_size, grid=grid, vocab_size=8, context_length=4).vision
        theirs = timm.create_model(name, num_classes=0)
    expected = {k: p.shape for k, p in theirs.state_dict().items()}
    assert {k: p.shape for k, p in to_timm(ours.state_dict()).items()} == expected
