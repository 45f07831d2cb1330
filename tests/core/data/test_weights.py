"""Example weights are read back as written, and refused once what they speak of has changed."""

import numpy as np
import pytest
from toy_samples import write_shard

from siglip2.core.data import weights
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.core.data.weights import HEAD_BYTES, open_weights, weights_path, write_weights

VALUES = np.arange(12) / 3


@pytest.fixture
def weighted(shards):
    """The toy shards with the weights `fair`."""
    write_weights(open_source(str(shards)), "fair", VALUES)
    return shards


@pytest.fixture
def table(tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title\na.jpg,one\nb.jpg,two\n")
    return tmp_path / "a.csv"


def test_weights_are_read_back_shard_by_shard(weighted):
    found = open_weights(open_source(str(weighted)), "fair")
    read = [found.read(shard) for shard in range(3)]
    assert [len(part) for part in read] == [3, 4, 5]
    assert np.concatenate(read).tolist() == VALUES.astype(np.float32).tolist()
    assert found.totals.tolist() == [part.sum() for part in read]


def test_samples_are_drawn_as_often_as_their_weights_say(weighted):
    source = open_source(str(weighted))
    order = Order(source.shard_sizes(), 0, weights=open_weights(source, "fair"))
    drawn = np.bincount(order.many(0, 12 * 1000)[1], minlength=12)
    assert abs(drawn / 12000 - VALUES / VALUES.sum()).max() < 0.005


def test_table_and_folder_have_their_weights_beside_them(table, classes):
    for path, count in ((table, 2), (classes, 4)):
        source = open_source(str(path))
        assert write_weights(source, "w", np.ones(count)) == [f"{path}.w.weights"]
        assert open_weights(source, "w").read(0).tolist() == [1.0] * count


def test_weights_of_a_changed_shard_are_stale(weighted):
    write_shard(weighted / "00001.tar", 3, 3)
    with pytest.raises(ValueError, match=r"00001\.tar\.fair\.weights is stale: .* \(4 samples then, 3 now\)"):
        open_weights(open_source(str(weighted)), "fair")


def test_weights_of_a_shard_with_other_keys_are_stale(weighted):
    write_shard(weighted / "00001.tar", 20, 4)
    with pytest.raises(ValueError, match="is stale: .* has changed since"):
        open_weights(open_source(str(weighted)), "fair")


def test_weights_of_a_changed_table_or_folder_are_stale(table, classes):
    for path, count in ((table, 2), (classes, 4)):
        write_weights(open_source(str(path)), "w", np.ones(count))
    table.write_text(table.read_text().replace("two", "owt"))
    (classes / "cat" / "b.webp").rename(classes / "cat" / "c.webp")
    for path in (table, classes):
        with pytest.raises(ValueError, match="is stale: .*other content"):
            open_weights(open_source(str(path)), "w")


def test_missing_weights_say_which_there_are(weighted):
    with pytest.raises(FileNotFoundError, match=r"no weights 'far' for .*00000\.tar; it has fair\."):
        open_weights(open_source(str(weighted)), "far")
    write_shard(weighted / "00003.tar", 20, 4)
    with pytest.raises(FileNotFoundError, match=r"no weights 'fair' for .*00003\.tar; it has none"):
        open_weights(open_source(str(weighted)), "fair")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(11), r"weights of shape \(11,\) for the 12 samples"),
        (np.where(VALUES > 3, -1, 1), "2 of 12 weights are negative or not finite"),
        (np.full(12, np.nan), "12 of 12 weights are negative or not finite"),
        (np.zeros(12), "all 12 weights are 0"),
    ],
)
def test_values_that_cannot_be_weights_are_refused(shards, values, message):
    with pytest.raises(ValueError, match=message):
        write_weights(open_source(str(shards)), "fair", values)


def rewritten(path, change):
    path.write_bytes(change(path.read_bytes()))


def test_head_that_speaks_of_negative_weights_is_refused(weighted):
    rewritten(weighted / "00001.tar.fair.weights", lambda b: b.replace(b'"smallest": 1.0', b'"smallest": -1 '))
    with pytest.raises(ValueError, match=r"00001\.tar\.fair\.weights has negative weights, down to -1"):
        open_weights(open_source(str(weighted)), "fair")


def test_shards_with_no_weight_at_all_are_refused(weighted):
    source = open_source(f"{weighted}/00000.tar")
    write_weights(source, "fair", [0, 0, 1])
    rewritten(weighted / "00000.tar.fair.weights", lambda b: b.replace(b'"total": 1.0', b'"total": 0.0'))
    with pytest.raises(ValueError, match="all weights 'fair' of .* are 0"):
        open_weights(source, "fair")


def test_cut_or_foreign_file_is_refused(weighted):
    path = weighted / "00002.tar.fair.weights"
    rewritten(path, lambda b: b[:-4])
    with pytest.raises(ValueError, match=r"00002\.tar\.fair\.weights is cut"):
        open_weights(open_source(str(weighted)), "fair")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"00002\.tar\.fair\.weights: this is no file of example weights"):
        open_weights(open_source(str(weighted)), "fair")


def test_rewrite_that_was_interrupted_is_refused_until_it_is_run_again(weighted, monkeypatch):
    source, new = open_source(str(weighted)), VALUES[::-1]
    with monkeypatch.context() as patched:
        left = [weights.write_file]  # one file is written, the next is not

        def write(path, content):
            left.pop()(path, content)

        patched.setattr(weights, "write_file", write)
        with pytest.raises(IndexError):
            write_weights(source, "fair", new)
    with pytest.raises(
        ValueError, match=r"00000\.tar\.fair\.weights of 3 files were not written together .*00001\.tar"
    ):
        open_weights(source, "fair")
    write_weights(source, "fair", new)
    assert open_weights(source, "fair").read(0).tolist() == new[:3].astype(np.float32).tolist()


def test_weights_of_a_set_can_be_used_for_some_of_its_shards(weighted):
    assert open_weights(open_source(f"{weighted}/00001.tar"), "fair").read(0).tolist() == [
        float(np.float32(value)) for value in VALUES[3:7]
    ]


def test_file_of_another_version_says_so(weighted):
    rewritten(weighted / "00001.tar.fair.weights", lambda b: b.replace(b'"version": 2', b'"version": 1'))
    with pytest.raises(ValueError, match=r"00001\.tar\.fair\.weights: weights of version 1, expected 2\. Make .* anew"):
        open_weights(open_source(str(weighted)), "fair")


def test_values_that_are_not_those_of_the_head_are_refused_when_read(weighted):
    found = open_weights(open_source(str(weighted)), "fair")
    rewritten(weighted / "00002.tar.fair.weights", lambda b: b[:HEAD_BYTES] + np.full(5, -1, "<f4").tobytes())
    with pytest.raises(ValueError, match="does not hold the weights that its first line speaks of"):
        found.read(2)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a b"])
def test_name_that_is_no_part_of_a_file_name_is_refused(shards, name):
    with pytest.raises(ValueError, match="weights cannot be called"):
        write_weights(open_source(str(shards)), name, VALUES)


def test_weights_lie_beside_a_folder_whatever_its_path_ends_with():
    assert weights_path("a/b/", "w") == weights_path("a/b", "w") == "a/b.w.weights"
