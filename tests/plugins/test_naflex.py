"""`naflex`: one length per batch in rounds that every rank agrees on, and padding that nothing can see."""

# B batch, N patches, P patch values, E embedding dimension

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from siglip2.core.batch import Patches, collate
from siglip2.core.data.loader import Maker, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.hooks import build_manager
from siglip2.core.layout import Layout, Positions
from siglip2.core.native import native_grid, native_patches, padded
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex, shuffled
from siglip2.testing import TinySource, fake_batch, tiny_model, tiny_tokenizer
from siglip2.testing.tiny import same

HALVED = {"batch_size": 32, "batch_sizes": {1024: 16}, "shares": {1024: 2}}  # as SigLIP 2 fits its longest into memory
SMALL = {"seq_lens": [6, 12, 20], "batch_size": 4, "table": 2, "eval_seq_len": 12}


def patchifier_of(**options):
    return build_manager([NaFlex(**options)]).hook.patchifier()


def image(height, width, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def lengths(patchifier, indexes):
    return [patchifier.layout(i).seq_len for i in indexes]


# Layouts.


def test_layout_is_a_pure_function_of_the_index():
    patchifier, elsewhere = patchifier_of(**HALVED), pickle.loads(pickle.dumps(patchifier_of(**HALVED)))
    forwards = lengths(patchifier, range(100))
    shuffled.cache_clear()
    assert lengths(elsewhere, reversed(range(100))) == forwards[::-1]


def test_order_of_lengths_is_the_same_in_every_release():
    """A run that is resumed with a newer release goes on with the same batches."""
    assert lengths(patchifier_of(), range(15)) == [
        *(256, 1024, 576, 128, 784),
        *(576, 784, 256, 128, 1024),
        *(784, 1024, 256, 576, 128),
    ]


@pytest.mark.parametrize("shares", [{}, {1024: 2}, {128: 3, 784: 2}])
def test_every_round_has_each_length_as_often_as_its_share(shares):
    patchifier = patchifier_of(shares=shares)
    wanted = {**dict.fromkeys((128, 256, 576, 784, 1024), 1), **shares}
    size = sum(wanted.values())
    for number in (*range(20), 10**6):
        assert Counter(lengths(patchifier, range(size * number, size * (number + 1)))) == wanted


def test_in_the_long_run_every_place_of_a_round_has_every_length_as_often():
    rounds = 2000
    found = lengths(patchifier_of(), range(5 * rounds))
    for place in range(5):
        counts = Counter(found[place::5])
        assert len(counts) == 5
        assert all(abs(n - rounds / 5) < 90 for n in counts.values())  # five standard deviations


def test_other_seeds_and_rounds_have_other_orders():
    one, other = (lengths(patchifier_of(seed=seed), range(50)) for seed in (0, 1))
    assert one != other
    assert len({tuple(one[i : i + 5]) for i in range(0, 50, 5)}) > 5


def test_far_layout_needs_one_shuffle_and_no_earlier_ones():
    shuffled.cache_clear()
    patchifier_of(**HALVED).layout(10**6)
    assert shuffled.cache_info().misses == 1


def test_longest_batch_is_halved_and_comes_twice_so_that_every_length_sees_as_many_examples():
    patchifier = patchifier_of(**HALVED)
    examples = Counter()
    for layout in map(patchifier.layout, range(6)):
        examples[layout.seq_len] += layout.batch_size
        assert layout.batch_size == (16 if layout.seq_len == 1024 else 32)
    assert examples == dict.fromkeys((128, 256, 576, 784, 1024), 32)


def test_token_budget_sizes_every_batch_in_multiples_of_the_divisor():
    patchifier = patchifier_of(tokens=100_000, divisor=8, batch_sizes={784: 24})
    sizes = {x.seq_len: x.batch_size for x in map(patchifier.layout, range(5))}
    assert sizes == {128: 776, 256: 384, 576: 168, 784: 24, 1024: 96}
    assert all(n * size <= 100_000 < n * (size + 8) for n, size in sizes.items() if n != 784)


def test_token_budget_need_not_hold_lengths_whose_batch_is_named():
    patchifier = patchifier_of(seq_lens=[64, 1024], tokens=4096, divisor=8, batch_sizes={1024: 2})
    assert {patchifier.layout(i) for i in range(2)} == {Layout(64, 64), Layout(1024, 2)}


def test_evaluation_has_one_length_whatever_was_trained_on():
    assert patchifier_of(eval_seq_len=400).eval_layout(7) == Layout(400, 7)


def test_defaults_are_the_papers():
    patchifier = patchifier_of()
    assert {patchifier.layout(i) for i in range(5)} == {Layout(n, 32768) for n in (128, 256, 576, 784, 1024)}
    assert patchifier.grid == (16, 16)
    assert patchifier.contract() == {
        "patchifier": "naflex",
        "patch_size": 16,
        "table": 16,
        "max_scale": None,
        "filter": "bilinear",
        "antialias": True,
        "mean": 0.5,
        "std": 0.5,
    }


def test_contract_does_not_depend_on_the_lengths_of_a_run():
    other = patchifier_of(seq_lens=[64], batch_size=2, seed=7, eval_seq_len=100, shares={64: 3})
    assert other.contract() == patchifier_of().contract()
    assert patchifier_of(max_scale=1.0).contract() != patchifier_of().contract()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_lens": []}, r"expected sequence lengths that differ, found seq_lens=\[\]"),
        ({"seq_lens": [64, 64]}, r"expected sequence lengths that differ, found seq_lens=\[64, 64\]"),
        (
            {"batch_sizes": {100: 8}, "shares": {7: 1}},
            r"batch_sizes and shares name lengths \(7, 100\) that are not among seq_lens=\[128, 256, 576, 784, 1024\]: "
            "add them there, or name one of those",
        ),
        ({"seq_lens": [0, 64]}, r"expected positive numbers and a seed of at least 0, found seq_lens=\[0, 64\]"),
        ({"batch_size": 0}, "expected positive numbers .* batch_size=0"),
        ({"batch_sizes": {128: -8}}, r"expected positive numbers .* batch_sizes=\{128: -8\}"),
        ({"shares": {1024: 0}}, r"expected positive numbers .* shares=\{1024: 0\}"),
        ({"divisor": 0}, "expected positive numbers .* divisor=0"),
        ({"eval_seq_len": 0}, "expected positive numbers .* eval_seq_len=0"),
        ({"patch_size": 0}, "expected positive numbers .* patch_size=0"),
        ({"table": 0}, "expected positive numbers .* table=0"),
        ({"max_scale": 0.0}, "expected positive numbers .* max_scale=0.0"),
        ({"seed": -1}, "a seed of at least 0, .* seed=-1"),
        (
            {"tokens": 4096, "divisor": 8},
            r"4096 tokens per step hold no batch of 8 \(the divisor\) images with 1024 patches: set tokens to at least "
            "8192",
        ),
        ({"start": 0.5, "stop": 0.5}, "expected 0 <= start < stop <= 1"),
    ],
)
def test_a_wrong_option_says_what_was_found_and_expected(options, message):
    with pytest.raises(ValueError, match=f"naflex.*{message}"):
        NaFlex(**options)


