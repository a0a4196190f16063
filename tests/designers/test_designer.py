import torch

from metavpt.designers.designer import clamp_to_unit


def test_values_are_clamped_and_edges_let_go() -> None:
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    y = clamp_to_unit(x)
    assert y.tolist() == [0.0, 0.0, 0.3, 1.0, 1.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
