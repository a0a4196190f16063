"""The losses of the dense heads against loops written from their formulas, and how named losses are summed."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.feedback import DenseFeedback, upsample, weighted, weighted_sum


class Frames(NamedTuple):
    depth: Tensor
    label: Tensor


@pytest.fixture
def scene():
    """Features (2,5,3,4) with labels (2,6,8), some unknown."""
    g = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 6, 8, generator=g, dtype=torch.float64) * 5
    label = torch.randint(0, 3, (2, 6, 8), generator=g)
    depth[0, :2], label[1, 3:] = 0.0, 255
    return torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64), Frames(depth, label)


def heads(scene, **weights):
    torch.manual_seed(0)
    feedback = DenseFeedback(5, 3, lr=0.1, **weights).double()
    for _ in range(3):
        feedback.fit(*scene)
    return feedback


@torch.no_grad()
def naive(feedback, features, frames):
    """Pixel by pixel."""
    mean, var = (statistic.view(-1, 1, 1) for statistic in (feedback.norm.running_mean, feedback.norm.running_var))
    normalized = (features - mean) / (var + feedback.norm.eps).sqrt()
    metres = F.softplus(upsample(feedback.depth(normalized), (6, 8))[:, 0])
    logits = upsample(feedback.segmentation(normalized), (6, 8))
    pixels = [(b, i, j) for b in range(2) for i in range(6) for j in range(8)]
    errors = [abs(float(metres[p] - frames.depth[p])) for p in pixels if frames.depth[p] > 0]
    entropies = [float(-logits[b, :, i, j].log_softmax(0)[frames.label[b, i, j]]) for b, i, j in pixels if frames.label[b, i, j] != 255]
    return {"depth": sum(errors) / len(errors), "segmentation": sum(entropies) / len(entropies)}


def test_both_losses_are_their_formulas(scene):
    feedback = heads(scene)
    losses = feedback(*scene)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(naive(feedback, *scene), rel=1e-12)


@pytest.mark.parametrize(("zero", "other"), [("depth", "segmentation"), ("segmentation", "depth")])
def test_a_weight_of_zero_leaves_its_head_alone(scene, zero, other):
    """Not computed, not trained; the other loss as ever."""
    feedback = heads(scene, **{f"{zero}_weight": 0.0})
    calls = []
    getattr(feedback, zero).register_forward_hook(lambda *_: calls.append(1))
    losses = feedback(*scene)
    feedback.fit(*scene)
    assert losses.keys() == {other}
    assert calls == []
    assert not getattr(feedback, zero).weight.any()
    assert losses[other].item() == pytest.approx(naive(heads(scene), *scene)[other], rel=1e-6)


def test_fitting_is_a_step_on_the_weighted_sum(scene):
    feedback = heads(scene, depth_weight=2.0, segmentation_weight=0.5)
    before = copy.deepcopy(feedback)
    before.norm.train()
    loss = before._losses(before.norm(scene[0]), scene[1])
    expected = 2.0 * loss["depth"].item() + 0.5 * loss["segmentation"].item()
    assert feedback.fit(*scene) == pytest.approx(expected, rel=1e-12)


def test_the_weighted_sum_is_the_hand_computation():
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, 5.0))
    total = weighted_sum({"b": b, "a": a}, {"a": 2.0, "b": -0.5, "c": 0.0})
    assert total.item() == 2.0 * 3.0 - 0.5 * 5.0
    assert [float(g) for g in torch.autograd.grad(total, (a, b))] == [2.0, -0.5]


@pytest.mark.parametrize(
    ("losses", "weights", "words"),
    [
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, "gives a; feedback_weights names a, b"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "gives a, b; feedback_weights names a"),
        ({"a": 1.0}, {"a": 0.0}, "one must not be 0"),
        ({}, {"a": 1.0}, "gives nothing"),
    ],
)
def test_losses_and_weights_that_do_not_match_name_both(losses, weights, words):
    with pytest.raises(MetaVPTError, match=words):
        weighted({name: torch.tensor(value) for name, value in losses.items()}, weights)


def test_two_weights_of_zero_are_refused():
    with pytest.raises(MetaVPTError, match=r"feedback.depth_weight=0, feedback.segmentation_weight=0"):
        DenseFeedback(5, 3, depth_weight=0, segmentation_weight=0)
