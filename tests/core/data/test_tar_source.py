"""Any sample of a shard reads as webdataset reads it, also in workers and from afar."""

import logging
import os
import pickle

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset
from toy_samples import keys, picture, write_shard
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from siglip2.core.data import tar_source
from siglip2.core.data.fields import BadSample, Fields
from siglip2.core.data.source import Source, open_source
from siglip2.core.data.tar_source import TarSource


def test_tar_source_reads_what_webdataset_reads(shards):
    expected = []
    for path in sorted(shards.glob("*.tar")):
        with open(path, "rb") as file:
            expected += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    source = open_source(str(shards))
    assert isinstance(source, Source)
    assert source.shard_sizes() == [3, 4, 5]
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        sample = source.read(i)
        assert {"__key__": sample.key, "__url__": sample.where, **sample.record} == expected[i]


def test_fields_of_a_shard_sample(shards):
    sample = open_source(f"{shards}/{{00000..00002}}.tar").read(8)
    assert sample.key == "000000008"
    assert sample.where == f"{shards}/00002.tar"
    assert sample.image().shape == (3, 4, 6)
    assert sample.captions() == {"": ["text 8 猫"]}
    by_json = open_source(str(shards), fields=Fields(caption="json.caption")).read(8)
    assert by_json.captions() == {"": ["json 8"]}


def test_indexes_are_read_when_there(shards, monkeypatch):
    before = keys(open_source(str(shards)))
    assert len(list(shards.glob("*.tar.index"))) == 3
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(open_source(str(shards))) == before


def test_index_made_in_memory_goes_along_to_workers(shards, monkeypatch):
    monkeypatch.setattr("siglip2.core.data.tar_index.write_file", lambda *_: (_ for _ in ()).throw(PermissionError()))
    source = open_source(str(shards))
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(pickle.loads(pickle.dumps(source))) == [f"{i:09d}" for i in range(12)]


class Keys(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        sample = self.source.read(i)
        return sample.key, sample.image()[0, 0, 0]


def test_workers_read_the_same(shards):
    dataset = Keys(open_source(str(shards)))
    here = [dataset[i] for i in range(len(dataset))]  # files are open before the fork
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [(key, int(red)) for key, red in loader] == [(key, int(red)) for key, red in here]


def test_few_shards_stay_open(shards, monkeypatch):
    monkeypatch.setattr(tar_source, "OPEN_SHARDS", 2)
    source = open_source(str(shards))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert keys(source) + keys(source) == [f"{i:09d}" for i in range(12)] * 2
    assert len(source._opened) == 2
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_a_shard_may_be_named_twice(shards):
    source = open_source([f"{shards}/00000.tar", f"{shards}/00001.tar::{shards}/00000.tar"])
    assert source.shard_sizes() == [3, 4, 3]
    assert source.read(8).key == "000000001"


def test_members_far_apart_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_source, "SLACK_BYTES", 0)
    write_shard(tmp_path / "a.tar", 0, 3)
    assert open_source(str(tmp_path)).read(2).captions() == {"": ["text 2 猫"]}


def test_damaged_shard_is_logged_once_and_its_rest_used(shards, caplog):
    path = shards / "00001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        source = open_source(str(shards))
    assert 0 < source.shard_sizes()[1] < 4
    assert caplog.text.count(f"damaged shard in {path.parent}: 00001.tar: cut at byte") == 1
    assert source.read(source.shard_sizes()[0]).key == "000000003"


def test_oversized_member_is_a_bad_sample(shards):
    write_shard(shards / "00001.tar", 3, 4, npy=b"x" * 5000)
    source = open_source(str(shards), max_bytes=4000)
    with pytest.raises(BadSample, match="'npy' has 5000 bytes, over the limit of 4000"):
        source.read(4)
    assert source.read(0).key == "000000000"


def test_shard_that_shrinks_while_in_use_gives_bad_samples(shards):
    source = open_source(str(shards))
    source.read(11)
    os.truncate(shards / "00002.tar", 3000)
    with pytest.raises(BadSample, match="is cut: the shard became shorter"):
        source.read(11)


def test_shard_that_is_replaced_while_in_use_is_an_error(shards):
    source = open_source(str(shards))
    write_shard(shards / "00001.tar", 0, 9)
    with pytest.raises(ValueError, match=r"00001.tar changed while in use: it had 4 samples, now 9"):
        source.read(4)


@pytest.fixture
def remote(shards):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/remote-set/{path.name}", path.read_bytes())
    yield "memory://remote-set"
    memory.rm("/remote-set", recursive=True)


@pytest.mark.parametrize("spec", ["{}/{{00000..00002}}.tar", "{}/*.tar", "{}/"])
def test_remote_shards_read_as_local_ones(shards, remote, spec, caplog):
    local = open_source(str(shards))
    with caplog.at_level(logging.WARNING):
        source = open_source(spec.format(remote))
    assert caplog.text.count("`siglip2 index` stores it beside the shard") == 3
    assert [source.read(i).record for i in range(12)] == [local.read(i).record for i in range(12)]


def test_remote_index_is_used(shards, remote, caplog, monkeypatch):
    open_source(str(shards))
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.index"):
        memory.pipe(f"/remote-set/{path.name}", path.read_bytes())
    monkeypatch.setattr("siglip2.core.data.tar_index.index_tar", None)
    assert keys(open_source(f"{remote}/*.tar")) == [f"{i:09d}" for i in range(12)]
    assert caplog.text == ""


def test_cache_keeps_whole_remote_shards(remote, tmp_path):
    first = open_source(f"{remote}/*.tar", cache_dir=str(tmp_path / "cache"))
    expected = keys(first)
    fsspec.filesystem("memory").rm("/remote-set/00001.tar")  # from here on only the copy is left
    assert keys(pickle.loads(pickle.dumps(first))) == expected
    names = [name for name in os.listdir(tmp_path / "cache") if name.endswith(".tar")]
    assert len(names) == 3


def test_members_that_no_field_names_are_not_read_but_listed(tmp_path, monkeypatch):
    mask, meta = b"x" * 200_000, b'{"text": "nested"}'
    parts = {"jpg": picture(0), "mask.png": mask, "meta.json": meta, "npy": b"1", "txt": b"a"}
    with open(tmp_path / "a.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
        tar.write({"__key__": "0", **parts})
    source, sizes, read = open_source(str(tmp_path)), [], tar_source.ByteFile.read
    source.read(0)  # opens the shard and its index
    monkeypatch.setattr(tar_source.ByteFile, "read", lambda *asked: sizes.append(asked[2]) or read(*asked))
    sample = source.read(0)
    assert sorted(sample.record) == ["jpg", "meta.json", "txt"]
    assert sum(sizes) < len(mask)
    with pytest.raises(BadSample, match=r"it has jpg, meta\.json, txt, mask\.png, npy, meta\.json\.text"):
        sample.get("label")
    assert open_source(str(tmp_path), fields=Fields(extra={"mask": "mask.png"})).read(0).get("mask") == mask


def test_shards_without_samples_are_an_error(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        TarWriter(file).close()
    with pytest.raises(ValueError, match=r"no samples in .* \(1 shards\)"):
        TarSource(str(tmp_path))
