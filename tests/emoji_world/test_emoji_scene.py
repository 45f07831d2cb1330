"""A composed sample is reproducible, and what it says about itself is true of its pixels."""

import numpy as np
import pytest

from siglip2.emoji_world.catalogue import load_catalogue, select
from siglip2.emoji_world.paint import MIN_VISIBLE
from siglip2.emoji_world.scene import KINDS, WARM_GROUPS, SceneOptions, compose

LANGUAGES = ("en", "de", "ar", "ja")
OPTIONS = SceneOptions(languages=LANGUAGES)
WIDE = SceneOptions(size=128, scene_aspect=4.0, single_aspect=4.0)


@pytest.fixture(scope="module")
def pool():
    return select(60, languages=LANGUAGES)[0]


@pytest.fixture(scope="module")
def scenes(pool):
    return [compose(pool, index, kind="scene", seed=3, split="train", options=OPTIONS) for index in range(150)]


@pytest.fixture(scope="module")
def wide(pool):
    return {
        kind: [compose(pool, index, kind=kind, seed=3, split="train", options=WIDE) for index in range(200)]
        for kind in KINDS
    }


def extent(scene, region) -> float:
    """Long side of a region's box in pixels."""
    height, width = scene.instance_mask.shape
    return max((region.box[2] - region.box[0]) * width, (region.box[3] - region.box[1]) * height)


def long_side(scene, region) -> float:
    """Pixels of the emoji's long side before it is turned, as the README of a world gives it."""
    height, width = scene.instance_mask.shape
    return 0.52 / region.z * min((width * height) ** 0.5, 1.45 * min(width, height))


def same(first, second) -> bool:
    return np.array_equal(first.image, second.image) and first.captions == second.captions


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_a_function_of_seed_split_kind_and_index(pool, kind):
    def make(index=5, seed=0, split="train"):
        return compose(pool, index, kind=kind, seed=seed, split=split, options=OPTIONS)

    assert same(make(), make())
    assert not same(make(), make(index=6))
    assert not same(make(), make(seed=1))
    assert not same(make(), make(split="val"))


def test_composing_leaves_the_global_random_state_alone(pool):
    before = np.random.get_state()[1].tolist()
    compose(pool, 0, kind="scene", seed=0, split="train")
    assert np.random.get_state()[1].tolist() == before


def test_languages_change_the_captions_and_nothing_else(pool):
    one = compose(pool, 2, kind="scene", seed=0, split="train")
    four = compose(pool, 2, kind="scene", seed=0, split="train", options=OPTIONS)
    assert np.array_equal(one.image, four.image)
    assert one.captions["en"] == four.captions["en"]
    assert set(four.captions) == set(LANGUAGES)


def test_boxes_are_the_extent_of_the_masks(scenes, wide):
    for scene in [*scenes, *wide["scene"], *wide["single"]]:
        height, width = scene.instance_mask.shape
        assert scene.image.shape == (height, width, 3)
        assert set(np.unique(scene.instance_mask)) <= set(range(len(scene.regions) + 1))
        for k, region in enumerate(scene.regions, start=1):
            rows, columns = np.nonzero(scene.instance_mask == k)
            edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert region.box == pytest.approx(edges / (width, height, width, height))


def test_regions_are_nearest_first_visible_and_of_the_size_their_distance_says(scenes, wide):
    for scene in [*scenes, *wide["scene"]]:
        distances = [region.z for region in scene.regions]
        assert distances == sorted(distances)
        assert 1 <= len(distances) <= 5
        for region in scene.regions:
            assert MIN_VISIBLE <= region.visible <= 1
            assert extent(scene, region) <= 1.45 * long_side(scene, region) + 2  # turned by at most 22 degrees
            if region.visible == 1:
                assert extent(scene, region) >= 0.75 * long_side(scene, region) - 3  # faint edges are not in the box
    assert any(region.visible < 0.95 for scene in scenes for region in scene.regions)


def test_aspect_ratios_vary_between_one_to_two_and_two_to_one(scenes):
    ratios = np.array([scene.image.shape[1] / scene.image.shape[0] for scene in scenes])
    assert ratios.min() >= 0.49
    assert ratios.max() <= 2.05
    assert (ratios < 0.7).any()
    assert (ratios > 1.4).any()
    assert all(max(scene.image.shape[:2]) == 96 for scene in scenes)


def test_wide_worlds_are_log_uniformly_wide_and_tall(wide):
    for pictures in wide.values():
        octaves = np.log2([scene.image.shape[1] / scene.image.shape[0] for scene in pictures])
        assert all(max(scene.image.shape[:2]) == 128 for scene in pictures)
        assert octaves.min() >= -2.05
        assert octaves.max() <= 2.05
        # a quarter of 200 in each quarter of the range, within about three standard deviations
        assert np.histogram(octaves, bins=(-2.1, -1, 0, 1, 2.1))[0] == pytest.approx(50, abs=20)


