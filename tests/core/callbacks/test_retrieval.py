"""Recall of pairs, against numpy and torchmetrics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from siglip2.core.batch import Batch
from siglip2.core.callbacks.retrieval import KS, PairRecall, Retrieval, match_ranks
from siglip2.core.data.settings import RetrievalSet
from siglip2.core.model.two_towers import unit_norm
from siglip2.testing import tiny_module

# M images and their texts, E embedding dimension
M, E = 30, 8


@pytest.fixture
def pairs():
    """Images, and texts that lie near their image but not always nearest, each [M, E]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(M, E, generator=generator)
    return unit_norm(images), unit_norm(images + 1.5 * torch.randn(M, E, generator=generator))


def numpy_ranks(queries, targets):
    scores = queries.double().numpy() @ targets.double().numpy().T
    return [1 + sum(scores[i, j] > scores[i, i] for j in range(len(scores))) for i in range(len(scores))]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_ranks_are_those_of_numpy(pairs, chunk):
    images, texts = pairs
    ranks = match_ranks(texts, images, chunk=chunk).tolist()
    assert ranks == numpy_ranks(texts, images)
    assert 1 in ranks
    assert max(ranks) > 5  # so that the comparison says something


def test_recall_is_the_hit_rate_of_torchmetrics_in_both_directions(pairs):
    images, texts = pairs
    recall = PairRecall()
    recall.update(images, texts, torch.ones(M, dtype=torch.bool))
    found = recall.compute()
    queries = torch.arange(M)[:, None].expand(M, M)
    for way, scores in {"text_to_image": texts @ images.T, "image_to_text": images @ texts.T}.items():
        for k in KS:
            expected = RetrievalHitRate(top_k=k)(scores.flatten(), torch.eye(M).flatten() > 0, queries.flatten())
            assert found[f"{way}@{k}"] == pytest.approx(expected.item())
    assert found["num_pairs"] == M


def test_rows_that_are_not_real_count_neither_as_query_nor_as_target(pairs):
    images, texts = pairs
    real = torch.arange(M) % 3 != 1
    whole, part = PairRecall(), PairRecall()
    for rows in torch.arange(M).split(7):
        whole.update(images[rows], texts[rows], real[rows])
    part.update(images[real], texts[real], torch.ones(int(real.sum()), dtype=torch.bool))
    assert whole.compute() == part.compute()


def test_ties_count_against():
    same = torch.ones(M, E)
    assert match_ranks(same, same).tolist() == [M] * M


def test_embeddings_that_are_not_numbers_find_nothing():
    recall = PairRecall()
    broken = torch.full((M, E), float("nan"))
    recall.update(broken, broken, torch.ones(M, dtype=torch.bool))
    found = recall.compute()
    assert {key: float(value) for key, value in found.items() if key != "num_pairs"} == {
        f"{way}@{k}": 0.0 for way in ("text_to_image", "image_to_text") for k in KS
    }


def test_every_language_is_searched_with_its_own_captions(pairs):
    images, texts = pairs
    callback = Retrieval()
    data = SimpleNamespace(retrieval={"toys": RetrievalSet("", languages=["en", "de"]), "bare": RetrievalSet("")})
    callback.begin(tiny_module([]), data)
    rows = {"image": images, "caption:en": texts, "caption:de": texts.flip(0)}
    callback.update("toys", rows, Batch({}, M, 0))
    callback.update("bare", {"image": images, "caption": images}, Batch({}, M, 0))
    scores = callback.finish()
    for language, captions in (("en", texts), ("de", texts.flip(0))):
        expected = np.mean(np.array(numpy_ranks(captions, images)) <= 5)
        assert scores[f"retrieval/toys/{language}/text_to_image@5"] == pytest.approx(expected)
    assert scores["retrieval/bare/all/image_to_text@1"] == 1.0
    assert [(r.dataset, r.language, r.num_images, r.num_texts) for r in callback.rows] == [
        ("toys", "en", M, M),
        ("toys", "de", M, M),
        ("bare", "", M, M),
    ]