# Patches.


@pytest.mark.parametrize("size", [(64, 64), (30, 200), (200, 30), (500, 17), (1, 1)])
@pytest.mark.parametrize("seq_len", [1, 20, 64])
def test_images_are_padded_to_the_length_of_the_batch_at_their_own_grid(size, seq_len):
    found = patchifier_of(seq_lens=[64])(image(*size), IMAGE, Layout(seq_len, 1))
    grid = native_grid(*size, patch_size=16, max_patches=seq_len)
    assert found.patches.shape == (1, seq_len, 768)
    assert found.sizes.tolist() == [[list(grid)]]
    assert found.valid.sum() == grid[0] * grid[1]
    assert found.coords[0, found.valid[0]].amax(0).tolist() == [grid[0] - 1, grid[1] - 1]
    assert same(padded(native_patches(image(*size), grid, 16), seq_len), found)


def test_small_images_are_not_enlarged_beyond_the_largest_scale():
    found = patchifier_of(max_scale=1.0)(image(32, 48), IMAGE, Layout(64, 1))
    assert found.sizes.tolist() == [[[2, 3]]]
    assert found.valid.sum() == 6


def test_patches_do_not_depend_on_the_random_state():
    patchifier, state = patchifier_of(), torch.random.get_rng_state()
    first, second = (patchifier(image(50, 70), IMAGE, Layout(128, 1)) for _ in range(2))
    assert same(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


# Batches.


def train_batches(rank=0, world_size=1, **options):
    patchifier = patchifier_of(**{**SMALL, **options})
    maker = Maker(TinySource(), patchifier, tiny_tokenizer(), seed=0)
    views = [(0.0, (IMAGE, CAPTION))]
    return TrainBatches(maker, Order([16], 0), views, max_batches=60, rank=rank, world_size=world_size)


def test_batch_out_of_the_loader_has_images_of_several_grids_in_one_length():
    batches = train_batches()
    loader = DataLoader(batches, batch_size=None, num_workers=1)
    seen = []
    for index, batch in zip(range(6), loader, strict=False):
        images, seq_len = batch.views["image"], batches.maker.patchifier.layout(index).seq_len
        assert images.patches.shape == (4, seq_len, 768)
        assert images.coords.shape == (4, seq_len, 2)
        assert images.valid.shape == (4, seq_len)
        assert images.sizes.shape == (4, 1, 2)
        assert images.grid is None
        assert images.num_images == 4
        pictures = [TinySource().read(int(key)).image() for key in batch.keys]
        grids = [native_grid(*p.shape[1:], patch_size=16, max_patches=seq_len) for p in pictures]
        assert images.sizes[:, 0].tolist() == [list(grid) for grid in grids]
        assert images.valid.sum(1).tolist() == [rows * columns for rows, columns in grids]
        seen.append((seq_len, len(set(grids))))
    assert {seq_len for seq_len, _ in seen} == {6, 12, 20}
    assert max(grids for _, grids in seen) > 1


def test_ranks_get_the_same_lengths_and_other_samples():
    options = {"shares": {20: 2}, "batch_sizes": {20: 2}}
    alone, ranks = train_batches(**options), [train_batches(rank, 2, **options) for rank in range(2)]
    for index in range(4):  # the first epoch: no sample comes twice
        whole, parts = alone[index], [batches[index] for batches in ranks]
        shapes = {part.views["image"].patches.shape for part in parts}
        assert shapes == {(whole.size // 2, *whole.views["image"].patches.shape[1:])}
        assert parts[0].keys + parts[1].keys == whole.keys
        assert len(set(whole.keys)) == whole.size
        together = torch.cat([part.views["image"].patches for part in parts])
        assert torch.equal(together, whole.views["image"].patches)


def test_stream_is_read_without_gaps_whatever_the_sizes_of_the_batches():
    batches = train_batches(shares={20: 2}, batch_sizes={20: 2, 6: 6})
    keys = [key for index in range(16) for key in batches[index].keys]
    order, positions = Order([16], 0), Positions(batches.maker.patchifier)
    assert keys == [f"{i:04d}" for i in order.many(0, len(keys))[1].tolist()]
    assert positions.before(16) == len(keys) == 4 * (6 + 4 + 2 + 2)


def test_evaluation_batch_has_the_evaluation_length():
    patchifier = patchifier_of(**SMALL)
    maker = Maker(TinySource(), patchifier, tiny_tokenizer(), seed=0)
    row = maker.row(3, position=3, views=[IMAGE], layout=patchifier.eval_layout(1))
    assert row.views["image"].patches.shape == (1, 12, 768)


def test_curated_batch_keeps_the_grid_of_each_image():
    batch = fake_batch(batch_size=6, patchifier=patchifier_of(**SMALL))
    kept = batch.select(torch.tensor([4, 0, 2]))
    for row, number in enumerate((4, 0, 2)):
        one, other = (b.views["image"].images(torch.tensor([i])) for b, i in ((kept, row), (batch, number)))
        assert same(one, other)
    assert same(kept.views["caption"], batch.views["caption"][[4, 0, 2]])


# Features.


@pytest.fixture
def model():
    """Towers with a table of 4 x 4 and no parameter at its start."""
    model = tiny_model(grid=(4, 4)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def embed(model, images):
    return model.encode_image(images).embedding  # [B, E]


def assert_same_embeddings(found, expected):
    assert found.std(dim=1).min() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def mixed(seq_len=16):
    """Images of four shapes at their own grids, [4, N, P]."""
    patchifier = patchifier_of(seq_lens=[seq_len])
    sizes = [(64, 64), (30, 200), (200, 30), (90, 60)]
    rows = [{"image": patchifier(image(*s, seed=i), IMAGE, Layout(seq_len, 4))} for i, s in enumerate(sizes)]
    return collate(rows)["image"]


def test_square_image_has_the_same_embedding_in_fixed_and_naflex(model):
    square = image(150, 150)
    fixed = Fixed(image_size=64, patch_size=16).patchifier()(square, IMAGE, Layout(16, 1))
    native = patchifier_of()(square, IMAGE, Layout(16, 1))
    assert native.valid.all()
    assert_same_embeddings(embed(model, native), embed(model, fixed))


def test_padding_does_not_change_an_embedding(model):
    together = embed(model, mixed())
    for number, size in enumerate([(64, 64), (30, 200), (200, 30), (90, 60)]):
        grid = native_grid(*size, patch_size=16, max_patches=16)
        alone = native_patches(image(*size, seed=number), grid, 16)
        assert alone.valid is None
        for images in (alone, padded(alone, 16), padded(alone, 40)):
            assert_same_embeddings(embed(model, images), together[number : number + 1])


def test_what_padding_holds_is_never_read(model):
    images = mixed()
    hidden = ~images.valid[..., None]
    assert hidden.any()
    noise = torch.randint(0, 256, images.patches.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    other = replace(
        images,
        patches=torch.where(hidden, noise, images.patches),
        coords=torch.where(hidden, torch.ones_like(images.coords), images.coords),
    )
    assert torch.equal(embed(model, other), embed(model, images))


def test_order_within_the_batch_does_not_change_an_embedding(model):
    images, order = mixed(), torch.tensor([2, 0, 3, 1])
    assert_same_embeddings(embed(model, images.images(order)), embed(model, images)[order])


def test_same_patches_in_another_grid_are_another_image(model):
    patches = torch.randint(0, 256, (1, 12, 768), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))

    def arranged(rows, columns):
        plain = native_patches(image(16 * rows, 16 * columns), (rows, columns), 16)
        return Patches(patches, plain.coords, sizes=plain.sizes)

    wide, tall = (embed(model, arranged(*grid)) for grid in ((2, 6), (6, 2)))
    assert (wide - tall).norm() > 1e-3
