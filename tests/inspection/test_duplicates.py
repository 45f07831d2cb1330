"""Planted copies are found, different captions and pictures are left alone."""

import io

import numpy as np
import pytest
from made_up import drawing, encoded, seeded, sentence
from PIL import Image

from siglip2.core.data.image_io import decode_image
from siglip2.inspection.duplicates import (
    MAX_BITS,
    MinHash,
    duplicates,
    groups_of,
    jaccard,
    merged,
    near_looks,
    near_texts,
    same_look,
    shingles,
)
from siglip2.inspection.looks import Look, header, look


def trigrams(text):
    """The runs of three letters of a text as a plain set."""
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def test_jaccard_is_that_of_plain_sets_of_three_letters():
    pairs = [("a black cat", "a black dog"), ("猫", "猫です"), ("x", "x"), ("naïve 🙂 face", "naive 🙂 face")]
    for here, there in pairs:
        a, b = trigrams(here), trigrams(there)
        assert jaccard(shingles(here), shingles(there)) == pytest.approx(len(a & b) / len(a | b))


def test_minhash_estimates_the_similarity():
    rng, minhash = seeded(0), MinHash(num=2000)
    for shared in (0, 10, 30, 60):
        common, own = sentence(rng, shared), [sentence(rng, 60 - shared) for _ in range(2)]
        here, there = (shingles(f"{common} {text}") for text in own)
        estimate = np.mean(minhash(here) == minhash(there))
        assert estimate == pytest.approx(jaccard(here, there), abs=0.05)  # standard deviation below 0.012


def test_captions_with_one_changed_word_meet_and_others_stay_alone():
    rng = seeded(1)
    originals = [sentence(rng, 14) for _ in range(400)]
    changed = []
    for text in originals[:100]:
        parts = text.split()
        parts[rng.randrange(14)] = "xylophone"
        changed.append(" ".join(parts))
    leaders = near_texts([*originals, *changed])
    assert all(leaders[text] == text for text in originals)
    found = sum(leaders[copy] == text for copy, text in zip(changed, originals, strict=False))
    assert found >= 97  # a similarity of 0.75 or so is found with probability 0.99


def test_candidates_of_the_index_are_all_pairs_above_the_threshold():
    """Every leader and follower is as similar as asked for, and no two leaders are."""
    rng = seeded(2)
    texts = list(dict.fromkeys(f"this is a photo of {sentence(rng, 1, 6)} on the table" for _ in range(250)))
    leaders = near_texts(texts)
    sets = {text: trigrams(text) for text in texts}

    def similarity(a, b):
        return len(sets[a] & sets[b]) / len(sets[a] | sets[b])

    assert all(similarity(text, leader) >= 0.7 for text, leader in leaders.items())
    chosen = sorted(set(leaders.values()))
    assert len(chosen) < len(texts)
    missed = [(a, b) for i, a in enumerate(chosen) for b in chosen[:i] if similarity(a, b) >= 0.7]
    assert len(missed) <= 2


def test_a_chain_of_small_changes_is_not_one_cluster():
    words = [f"word{i:03d}" for i in range(40)]
    chain = [" ".join(words[i : i + 12]) for i in range(25)]
    leaders = near_texts(chain)
    assert jaccard(shingles(chain[0]), shingles(chain[-1])) < 0.4
    assert len(set(leaders.values())) > 3


def test_groups_count_a_sample_once_and_name_the_largest():
    groups = groups_of([("a", 0), ("a", 0), ("b", 1), ("a", 2), ("b", 3), ("b", 4), ("c", 5)])
    found = duplicates(groups, [f"key{i}" for i in range(6)], {"b": ["B", "b"]})
    assert (found.clusters, found.samples, found.extra) == (2, 5, 3)
    assert found.share == pytest.approx(3 / 6)
    assert found.largest[0].keys == ("key1", "key3", "key4")
    assert found.largest[0].examples == ("B", "b")
    together = merged(groups, {"a": "a", "b": "a", "c": "c"})
    assert together == {"a": [0, 2, 1, 3, 4], "c": [5]}


