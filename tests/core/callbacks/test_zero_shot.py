"""Zero-shot accuracy and class vectors, against numpy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassRecall

from siglip2.core.batch import Batch
from siglip2.core.callbacks.zero_shot import MeanRecall, ZeroShot, class_vectors, read_classes
from siglip2.core.data.settings import ZeroShotSet
from siglip2.core.model.two_towers import unit_norm
from siglip2.testing import tiny_module

# B batch, K classes, E embedding dimension
NAMES = {
    "en": ["red disc", "green box", "blue disc", "gold box", "red box", "green disc", "blue box"],
    "de": ["rote Scheibe", "grüne Kiste", "blaue Scheibe", "goldene Kiste", "rote Kiste", "grüne Scheibe", "Kiste"],
}
TEMPLATES = ["{}", "a picture of a {}", "{}, number 3"]


@pytest.fixture
def module():
    return tiny_module([]).eval()


@pytest.fixture
def toys(tmp_path):
    """A zero-shot set of seven classes in two languages."""
    classes = [{"names": {language: names[k] for language, names in NAMES.items()}} for k in range(7)]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes}))
    return ZeroShotSet("", str(tmp_path / "classes.json"), templates=TEMPLATES)


def numpy_vectors(module, names):
    """Normalise every prompt, take the mean of a class, normalise: in float64, one prompt at a time."""
    vectors = []
    for name in names:
        ids = [module.tokenizer(template.replace("{}", name))[None] for template in TEMPLATES]
        prompts = [module.model.text(i)[2][0].double().numpy() for i in ids]  # before the tower's own norm
        mean = np.mean([p / np.linalg.norm(p) for p in prompts], axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    return np.stack(vectors)


@torch.no_grad()
def test_class_vector_is_the_normalised_mean_of_normalised_prompts(module):
    found = class_vectors(module, NAMES["en"], TEMPLATES, batch_size=4)  # prompts of one class straddle two batches
    np.testing.assert_allclose(found.numpy(), numpy_vectors(module, NAMES["en"]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_top1_and_top5_of_real_rows_are_those_of_numpy(module, toys):
    generator = torch.Generator().manual_seed(0)
    images = unit_norm(torch.randn(40, module.model.embed_dim, generator=generator))
    labels = torch.randint(7, (40,), generator=generator)
    real = torch.arange(40) % 4 != 2
    callback = ZeroShot()
    callback.begin(module, SimpleNamespace(zero_shot={"toys": toys}))
    for rows in torch.arange(40).split(11):
        embedded = {"image": images[rows], "label": labels[rows]}
        callback.update("toys", embedded, Batch({}, len(rows), 0, real=real[rows]))
    scores = callback.finish()
    top1 = {}
    for language in ("en", "de"):
        logits = images[real].double().numpy() @ numpy_vectors(module, NAMES[language]).T
        best = np.argsort(-logits, axis=1)
        truth = labels[real].numpy()[:, None]
        top1[language], top5 = (best[:, :1] == truth).any(1).mean(), (best[:, :5] == truth).any(1).mean()
        assert 0 < top1[language] < top5 < 1  # so that the comparison says something
        assert scores[f"zero_shot/toys/{language}/top1"] == pytest.approx(top1[language])
        assert scores[f"zero_shot/toys/{language}/top5"] == pytest.approx(top5)
        hits = best[:, :1] == truth
        recall = np.mean([hits[truth == k].mean() for k in np.unique(truth)])  # as sklearn's balanced accuracy
        assert recall != pytest.approx(top1[language])
        assert scores[f"zero_shot/toys/{language}/mean_per_class_recall"] == pytest.approx(recall)
    assert scores["zero_shot/toys/mean/top1"] == pytest.approx(sum(top1.values()) / 2)
    assert {(row.num_images, row.num_classes, row.chance) for row in callback.rows} == {(30, 7, 1 / 7)}


def test_mean_recall_is_torchmetrics_macro_where_every_class_has_images_and_skips_those_that_have_none():
    scores, labels = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 7
    found, expected = MeanRecall(7), MulticlassRecall(7, average="macro")
    for rows in torch.arange(60).split(11):
        found.update(scores[rows], labels[rows])
        expected.update(scores[rows], labels[rows])
    assert found.compute().item() == pytest.approx(expected.compute().item())
    found.reset()
    found.update(torch.eye(7)[[0, 1, 2, 2]], torch.tensor([0, 0, 1, -1]))  # 2 is predicted, and never true
    assert found.compute() == 0.25


@torch.no_grad()
def test_each_evaluation_begins_anew(module, toys):
    callback = ZeroShot()
    for _ in range(2):
        callback.begin(module, SimpleNamespace(zero_shot={"toys": toys}))
        embedded = {"image": callback._vectors["toys", "en"], "label": torch.arange(7)}
        callback.update("toys", embedded, Batch({}, 7, 0))
        assert callback.finish()["zero_shot/toys/en/top1"] == 1.0
        assert callback.rows[0].num_images == 7


def test_bare_class_names_are_english(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert read_classes(str(tmp_path / "classes.json")) == {"en": ["cat", "dog"]}


def test_languages_are_those_that_every_class_has_in_the_order_of_the_labels(tmp_path):
    classes = [{"names": {"en": "cat", "de": "Katze", "fr": "chat"}}, {"names": {"de": "Hund", "en": "dog"}}]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes}))
    path = str(tmp_path / "classes.json")
    assert read_classes(path) == {"de": ["Katze", "Hund"], "en": ["cat", "dog"]}
    assert read_classes(path, ["en"]) == {"en": ["cat", "dog"]}
    with pytest.raises(ValueError, match="no name for some class in fr; every class has de, en"):
        read_classes(path, ["en", "fr"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no classes"),
        ('{"classes": []}', "holds no classes"),
        ('["cat", "dog"]', "holds no classes"),
        ("cat, dog", "is not JSON"),
        ('{"classes": [{"name": "cat"}]}', "class 0 is .*, expected a name or"),
        ('{"classes": ["cat", 3]}', "class 1 is 3, expected a name or"),
        ('{"classes": ["cat", {"names": {"de": "Hund"}}]}', "no language in which every class has a name"),
    ],
)
def test_classes_that_cannot_be_read_name_the_file_and_what_was_expected(tmp_path, text, message):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        read_classes(str(tmp_path / "classes.json"))


def test_missing_file_of_classes_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: expected a JSON file"):
        read_classes(str(tmp_path / "none.json"))
