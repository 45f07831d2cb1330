"""Referring accuracy, against numpy."""

import logging
import tempfile
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pointer import Pointer, true_box

from siglip2.core.batch import Batch
from siglip2.core.callbacks.referring import BoxAccuracy, Grounder, Referring, grounder_of
from siglip2.core.data.datamodule import SigLIP2Data, region_names
from siglip2.core.data.fields import Fields
from siglip2.core.data.settings import ReferringSet, RetrievalSet
from siglip2.core.regions import RegionBox, RegionText
from siglip2.core.views import IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.testing import fake_batch, tiny_module


def numpy_iou(a, b):
    """Intersection over union in float64, by counting the cells of the plane that the sides of both boxes cut out."""
    xs, ys = sorted([a[0], a[2], b[0], b[2]]), sorted([a[1], a[3], b[1], b[3]])
    both = either = 0.0
    for left, right in pairwise(xs):
        for top, bottom in pairwise(ys):
            x, y, area = (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)
            inside = [box[0] < x < box[2] and box[1] < y < box[3] for box in (a, b)]
            both, either = both + area * all(inside), either + area * any(inside)
    return both / either


def random_boxes(num, seed):
    """True boxes, and predicted ones that lie near them; each float32 [num, 4]."""
    rng = np.random.default_rng(seed)
    low, size = rng.uniform(0, 0.5, (num, 2)), rng.uniform(0.1, 0.5, (num, 2))
    true = np.concatenate([low, low + size], axis=1)
    predicted = true + rng.normal(0, 0.06, (num, 4)) * np.tile(size, 2)
    return torch.tensor(true, dtype=torch.float32), torch.tensor(predicted, dtype=torch.float32)


@pytest.fixture
def module():
    tiny = tiny_module([Pointer()]).eval()
    tiny.wake_due(0.0)
    return tiny


def sets(**settings):
    return SimpleNamespace(referring={name: ReferringSet("", languages=x) for name, x in settings.items()})


def test_accuracy_and_overlap_are_those_of_numpy():
    true, predicted = random_boxes(40, seed=0)
    predicted[[3, 17]] = float("nan")
    predicted[5, 2] = float("nan")
    real = torch.arange(40) % 5 != 2  # 17 is left out
    metric = BoxAccuracy()
    for rows in torch.arange(40).split(11):
        metric.update(predicted[rows], true[rows], real[rows])
    found = metric.compute()
    ious = [
        0.0 if i in (3, 5, 17) else numpy_iou(predicted[i].double().tolist(), true[i].double().tolist())
        for i in range(40)
        if i % 5 != 2
    ]
    assert 0.2 < np.mean(np.array(ious) >= 0.5) < 0.95  # so that the comparison says something
    assert float(found["acc@0.5"]) == pytest.approx(np.mean(np.array(ious) >= 0.5))
    assert float(found["iou"]) == pytest.approx(np.mean(ious), abs=1e-6)
    assert found["num_texts"] == 32


def test_overlap_of_exactly_one_half_is_a_hit():
    whole, half = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    metric = BoxAccuracy()
    metric.update(half, whole, torch.tensor([True]))
    assert metric.compute()["acc@0.5"] == 1


