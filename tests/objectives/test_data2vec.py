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


def test_gradient_by_the_targets_is_that_of_the_squared_error():
    predictions = torch.randn(2, 3, 4, dtype=torch.float64)
    targets = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(data2vec_loss(predictions, targets), targets)
    torch.testing.assert_close(slope, 2 * (targets.detach() - predictions) / 24, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("predictions", "targets", "reduction"),
    [((2, 3, 4), (2, 3, 5), "mean"), ((2, 3), (2, 3), "mean"), ((2, 3, 4), (2, 3, 4), "sum")],
)
def test_shapes_and_reductions_that_do_not_fit_are_named(predictions, targets, reduction):
    with pytest.raises(MetaVPTError, match="data2vec_loss"):
        data2vec_loss(torch.zeros(predictions), torch.zeros(targets), reduction)
