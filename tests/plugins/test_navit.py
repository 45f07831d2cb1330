"""`navit` draws a resolution for each image, packs groups into rows of one shape, and evaluates as naflex does."""

# R rows, S patches of a row, N patches of an image, P patch values

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from siglip2.core.batch import Patches
from siglip2.core.crops import GLOBAL
from siglip2.core.data.loader import Maker, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.functional import grid_coords
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Layout, Packer
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.locca import LocCa
from siglip2.plugins.naflex import NaFlex
from siglip2.plugins.navit import NaViT, dropped_share
from siglip2.plugins.sigmoid import Sigmoid
from siglip2.testing import TinySource, check_plugin, fake_batch, rehearse, tiny_module, tiny_tokenizer

SMALL = {
    "seq_len": 24,
    "batch_size": 8,
    "min_side": 20,
    "max_side": 70,
    "images_per_row": 2,
    "slots": 6,
    "group": 4,
    "eval_seq_len": 9,
    "table": 4,
}


def patchifier_of(**options):
    return build_manager([NaViT(**{**SMALL, **options})]).hook.patchifier()


def image(height=40, width=90, *, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def drawn(patchifier, seed, picture=None):
    picture = image() if picture is None else picture
    return patchifier(picture, IMAGE, patchifier.layout(0), np.random.default_rng(seed))


def unpacked(images: Patches) -> list[Patches]:
    """The images of packed rows one by one, [1, N, P] each with the grid it lies in."""
    starts, lengths = images.packing.start.tolist(), images.packing.length.tolist()
    flat = images.apply(lambda t: t.flatten(0, 1) if t.ndim == 3 else t)
    found = []
    for start, length in zip(starts, lengths, strict=True):
        stretch = slice(start, start + length)
        found.append(Patches(flat.patches[None, stretch], flat.coords[None, stretch], sizes=flat.sizes[None, stretch]))
    return found


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("patches", "coords"))


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "drop_mean": 0.4}, {"batch_size": 8}])
def test_it_keeps_the_contract_of_plugins(options):
    check_plugin(NaViT, **options)


def test_every_batch_is_packed_with_one_layout_and_evaluation_is_not():
    patchifier = patchifier_of()
    assert isinstance(patchifier, Packer)
    assert {patchifier.layout(index) for index in (0, 1, 10**9)} == {Layout(24, 8, packed=True)}
    assert patchifier.eval_layout(5) == Layout(9, 5)
    assert patchifier.grid == (4, 4)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (64, 64), (500, 17), (1, 1)])
@pytest.mark.parametrize("max_scale", [None, 1.0])
def test_evaluation_makes_the_patches_of_naflex(height, width, max_scale):
    patchifier = patchifier_of(drop_mean=0.5, max_scale=max_scale)
    naflex = build_manager([NaFlex(eval_seq_len=9, table=4, max_scale=max_scale)]).hook.patchifier()
    found, expected = (p(image(height, width), IMAGE, p.eval_layout(1)) for p in (patchifier, naflex))
    assert same(found, expected)
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.sizes, expected.sizes)


@pytest.mark.parametrize("seed", range(10))
def test_the_side_is_drawn_evenly_and_the_grid_is_the_largest_of_its_area(seed):
    patches = drawn(patchifier_of(), seed)
    side = np.random.default_rng(seed).uniform(20, 70)
    grid = native_grid(40, 90, patch_size=16, max_patches=round(side**2 / 256))
    assert patches.sizes.tolist() == [[list(grid)]]
    assert torch.equal(patches.patches, native_patches(image(), grid, 16).patches)
    assert torch.equal(patches.coords, grid_coords(*grid)[None])
    assert patches.valid is None


def test_resolutions_cover_what_may_be_drawn():
    lengths = [drawn(patchifier_of(), seed, image(64, 64)).patches.shape[1] for seed in range(200)]
    assert set(lengths) == {1, 4, 9, 16}  # squares of 20 to 70 px have 1.6 to 19.1 patches, and whole ones are k x k


def test_an_image_has_at_most_as_many_patches_as_it_may_and_at_least_one():
    most, least = patchifier_of(max_tokens=5), patchifier_of(min_side=1, max_side=2)
    assert max(drawn(most, seed).patches.shape[1] for seed in range(50)) <= 5
    assert drawn(least, 0).patches.shape[1] == 1


def test_images_are_not_enlarged_beyond_max_scale():
    small = image(16, 32)
    assert drawn(patchifier_of(min_side=60), 0, small).patches.shape[1] > 8
    assert drawn(patchifier_of(min_side=60, max_scale=1.0), 0, small).patches.shape[1] == 2


