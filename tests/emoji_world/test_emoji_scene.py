"""A composed sample is reproducible, and what it says about itself is true of its pixels."""

import numpy as np
import pytest

from siglip2.emoji_world.catalogue import load_catalogue, select
from siglip2.emoji_world.paint import BASE, MIN_VISIBLE
from siglip2.emoji_world.scene import KINDS, WARM_GROUPS, SceneOptions, compose

LANGUAGES = ("en", "de", "ar", "ja")
OPTIONS = SceneOptions(languages=LANGUAGES)


@pytest.fixture(scope="module")
def pool():
    return select(60, languages=LANGUAGES)[0]


@pytest.fixture(scope="module")
def scenes(pool):
    return [compose(pool, index, kind="scene", seed=3, split="train", options=OPTIONS) for index in range(150)]


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


def test_boxes_are_the_extent_of_the_masks(scenes):
    for scene in scenes:
        height, width = scene.instance_mask.shape
        assert scene.image.shape == (height, width, 3)
        assert set(np.unique(scene.instance_mask)) <= set(range(len(scene.regions) + 1))
        for k, region in enumerate(scene.regions, start=1):
            rows, columns = np.nonzero(scene.instance_mask == k)
            edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert region.box == pytest.approx(edges / (width, height, width, height))


def test_regions_are_nearest_first_visible_and_of_the_size_their_distance_says(scenes):
    for scene in scenes:
        distances = [region.z for region in scene.regions]
        assert distances == sorted(distances)
        assert 1 <= len(distances) <= 5
        height, width = scene.instance_mask.shape
        for region in scene.regions:
            assert MIN_VISIBLE <= region.visible <= 1
            extent = max((region.box[2] - region.box[0]) * width, (region.box[3] - region.box[1]) * height)
            assert extent <= 1.45 * BASE * (width * height) ** 0.5 / region.z + 2  # turned by at most 22 degrees
    assert any(region.visible < 0.95 for scene in scenes for region in scene.regions)


def test_aspect_ratios_vary_between_one_to_two_and_two_to_one(scenes):
    ratios = np.array([scene.image.shape[1] / scene.image.shape[0] for scene in scenes])
    assert ratios.min() >= 0.49
    assert ratios.max() <= 2.05
    assert (ratios < 0.7).any()
    assert (ratios > 1.4).any()
    assert all(max(scene.image.shape[:2]) == 96 for scene in scenes)


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
    for index in range(40):
        scene = compose([thin], index, kind="scene", seed=0, split="train", options=SceneOptions(size=32))
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
