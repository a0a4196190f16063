import torch

from metavpt.objectives.spread import spread


def test_spread_is_the_root_mean_variance() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    values = torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    variances = torch.tensor([1.0, 0.25 * 9 + 0.75 * 1], dtype=torch.float64)
    torch.testing.assert_close(spread(values, probs.log()), variances.mean().sqrt())


def test_spread_of_equal_values_is_zero() -> None:
    log_probs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(spread(torch.full((3, 4), 7.0).double(), log_probs)) < 1e-14