def test_a_packed_layout_needs_random_numbers():
    patchifier = patchifier_of()
    with pytest.raises(ValueError, match="navit: the resolution of an image in a packed batch is drawn, so `rng`"):
        patchifier(image(), IMAGE, patchifier.layout(0))


@pytest.mark.parametrize("seed", range(5))
def test_dropping_keeps_some_patches_as_they_were_and_in_order(seed):
    whole, thinned = drawn(patchifier_of(), seed), drawn(patchifier_of(drop_mean=0.5), seed)
    cells = {tuple(cell): patch for cell, patch in zip(whole.coords[0].tolist(), whole.patches[0], strict=True)}
    places = [tuple(cell) for cell in thinned.coords[0].tolist()]
    assert places == sorted(set(places))  # row-major
    assert 1 <= len(places) <= len(cells)
    assert all(torch.equal(cells[c], patch) for c, patch in zip(places, thinned.patches[0], strict=True))
    assert torch.equal(thinned.sizes, whole.sizes)  # positions are those of the whole image


def test_dropping_is_a_function_of_the_random_numbers_and_differs_between_images():
    patchifier = patchifier_of(drop_mean=0.5, min_side=70)
    assert same(drawn(patchifier, 3), drawn(patchifier, 3))
    assert len({str(drawn(patchifier, seed).coords.tolist()) for seed in range(20)}) == 20


def test_as_many_patches_are_dropped_as_asked_for_on_average():
    patchifier, count = patchifier_of(drop_mean=0.5, min_side=70, seq_len=64), 300
    whole = drawn(patchifier_of(min_side=70, seq_len=64), 0).patches.shape[1]
    kept = np.array([drawn(patchifier, seed).patches.shape[1] for seed in range(count)])
    assert abs(1 - kept.mean() / whole - 0.5) < 0.05
    assert kept.min() >= round(0.1 * whole)  # drop_max is 0.9


def test_even_an_image_that_should_lose_everything_keeps_a_patch():
    patchifier = patchifier_of(drop_mean=0.98, drop_max=1.0, min_side=16, max_side=40)
    assert min(drawn(patchifier, seed).patches.shape[1] for seed in range(100)) == 1


@pytest.mark.parametrize(("mean", "most"), [(0.5, 0.9), (0.2, 0.4), (0.6, 1.0)])
def test_the_dropped_share_has_the_published_mean_and_variance(mean, most):
    rng, m = np.random.default_rng(0), mean / most
    shares = np.array([dropped_share(rng, mean=mean, most=most) for _ in range(20_000)])
    assert 0 <= shares.min() < shares.max() <= most
    assert shares.mean() == pytest.approx(mean, rel=0.02)
    assert shares.var() == pytest.approx(most**2 * 0.3 * m * (1 - m), rel=0.05)


@pytest.mark.parametrize(("count", "rows"), [(4, 2), (8, 4), (9, 5), (11, 6), (1, 1)])
def test_packed_images_are_the_images_in_their_order_in_rows_that_follow_from_their_number(count, rows):
    patchifier = patchifier_of(max_tokens=12)
    layout = patchifier.layout(0)
    images = [drawn(patchifier, seed, image(40, 30 + 10 * seed, seed=seed)) for seed in range(count)]
    together = patchifier.pack(images, layout)
    assert together.patches.shape == (rows, 24, 768)
    assert together.num_images == count
    assert (together.packing.slots, together.packing.longest) == (6, 12)
    for found, expected in zip(unpacked(together), images, strict=True):
        assert same(found, expected)  # two images of at most 12 patches fit into a row of 24
        assert (found.sizes == expected.sizes).all()


def test_where_the_rows_are_too_few_every_image_is_thinned_and_none_left_out():
    patchifier = patchifier_of(images_per_row=4, min_side=64, max_side=64)
    images = [drawn(patchifier, seed, image(64, 64, seed=seed)) for seed in range(8)]
    together = patchifier.pack(images, patchifier.layout(0))
    assert together.patches.shape[0] == 2
    assert together.packing.length.tolist() == [6] * 8  # of 16: four images in each row of 24


def train_batches(patchifier, *, rank=0, world_size=1):
    source = TinySource()
    maker = Maker(source, patchifier, tiny_tokenizer(), seed=3)
    views = ((0.0, (IMAGE, CAPTION)),)
    order = Order(source.shard_sizes(), 3)
    return TrainBatches(maker, order, views, max_batches=4, rank=rank, world_size=world_size)


