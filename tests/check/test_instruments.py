"""What the checks measure with: copies, modes, memory."""

from dataclasses import dataclass

import pytest
import torch
from channels import Channels

from metavpt.check.copies import twin
from metavpt.check.cost import measure
from metavpt.check.modes import Float64, Uncut
from metavpt.hypergradients.trees import leaves, map_tensors


def test_twins_share_what_attributes_share_and_leave_out_what_cannot_be_copied():
    problem = Channels()
    problem.again = problem.learner
    problem.optimizer = torch.optim.Adam(problem.learner.parameters())
    problem.running = [iter(())]
    problem.running.append(i for i in range(3))
    other = twin(problem)
    assert other.again is other.learner is not problem.learner
    assert other.optimizer.param_groups[0]["params"][0] is other.learner[0].weight
    assert other.running is problem.running


def test_batches_in_dataclasses_are_widened():
    @dataclass(frozen=True)
    class Batch:
        x: torch.Tensor
        seed: int

    wide = map_tensors(torch.Tensor.double, [Batch(torch.ones(2), 3)])
    assert wide[0].x.dtype == torch.float64
    assert list(leaves(wide))[1] == 3


def test_float64_mode_draws_the_numbers_of_float32():
    def draw():
        return torch.rand(5, generator=torch.Generator().manual_seed(0)) + torch.ones(5).float()

    narrow = draw()
    with Float64():
        wide = draw()
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), narrow)


def test_uncut_mode_undoes_no_grad_and_detach():
    x = torch.ones(2, requires_grad=True)
    with Uncut():
        with torch.no_grad():
            y = 2 * x
        z = x.detach() * 3
    assert y.requires_grad
    assert z.requires_grad
    with torch.no_grad():
        assert not (2 * x).requires_grad


def test_memory_is_the_peak_of_what_is_held():
    def three_then_one():
        a, b, c = (torch.ones(250_000) for _ in range(3))
        del a, b
        return c

    cost = measure(three_then_one, torch.device("cpu"))
    assert cost.peak_bytes == pytest.approx(3_000_000, rel=0.01)
