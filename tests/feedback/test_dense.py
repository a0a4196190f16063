"""The losses of dense heads against loops written from their formulas, and sums of named losses."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import weighted, weighted_sum
from metavpt.feedback.dense import DenseFeedback, RidgeFeedback
from metavpt.probes.heads import enlarge

TASKS = [DepthTask(), SegmentationTask(3)]


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
    feedback = DenseFeedback(5, TASKS, lr=0.1, **weights).double()
    for _ in range(3):
        feedback.fit(*scene)
    return feedback


@torch.no_grad()
def naive(feedback, features, frames):
    """Pixel by pixel."""
    mean, var = (
        statistic.view(-1, 1, 1)
        for statistic in (feedback.norm.running_mean, feedback.norm.running_var)
    )
    normalized = (features - mean) / (var + feedback.norm.eps).sqrt()
    metres = F.softplus(enlarge(feedback.depth(normalized), (6, 8))[:, 0])
    logits = enlarge(feedback.segmentation(normalized), (6, 8))
    pixels = [(b, i, j) for b in range(2) for i in range(6) for j in range(8)]
    errors = [abs(float(metres[p] - frames.depth[p])) for p in pixels if frames.depth[p] > 0]
    entropies = [
        float(-logits[b, :, i, j].log_softmax(0)[frames.label[b, i, j]])
        for b, i, j in pixels
        if frames.label[b, i, j] != 255
    ]
    return {"depth": sum(errors) / len(errors), "segmentation": sum(entropies) / len(entropies)}


def test_both_losses_are_their_formulas(scene):
    feedback = heads(scene)
    losses = feedback(*scene)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        naive(feedback, *scene), rel=1e-12
    )


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
    with pytest.raises(
        MetaVPTError, match=r"feedback.depth_weight=0, feedback.segmentation_weight=0"
    ):
        DenseFeedback(5, TASKS, depth_weight=0, segmentation_weight=0)


@pytest.mark.parametrize("task", TASKS)
def test_states_with_heads_of_other_tasks_load(scene, task):
    """Checkpoints of earlier versions have a head for labels that the set has not."""
    other = next(one for one in TASKS if one is not task)
    both = heads(scene, **{f"{other.name}_weight": 0.0})
    alone = DenseFeedback(5, [task], lr=0.1).double()
    alone.load_state_dict(copy.deepcopy(both.state_dict()))
    assert [alone.fit(*scene) for _ in range(3)] == [both.fit(*scene) for _ in range(3)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"normals_weight": 1.0}, r"normals_weight=1\.0: .* is read without normals; set it to 0"),
        ({"depth_wait": 1.0}, r"feedback\.depth_wait: no such key"),
        ({"depth_weight": "much"}, r"feedback\.depth_weight=much: must be a number"),
        ({"depth_weight": -1.0}, r"feedback\.depth_weight=-1"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(MetaVPTError, match=message):
        DenseFeedback(5, TASKS, **weights)
    assert DenseFeedback(5, TASKS, normals_weight=0, depth_weight=None).weights["depth"] == 1


PENALTY = 1e-2


def frames_for(num_frames=4, classes=3, width=5):
    """Features (B,D,2,3) that predict part of their labels (B,4,6); a patch is known or unknown."""
    g = torch.Generator().manual_seed(1)
    features = torch.randn(num_frames, width, 2, 3, generator=g, dtype=torch.float64)
    metres = (
        3 + features[:, 0] + 0.5 * torch.randn(num_frames, 2, 3, generator=g, dtype=torch.float64)
    )
    label = features[:, :classes].argmax(dim=1)
    metres[0, 0, 0], label[1, 1, 2] = 0.0, 255
    enlarge = lambda maps: maps.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return features, Frames(enlarge(metres.clamp_min(0.0)), enlarge(label))


def ridge(penalty=PENALTY, num_folds=2, **weights):
    return RidgeFeedback(5, TASKS, penalty=penalty, num_folds=num_folds, **weights).double()


def by_hand(features, frames, folds, penalty=PENALTY, fitted=None):
    """Both losses by the normal equations. `fitted`: other features to fit the heads on."""
    fitted = features if fitted is None else fitted
    losses = {}
    for name in ("depth", "segmentation"):
        total = count = 0
        for scored in folds:
            others = [b for b in range(len(features)) if b not in scored]
            z, y = rows(name, fitted[others], frames.depth[others], frames.label[others])
            mean, std = z.mean(0), z.std(0, correction=0)
            unit = (z - mean) / std
            gram = unit.T @ unit / len(unit)
            damped = gram + penalty * gram.diagonal().mean() * torch.eye(5, dtype=z.dtype)
            weight = torch.linalg.inv(damped) @ (unit.T @ (y - y.mean(0)) / len(y)) / std[:, None]
            output = (
                torch.einsum("bdhw,dc->bchw", features[scored] - mean[:, None, None], weight)
                + y.mean(0)[:, None, None]
            )
            output = enlarge(output, (4, 6))
            if name == "depth":
                known, squares = (
                    frames.depth[scored] > 0,
                    (output[:, 0] - frames.depth[scored]).square(),
                )
            else:
                known = frames.label[scored] != 255
                truth = F.one_hot(frames.label[scored] * known, 3).movedim(-1, 1)
                squares = (output - truth).square().sum(1)
            total, count = total + squares[known].sum(), count + known.sum()
        losses[name] = total / count
    return losses


def rows(name, features, depth, label):
    """Features and targets of the known patches; a label of 2 x 2 pixels is one patch's."""
    depth, label = depth[:, ::2, ::2].flatten(), label[:, ::2, ::2].flatten()
    known = depth > 0 if name == "depth" else label != 255
    y = depth[known][:, None] if name == "depth" else F.one_hot(label[known], 3).double()
    return features.movedim(1, -1).flatten(0, 2)[known], y