def test_emoji_in_wide_pictures_are_readable_beside_the_short_side(wide):
    for scene in wide["scene"]:
        # the nearest has up to 0.52 of a square and 0.75 of the short side of a strip
        assert 0.25 <= extent(scene, scene.regions[0]) / min(scene.image.shape[:2]) <= 1
    for scene in wide["single"]:
        assert scene.regions[0].visible == 1
        assert 0.4 <= extent(scene, scene.regions[0]) / min(scene.image.shape[:2]) <= 1


def test_a_single_lies_anywhere_along_a_wide_picture(wide):
    strips = [scene for scene in wide["single"] if scene.image.shape[1] > 3 * scene.image.shape[0]]
    centres = [(scene.regions[0].box[0] + scene.regions[0].box[2]) / 2 for scene in strips]
    assert min(centres) < 0.25
    assert max(centres) > 0.75


def test_default_pictures_are_those_of_worlds_without_aspect_options(pool):
    # what was drawn at commit 916c54f, before there were such options
    scene, single = (compose(pool, 0, kind=kind, seed=3, split="train") for kind in ("scene", "single"))
    drawn = {"1f3f5": 1.4692, "1f397": 1.6264, "1f98b": 2.017, "1f33d": 2.1132}
    assert scene.image.shape == (65, 96, 3)
    assert {region.emoji.id: round(region.z, 4) for region in scene.regions} == drawn
    assert scene.captions["en"] == "rosette, reminder ribbon, butterfly and ear of corn"
    assert single.image.shape == (96, 96, 3)
    assert {region.emoji.id: round(region.z, 4) for region in single.regions} == {"1f397": 0.8799}


def test_claimed_relations_are_true_of_the_boxes(scenes):
    words = {"left": (" to the left of ", 0), "above": (" above ", 1)}
    claims = [scene for scene in scenes if scene.relation]
    assert {scene.relation for scene in claims} == {"left", "above"}
    for scene in claims:
        word, axis = words[scene.relation]
        first, second = scene.captions["en"].split(word)
        boxes = {region.emoji.names["en"]: region.box for region in scene.regions}
        assert boxes[first][axis + 2] <= boxes[second][axis]


def test_every_caption_names_every_region(scenes):
    for scene in scenes:
        for language in LANGUAGES:
            assert all(region.emoji.names[language] in scene.captions[language] for region in scene.regions)


@pytest.mark.parametrize("name", ["crutch", "chopsticks", "magic wand", "shopping cart", "dotted line face"])
def test_thin_emoji_survive_the_smallest_pictures(name):
    thin = next(emoji for emoji in load_catalogue() if emoji.names["en"] == name)
    for options in (SceneOptions(size=32), SceneOptions(size=128, scene_aspect=8.0)):
        for index in range(40):
            scene = compose([thin], index, kind="scene", seed=0, split="train", options=options)
            assert len(scene.regions) == 1


def test_successive_singles_show_every_emoji_once(pool):
    shown = [compose(pool, index, kind="single", seed=0, split="train").regions[0].emoji.id for index in range(120)]
    assert sorted(shown[:60]) == sorted(shown[60:]) == sorted(emoji.id for emoji in pool)
    assert shown[:60] != shown[60:]


def test_singles_are_square_large_and_whole(pool):
    for index in range(60):
        scene = compose(pool, index, kind="single", seed=1, split="train", options=SceneOptions(size=64))
        assert scene.image.shape == (64, 64, 3)
        assert len(scene.regions) == 1
        xmin, ymin, xmax, ymax = scene.regions[0].box
        assert max(xmax - xmin, ymax - ymin) > 0.4
        assert scene.regions[0].visible == 1


@pytest.mark.parametrize(("bias", "low", "high"), [(0.0, 0.4, 0.6), (0.8, 0.85, 0.95), (1.0, 1.0, 1.0)])
def test_bias_ties_the_background_to_the_group(pool, bias, low, high):
    options = SceneOptions(bias=bias)
    singles = [compose(pool, index, kind="single", seed=0, split="b", options=options) for index in range(400)]
    agrees = [(scene.regions[0].emoji.group in WARM_GROUPS) == (scene.background == "warm") for scene in singles]
    assert low <= np.mean(agrees) <= high


def test_warm_backgrounds_are_redder_than_they_are_blue(pool):
    for index in range(40):
        scene = compose(pool, index, kind="single", seed=0, split="train")
        red, _, blue = scene.image[scene.instance_mask == 0].mean(axis=0)
        assert (red > blue) == (scene.background == "warm")


def test_unknown_kind_and_empty_pool_are_errors(pool):
    with pytest.raises(ValueError, match="found kind 'pair' and 60 emoji"):
        compose(pool, 0, kind="pair", seed=0, split="train")
    with pytest.raises(ValueError, match="and 0 emoji"):
        compose((), 0, kind="single", seed=0, split="train")
