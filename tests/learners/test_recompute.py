import torch
from torch import nn
from torch.func import functional_call

from metavpt.learners.recompute import recomputed


class Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return recomputed(self.block, x) if self.recompute else self.block(x)


def derivatives(net: Net, x: torch.Tensor, theta: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """First derivatives by theta, and those of their squared norm."""
    loss = functional_call(net, theta, (x,)).square().sum()
    first = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(theta.values()))
    return [*first, *second]


def test_recomputed_derivatives_are_those_of_functional_call_parameters() -> None:
    torch.manual_seed(0)
    x, plain, again = torch.randn(5, 3).double(), Net(False), Net(True)
    theta = {
        name: torch.randn_like(p).requires_grad_() for name, p in plain.named_parameters()
    }  # neither network's own
    for found, expected in zip(
        derivatives(again, x, theta), derivatives(plain, x, theta), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_recomputed_runs_the_block_again_in_the_backward_pass() -> None:
    net, calls = Net(True), []
    net.block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = net(torch.randn(2, 3).double()).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