def gradient(feedback, features, frames):
    at = features.clone().requires_grad_()
    return torch.autograd.grad(weighted_sum(feedback(at, frames), feedback.weights), at)[0]


@pytest.mark.parametrize(
    ("num_folds", "folds"),
    [(2, [[0, 1], [2, 3]]), (4, [[0], [1], [2], [3]]), (3, [[0, 1], [2], [3]])],
)
def test_ridge_feedback_is_the_closed_form_by_hand(num_folds, folds):
    features, frames = frames_for()
    losses = ridge(num_folds=num_folds)(features, frames)
    expected = by_hand(features, frames, folds)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-9
    )


@pytest.mark.parametrize("name", ["depth", "segmentation"])
def test_the_gradient_through_the_solve_is_that_of_differences(name):
    features, frames = frames_for()
    feedback = ridge(
        **{f"{other}_weight": float(other == name) for other in ("depth", "segmentation")}
    )
    assert feedback(features, frames).keys() == {name}
    g = gradient(feedback, features, frames)
    for seed in (11, 12, 13):
        direction = torch.randn(
            features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        ahead, behind = (
            feedback(features + step * direction, frames)[name].item() for step in (1e-6, -1e-6)
        )
        assert float((g * direction).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)
    assert all(frame.any() for frame in g)  # every frame is scored once and fitted once


def test_what_a_refit_absorbs_is_not_asked_for():
    """An invertible map x -> x + t (M x + c) changes fixed heads, but not refitted ones."""
    features, frames = frames_for(num_frames=6)
    generator = torch.Generator().manual_seed(2)
    matrix, shift = (
        torch.randn(*shape, 5, dtype=torch.float64, generator=generator) for shape in ((5,), ())
    )
    moved = torch.einsum("ed,bdhw->behw", matrix, features) + shift[:, None, None]
    feedback = ridge(penalty=1e-9)
    g = gradient(feedback, features, frames)
    slope = float((g * moved).sum() / (g.norm() * moved.norm()))
    held = held_gradient(features, frames, penalty=1e-9)
    assert abs(slope) < 1e-7
    assert abs(float((held * moved).sum() / (held.norm() * moved.norm()))) > 1e-2
    before, after = (
        weighted_sum(feedback(x, frames), feedback.weights).item()
        for x in (features, features + 0.3 * moved)
    )
    assert after == pytest.approx(before, rel=1e-6)


def held_gradient(features, frames, penalty=PENALTY):
    """d L / d features with the heads where they are."""
    at = features.clone().requires_grad_()
    half = len(features) // 2
    losses = by_hand(
        at, frames, [list(range(half)), list(range(half, len(features)))], penalty, fitted=features
    )
    return torch.autograd.grad(sum(losses.values()), at)[0]


def test_the_total_derivative_is_not_that_of_fixed_heads():
    features, frames = frames_for()
    through, held = gradient(ridge(), features, frames), held_gradient(features, frames)
    assert float(torch.cosine_similarity(through.flatten(), held.flatten(), dim=0)) < 0.95
    # and what differs is the heads: with these in the graph as well the loop by hand has the same
    # gradient
    at = features.clone().requires_grad_()
    whole = torch.autograd.grad(sum(by_hand(at, frames, [[0, 1], [2, 3]]).values()), at)[0]
    torch.testing.assert_close(through, whole, rtol=1e-8, atol=1e-12)


def test_rescaled_channels_change_nothing_at_any_penalty():
    features, frames = frames_for()
    scaled = features * torch.tensor([0.1, 2.0, 30.0, 1.0, 0.5], dtype=torch.float64)[:, None, None]
    for name, loss in ridge(penalty=0.3)(features, frames).items():
        assert ridge(penalty=0.3)(scaled, frames)[name].item() == pytest.approx(
            loss.item(), rel=1e-9
        )


def test_ridge_feedback_has_no_state_and_is_pure():
    features, frames = frames_for()
    feedback = ridge()
    assert not feedback.state_dict()
    assert not list(feedback.parameters())
    assert not feedback.fitted_by_steps
    first, second = feedback(features, frames), feedback(features, frames)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ridge_feedback_in_half_and_single_precision_stays_near_the_double_one():
    features, frames = frames_for()
    expected = ridge()(features, frames)
    for dtype, rel in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        for name, loss in ridge()(features.to(dtype), frames).items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=rel)


def test_ridge_feedback_refuses_what_it_cannot_do():
    features, frames = frames_for()
    with pytest.raises(MetaVPTError, match="num_folds=1"):
        ridge(num_folds=1)
    with pytest.raises(MetaVPTError, match=r"num_folds=5 .*raise problem\.feedback_batch_size"):
        ridge(num_folds=5)(features, frames)
    with pytest.raises(MetaVPTError, match=r"feedback.depth_weight=0"):
        ridge(depth_weight=0, segmentation_weight=0)
    with pytest.raises(MetaVPTError, match="no valid pixel"):
        ridge()(features, frames._replace(depth=torch.zeros_like(frames.depth)))