@pytest.mark.parametrize("options", [{}, {"drop_mean": 0.3}, {"images_per_row": 3.0}])
def test_two_ranks_have_the_images_of_one(options):
    patchifier = patchifier_of(**options)  # 8 images, 4 on each rank, in groups of 4
    for index in range(2):
        whole = train_batches(patchifier)[index]
        ranks = [train_batches(pickle.loads(pickle.dumps(patchifier)), rank=r, world_size=2)[index] for r in range(2)]
        assert whole.keys == ranks[0].keys + ranks[1].keys
        joined = [one for batch in ranks for one in unpacked(batch.views["image"])]
        assert all(same(a, b) for a, b in zip(unpacked(whole.views["image"]), joined, strict=True))
        assert torch.equal(whole.views["caption"], torch.cat([batch.views["caption"] for batch in ranks]))


def test_batches_have_one_shape_and_differ_in_content():
    batches = [train_batches(patchifier_of())[index].views["image"] for index in range(3)]
    assert len({tuple(t.shape for t in (b.patches, b.coords, b.sizes, b.packing.owner)) for b in batches}) == 1
    assert len({str(b.packing.length.tolist()) for b in batches}) == 3


def by_itself(batch):
    """The same batch with every image in a row of its own, padded."""
    images = [padded(one, 24) for one in unpacked(batch.views["image"])]
    sizes = torch.cat([one.sizes[:, :1] for one in unpacked(batch.views["image"])])
    joined = Patches(*(torch.cat([getattr(i, name) for i in images]) for name in ("patches", "coords", "valid")))
    return replace(batch, views={**batch.views, "image": replace(joined, sizes=sizes)})


@pytest.mark.parametrize("options", [{}, {"drop_mean": 0.4}])
def test_losses_and_gradients_over_packed_rows_are_those_over_padded_images(options):
    module = tiny_module([NaViT(**{**SMALL, **options}), Sigmoid(), LocCa(length=40)])
    torch.manual_seed(0)
    torch.nn.init.normal_(module.plugins["locca"].decoder.out.weight, std=0.1)  # begins at 0: the image would not count
    module.wake_due(0.0)
    batch = module.fake_batch(0.0, batch_size=4)
    assert batch.views["image"].packing is not None
    results = []
    for one in (batch, by_itself(batch)):
        module.zero_grad()
        terms = module(one, 0.0)
        torch.stack(list(terms.values())).sum().backward()
        results.append((terms, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}))
    (packed_terms, packed_gradients), (terms, gradients) = results
    assert set(terms) == {"sigmoid", "locca"}
    assert packed_gradients.keys() == gradients.keys()
    for name, term in terms.items():
        torch.testing.assert_close(packed_terms[name], term, rtol=1e-6, atol=1e-6)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=1e-6 * scale, msg=name)


def test_a_recipe_with_it_rehearses():
    rehearse([NaViT(**SMALL), Sigmoid(), LocCa(length=40)])


def test_crops_beside_packed_images_have_rows_of_their_own():
    batch = fake_batch([IMAGE, GLOBAL], 4, patchifier=patchifier_of())
    assert batch.views["image"].packing is not None
    assert batch.views[GLOBAL.name].packing is None
    assert batch.views[GLOBAL.name].num_images == 4 * GLOBAL.copies


def test_contract_names_what_decides_the_pixels_and_nothing_that_is_drawn():
    expected = {
        "patchifier": "navit",
        "patch_size": 14,
        "table": 4,
        "max_scale": 1.0,
        "filter": "bilinear",
        "antialias": True,
        "mean": 0.5,
        "std": 0.5,
    }
    assert patchifier_of(patch_size=14, max_scale=1.0).contract() == expected
    assert patchifier_of(patch_size=14, max_scale=1.0, drop_mean=0.5, group=8, seq_len=30).contract() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "navit: expected positive numbers, found seq_len=0"),
        ({"group": 0}, "expected positive numbers, .* group=0"),
        ({"max_scale": 0.0}, "expected positive numbers, .* max_scale=0.0"),
        ({"min_side": 0}, "expected 0 < min_side <= max_side, found min_side=0, max_side=70"),
        ({"min_side": 90}, "found min_side=90, max_side=70"),
        ({"max_tokens": 25}, "expected max_tokens <= seq_len .* found max_tokens=25, .* seq_len=24"),
        ({"images_per_row": 7}, "images_per_row <= slots .* found .* images_per_row=7, slots=6"),
        ({"images_per_row": 0.5}, "1 <= images_per_row .* found .* images_per_row=0.5"),
        ({"slots": 25}, "slots <= seq_len, found .* slots=25, seq_len=24"),
        ({"drop_mean": 0.9}, "expected 0 <= drop_mean < drop_max <= 1, found drop_mean=0.9, drop_max=0.9"),
        ({"drop_max": 1.1}, "found drop_mean=0.0, drop_max=1.1"),
        ({"start": 0.5, "stop": 0.5}, "plugin 'navit': expected 0 <= start < stop <= 1"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        NaViT(**{**SMALL, **options})