def test_box_turned_inside_out_hits_nothing():
    metric = BoxAccuracy()
    metric.update(torch.tensor([[0.9, 0.9, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.tensor([True]))
    assert metric.compute()["iou"] == 0


def accumulate(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    true, predicted = random_boxes(24, seed=1)
    rows = slice(0, 7) if rank == 0 else slice(7, 24)
    metric = BoxAccuracy()
    metric.update(predicted[rows], true[rows], torch.ones(24, dtype=torch.bool)[rows])
    torch.save(metric.compute(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_find_the_accuracy_of_one():
    true, predicted = random_boxes(24, seed=1)
    whole = BoxAccuracy()
    whole.update(predicted, true, torch.ones(24, dtype=torch.bool))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(accumulate, args=(folder,), nprocs=2)
        for rank in range(2):
            found = torch.load(Path(folder) / f"{rank}.pt")
            assert {k: float(v) for k, v in found.items()} == pytest.approx(
                {k: float(v) for k, v in whole.compute().items()}
            )


def test_every_language_is_located_with_its_own_texts_and_boxes(module):
    languages = ["en", "de"]
    names = {x: region_names(x) for x in languages}
    views = [v for x, (text, box) in names.items() for v in (RegionText(text, x), RegionBox(box, x))]
    callback = Referring()
    callback.begin(module, sets(toys=languages))
    for first in (0, 8):
        batch = fake_batch((IMAGE, *views), 8, first=first)
        callback.update("toys", {}, batch)
        callback.update("other", {}, batch)
    scores = callback.finish()
    found = [0.0 if i % 3 == 0 else 1.0 if i % 2 == 0 else 1 / 3 for i in range(16)]
    for x in languages:
        assert scores[f"referring/toys/{x}/iou"] == pytest.approx(np.mean(found), abs=1e-5)
        assert scores[f"referring/toys/{x}/acc@0.5"] == pytest.approx(np.mean(np.array(found) >= 0.5))
    assert [(r.dataset, r.language, r.num_texts) for r in callback.rows] == [("toys", "en", 16), ("toys", "de", 16)]
    assert callback.rows[0].accuracy == scores["referring/toys/en/acc@0.5"]


def test_rows_that_fill_up_the_last_batch_do_not_count(module):
    text, box = region_names("en")
    full = fake_batch((IMAGE, RegionText(text, "en"), RegionBox(box, "en")), 8)
    batch = Batch(full.views, 8, 0, real=torch.arange(8) < 5)
    callback = Referring()
    callback.begin(module, sets(toys=["en"]))
    callback.update("toys", {}, batch)
    scores = callback.finish()
    assert callback.rows[0].num_texts == 5
    assert scores["referring/toys/en/acc@0.5"] == pytest.approx(2 / 5)  # 2 and 4; 0 and 3 have no box, 1 is too narrow


def test_set_without_languages_is_logged_as_all(module):
    callback = Referring()
    callback.begin(module, sets(toys=None))
    callback.update("toys", {}, fake_batch((IMAGE, RegionText(language="en"), RegionBox(language="en")), 4))
    assert callback.finish().keys() == {"referring/toys/all/acc@0.5", "referring/toys/all/iou"}
    assert callback.rows[0].language == ""


def test_without_a_decoder_nothing_is_logged_and_that_is_said_once(caplog):
    module = tiny_module([])
    callback = Referring()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            callback.begin(module, sets(toys=["en"]))
            callback.update("toys", {}, Batch({}, 4, 0))
            assert callback.finish() == {}
    assert [r.getMessage() for r in caplog.records] == [
        "no plugin can locate texts yet: referring sets (toys) are not scored"
    ]


def test_recipe_without_referring_sets_is_told_nothing(caplog):
    with caplog.at_level(logging.INFO):
        Referring().begin(tiny_module([]), sets())
    assert not caplog.records


def test_decoder_that_never_woke_is_not_scored():
    module = tiny_module([Pointer(start=0.5)])
    assert isinstance(module.plugins["pointer"], Grounder)
    assert grounder_of(module) is None
    module.wake_due(0.5)
    assert grounder_of(module) is module.plugins["pointer"]


def test_locca_can_locate():
    locca = pytest.importorskip("siglip2.plugins.locca")
    module = tiny_module([locca.LocCa(length=40)])
    module.wake_due(0.0)
    assert grounder_of(module) is module.plugins["locca"]


@pytest.fixture
def data(toy_shards, toy_tokenizer):
    """Toy shards as a retrieval set and as a referring set, in two languages."""
    recipe = [Fixed(image_size=32), Pointer()]
    toys = {"path": str(toy_shards), "languages": ["en", "de"]}
    pairs = RetrievalSet(**toys, fields=Fields(caption="json.caption"))
    return SigLIP2Data(
        recipe, str(toy_tokenizer), retrieval={"pairs": pairs}, referring={"regions": ReferringSet(**toys)}
    )


def test_referring_set_has_a_text_and_its_box_per_language(data):
    batch = data.eval_batches("regions")[0]
    assert list(batch.views) == ["image", "region_text:en", "region_box:en", "region_text:de", "region_box:de"]
    for row in range(16):
        text = data.tokenizer.decode(batch.views["region_text:de"][row])
        assert int(text.split()[-1]) == row
        torch.testing.assert_close(batch.views["region_box:de"][row], torch.tensor(true_box(row)))


def test_limit_of_a_referring_set_is_kept(data):
    data.referring["regions"] = ReferringSet(data.referring["regions"].path, limit=3)
    assert int(data.eval_batches("regions")[0].real.sum()) == 3


def test_set_of_pictures_without_regions_is_refused_with_the_option_to_set(data, toy_shards):
    data.referring["regions"] = ReferringSet(str(toy_shards), fields=Fields(regions="json.boxes"))
    with pytest.raises(ValueError, match=r"no regions in the first 2 samples.*data\.fields\.regions: json\.regions"):
        data.eval_batches("regions")


def test_referring_and_retrieval_set_of_one_name_are_an_error(toy_tokenizer):
    sets = {"retrieval": {"toys": RetrievalSet("a")}, "referring": {"toys": ReferringSet("a")}}
    with pytest.raises(ValueError, match="'toys' names a retrieval set and a referring set: rename one of them"):
        SigLIP2Data([Fixed(image_size=32), Pointer()], str(toy_tokenizer), **sets)
