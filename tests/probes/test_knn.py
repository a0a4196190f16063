"""Weighted nearest neighbours against the loop of DINO's paper."""

import math

import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.probes.classification import ClassTask
from metavpt.probes.features import FeatureSet
from metavpt.probes.knn import KNN

N, M, D, C = 40, 260, 5, 4  # more queries than are taken at a time


def scene() -> tuple[FeatureSet, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, C, (N, 1, 1), generator=generator)
    features = torch.randn(N, D, 1, 1, generator=generator) * 3
    return FeatureSet(features, label), torch.randn(M, D, 1, 1, generator=generator)


def naive(train: FeatureSet, query: torch.Tensor, k: int, temperature: float) -> list[float]:
    """Votes of one query, up to a factor."""
    x = [row.flatten().double() for row in train.features]
    cosine = [float(torch.dot(query, row) / (query.norm() * row.norm())) for row in x]
    nearest = sorted(range(len(x)), key=lambda i: -cosine[i])[:k]
    votes = [0.0] * C
    for i in nearest:
        votes[int(train.target[i])] += math.exp(cosine[i] / temperature)
    return [vote / math.exp(1 / temperature) for vote in votes]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (N, 0.5)])
def test_votes_are_those_of_the_paper(k: int, temperature: float) -> None:
    train, queries = scene()
    votes = KNN(k, temperature).fit(ClassTask(C), train)(queries)
    assert votes.shape == (M, C, 1, 1)
    expected = torch.tensor(
        [naive(train, query.flatten().double(), k, temperature) for query in queries]
    )
    # float32 cosines over a temperature of 0.07
    torch.testing.assert_close(votes[:, :, 0, 0], expected, rtol=1e-4, atol=1e-7)


def test_a_small_temperature_does_not_overflow() -> None:
    train, queries = scene()
    votes = KNN(5, 1e-3).fit(ClassTask(C), train)(queries)
    assert torch.isfinite(votes).all()
    nearest = KNN(1).fit(ClassTask(C), train)(train.features)
    assert torch.equal(nearest.argmax(1), train.target)  # an image is its own nearest


def test_bad_settings_are_named() -> None:
    with pytest.raises(MetaVPTError, match="k=0"):
        KNN(0)
    with pytest.raises(MetaVPTError, match=r"temperature=0\.0"):
        KNN(temperature=0.0)
    with pytest.raises(MetaVPTError, match=f"k=41 is more than the {N} training images"):
        KNN(41).fit(ClassTask(C), scene()[0])
