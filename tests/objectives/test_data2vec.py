import pytest
import torch

from metavpt import MetaVPTError
from metavpt.objectives.data2vec import data2vec_loss


def test_the_mean_of_squared_differences_and_its_gradient_by_the_predictions():
    predictions = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 5, 4, dtype=torch.float64)
    naive = torch.stack([((predictions[b] - targets[b]) ** 2).sum() / 20 for b in range(3)])
    torch.testing.assert_close(
        data2vec_loss(predictions, targets, "none"), naive, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        data2vec_loss(predictions, targets), naive.mean(), rtol=1e-12, atol=0
    )
    (slope,) = torch.autograd.grad(data2vec_loss(predictions, targets), predictions)
    torch.testing.assert_close(slope, 2 * (predictions.detach() - targets) / 60, rtol=1e-12, atol=0)


def test_affine_in_the_targets():
    """Their gradient is what a `GoalLoss` wants, the same wherever they are."""
    predictions = torch.randn(2, 3, 4, dtype=torch.float64)
    slopes = []
    for _ in range(2):
        targets = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        slopes.append(torch.autograd.grad(data2vec_loss(predictions, targets), targets)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=0)
    torch.testing.assert_close(slopes[0], -2 * predictions / 24, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("predictions", "targets", "reduction"),
    [((2, 3, 4), (2, 3, 5), "mean"), ((2, 3), (2, 3), "mean"), ((2, 3, 4), (2, 3, 4), "sum")],
)
def test_shapes_and_reductions_that_do_not_fit_are_named(predictions, targets, reduction):
    with pytest.raises(MetaVPTError, match="data2vec_loss"):
        data2vec_loss(torch.zeros(predictions), torch.zeros(targets), reduction)
