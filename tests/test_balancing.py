"""`siglip2 balance` writes weights to sample by, says what became of each constraint, and reads no pictures."""

import json
import os

import numpy as np
import pytest
from webdataset import TarWriter

from siglip2.cli.main import main
from siglip2.core.data.order import Order
from siglip2.core.data.source import open_source
from siglip2.core.data.weights import open_weights

COUNT = 600
OPTIONS = ["--sensitive", "json.woman=0.5", "--label", "caption=doctor", "--proxy", "json.words=ward", "--name", "fair"]
QUICK = ["--steps", "8000", "--tolerance", "0.02", "--association", "0.01"]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """Two shards without readable pictures, in which four of five doctors are men; and who is a woman, or a doctor."""
    folder, random = tmp_path_factory.mktemp("biased"), np.random.default_rng(0)
    doctors = random.random(COUNT) < 0.3
    women = random.random(COUNT) < np.where(doctors, 0.2, 0.6)
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as file, TarWriter(file) as tar:
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                text = "a doctor in a garden" if doctors[i] else "a garden"
                meta = {"woman": int(women[i]), "words": ["tree", "ward"] if i % 4 == 0 else ["tree"]}
                tar.write({"__key__": f"{i:05d}", "jpg": b"no picture", "txt": text, "json": meta})
    return folder, women, doctors


def shares(women, doctors, drawn):
    """Share of women, and what being a doctor says of it, in numbers of drawn samples."""
    return women[drawn].mean(), ((women[drawn] - 0.5) * doctors[drawn]).mean()


def test_an_epoch_sampled_by_the_weights_has_no_bias_left(biased, capsys):
    folder, women, doctors = biased
    main(["balance", str(folder), *OPTIONS, *QUICK, "--keep", "0.75", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["samples"], printed["files"], printed["unreadable"]) == (COUNT, 2, 0)
    names = ["json.woman x caption=doctor", "json.woman x json.words=ward", "json.woman"]
    assert [c["name"] for c in printed["constraints"]] == names
    source = open_source(str(folder))
    order = Order(source.shard_sizes(), 0, weights=open_weights(source, "fair"))
    drawn = order.many(0, 20 * COUNT)[1]
    before, after = shares(women, doctors, np.arange(COUNT)), shares(women, doctors, drawn)
    assert abs(before[1]) > 0.05
    assert abs(after[0] - 0.5) < 0.022
    assert abs(after[1]) < 0.012
    for constraint, share in zip((names[2], names[0]), (after[0] - 0.5, after[1]), strict=True):
        found = next(c for c in printed["constraints"] if c["name"] == constraint)
        assert found["met"]
        assert found["after"] == pytest.approx(share, abs=0.003)


def test_table_names_what_is_met_and_what_is_infeasible(biased, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder, women, _ = biased
    main(["balance", str(folder), "--sensitive", "json.woman=0.8", "--name", "most", "--steps", "2000"])
    printed = capsys.readouterr().out
    assert f"infeasible: {women.mean():.3g} of the samples have it, 0.8 are wanted" in printed
    assert "wrote the weights 'most' of 600 samples beside 2 shards" in printed
    assert "--data.train.weights most" in printed


def test_sample_that_cannot_be_read_has_weight_0(biased, capsys, tmp_path):
    for shard in biased[0].glob("*.tar"):
        content = shard.read_bytes()
        (tmp_path / shard.name).write_bytes(content.replace(b'{"woman": ', b'{"woman"; ', 1))
    main(["balance", str(tmp_path), "--sensitive", "json.woman=0.5", "--name", "w", "--steps", "2000"])
    assert "2 that cannot be read with weight 0" in capsys.readouterr().out
    weights = open_weights(open_source(str(tmp_path)), "w")
    assert all((weights.read(shard) == 0).tolist() == [True] + [False] * (COUNT // 2 - 1) for shard in range(2))


def test_table_can_be_balanced(tmp_path, capsys):
    rows = [f"{i}.jpg,{'a doctor' if i % 3 else 'a nurse'},{int(i % 4 == 0)}" for i in range(60)]
    (tmp_path / "a.csv").write_text("filepath,title,woman\n" + "\n".join(rows))
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(b"a picture")
    asked = ["--sensitive", "woman=0.3", "--label", "caption=nurse", "--name", "w"]
    main(["balance", f"{tmp_path}/a.csv", *asked, *QUICK])
    assert "60 samples beside 1 shards" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "a.csv.w.weights")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sensitive", "json.woman"], "--sensitive: cannot read 'json.woman', expected FIELD=PREVALENCE"),
        (["--sensitive", "json.woman=much"], "--sensitive: cannot read 'json.woman=much'"),
        (["--sensitive", "json.woman=2"], "the prevalence of json.woman is 2"),
        (["--sensitive", "json.mann=0.5"], "has json.mann: nothing can be balanced by it"),
        (["--sensitive", "json.words=0.5"], "json.words is ['tree', 'ward'], expected 0 or 1"),
        (["--label", "json.woman"], "json.woman is there twice"),
        (["--keep", "1.5"], "keep is 1.5"),
    ],
)
def test_wrong_options_are_refused(biased, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        main(["balance", str(biased[0]), *OPTIONS, "--steps", "10", *more])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--name", "a/b"], "weights cannot be called 'a/b'"), (["--penalty", "nan"], "expected a finite penalty >= 0")],
)
def test_options_are_checked_before_the_data_are_looked_at(capsys, more, message):
    with pytest.raises(SystemExit):
        main(["balance", "/nowhere", *OPTIONS, *more])
    assert message in capsys.readouterr().err