def test_nothing_gives_no_clusters():
    found = duplicates({}, [])
    assert (found.clusters, found.share, found.largest) == (0, 0.0, ())


def looked(picture, kind="JPEG", **options):
    return look(decode_image(encoded(picture, kind, **options)))


def copy_of(picture, *, crop=0, scale=1.0):
    width, height = picture.size
    cut = picture.crop((crop, crop, width - crop, height - crop))
    return cut.resize((round(cut.width * scale), round(cut.height * scale)))


def test_reencoded_scaled_and_slightly_cropped_pictures_meet_and_others_stay_alone():
    pictures = [drawing(seed) for seed in range(150)]
    looks = {f"original {i}": looked(picture, quality=90) for i, picture in enumerate(pictures)}
    copies = {
        "jpeg": lambda p: looked(p, quality=40),
        "png": lambda p: looked(p, "PNG"),
        "half": lambda p: looked(copy_of(p, scale=0.5)),
        "cropped": lambda p: looked(copy_of(p, crop=2)),
    }
    for name, make in copies.items():
        looks |= {f"{name} {i}": make(picture) for i, picture in enumerate(pictures[:40])}
    leaders = near_looks(looks)
    assert all(leaders[f"original {i}"] == f"original {i}" for i in range(150))
    for name in copies:
        found = sum(leaders[f"{name} {i}"] == f"original {i}" for i in range(40))
        assert found >= 38, name


def test_index_of_looks_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(3)
    looks = {}
    for i in range(300):
        bits = int(rng.integers(0, 2**63))
        looks[2 * i] = Look(bits, bytes(48))
        flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 12), replace=False))
        looks[2 * i + 1] = Look(bits ^ flips, bytes(48))
    expected = {}
    for i, here in looks.items():
        firsts = [j for j in expected if expected[j] == j and same_look(here, looks[j], max_bits=MAX_BITS)]
        expected[i] = min(firsts, default=i)
    assert near_looks(looks) == expected
    assert len(set(expected.values())) < 550


def test_colours_tell_pictures_of_one_shape_apart():
    red, green = (Image.new("RGB", (64, 64)) for _ in range(2))
    for picture, colour in ((red, (120, 0, 0)), (green, (0, 61, 0))):  # about equally bright
        picture.paste(colour, (16, 16, 48, 48))
    here, there = looked(red, "PNG"), looked(green, "PNG")
    assert (here.shape_bits ^ there.shape_bits).bit_count() <= MAX_BITS
    assert not same_look(here, there)


def test_shape_bits_are_those_of_a_cosine_transform_written_out():
    picture = drawing(5, size=(32, 32))  # nothing is resized
    grey = np.asarray(picture, dtype=np.float64) @ [0.299, 0.587, 0.114]
    n = np.arange(32)
    low = []
    for u in range(8):
        for v in range(8):
            wave = np.outer(np.cos(np.pi * u * (2 * n + 1) / 64), np.cos(np.pi * v * (2 * n + 1) / 64))
            norm = np.sqrt((1 if u else 0.5) * (1 if v else 0.5)) / 16
            low.append(norm * (wave * grey).sum())
    bits = "".join("1" if value > np.median(low) else "0" for value in low)
    assert f"{looked(picture, 'PNG').shape_bits:064b}" == bits


@pytest.mark.parametrize(("orientation", "size"), [(1, (60, 40)), (3, (60, 40)), (6, (40, 60)), (8, (40, 60))])
def test_header_gives_the_upright_size(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawing(0, size=(60, 40)), "JPEG", exif=exif)
    assert header(data) == (*size, "JPEG")
    decoded = decode_image(data)
    assert (decoded.shape[2], decoded.shape[1]) == size


def test_header_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="not an image"):
        header(b"GIF? no")
    assert header(encoded(Image.open(io.BytesIO(encoded(drawing(1), "PNG"))), "WEBP"))[2] == "WEBP"
