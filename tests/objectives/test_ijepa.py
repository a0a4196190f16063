import pytest
import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.ijepa import ijepa_loss, normalized_features


def parts() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    predictions, features = (
        2 * torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=g) for _ in range(2)
    )
    return (
        predictions,
        features,
        torch.rand(2, 3, 1, dtype=torch.float64, generator=g).expand(2, 3, 4),
    )


def squared(error: float) -> float:
    return error**2


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) < 1 else abs(error) - 0.5


def naive(predictions: Tensor, features: Tensor, weights: Tensor, distance) -> list[float]:
    """The paper's double sum: over target blocks, and over the patches of each."""
    losses = []
    for b in range(len(predictions)):
        total, weight = 0.0, 0.0
        for m in range(predictions.shape[1]):
            block = 0.0
            for j in range(predictions.shape[2]):
                pairs = zip(predictions[b, m, j].tolist(), features[b, m, j].tolist(), strict=True)
                block += sum(distance(p - f) for p, f in pairs) / predictions.shape[3]
            total += float(weights[b, m, 0]) * block / predictions.shape[2]
            weight += float(weights[b, m, 0])
        losses.append(total / weight)
    return losses


@pytest.mark.parametrize(("name", "distance"), [("l2", squared), ("smooth_l1", huber)])
def test_loss_equals_the_papers_sum(name, distance) -> None:
    predictions, features, weights = parts()
    for w in (None, weights):
        expected = torch.tensor(
            naive(predictions, features, torch.ones_like(weights) if w is None else w, distance),
            dtype=torch.float64,
        )
        torch.testing.assert_close(
            ijepa_loss(predictions, features, w, name, "none"), expected, atol=1e-13, rtol=0
        )
        torch.testing.assert_close(
            ijepa_loss(predictions, features, w, name), expected.mean(), atol=1e-13, rtol=0
        )


def test_features_are_normalised_over_channels() -> None:
    features = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    tokens = normalized_features(features)
    assert tokens.shape == (2, 6, 5)
    column = features[1, :, 1, 2]
    expected = (column - column.mean()) / (column.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(tokens[1, 5], expected, atol=1e-13, rtol=0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    predictions, features, _ = parts()
    with pytest.raises(MetaVPTError, match=r"ijepa_loss: predictions and features"):
        ijepa_loss(predictions, features[:, :2])
    with pytest.raises(MetaVPTError, match="distance is l2 or smooth_l1"):
        ijepa_loss(predictions, features, distance="l3")  # type: ignore[arg-type]
