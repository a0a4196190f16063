import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences
from torch import Generator, Tensor, nn
from torch.func import functional_call

from metavpt.designers.encoder import ImageEncoder
from metavpt.designers.prototypes import PrototypeDesigner, reshape, reshape_patches
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

K = 12


def batch(size: int = 3) -> Any:
    return SimpleNamespace(
        images=torch.rand(
            size, 3, 24, 32, dtype=torch.float64, generator=Generator().manual_seed(0)
        ),
        seed=7,
    )


def designer(open_gates: bool = False, **changes: Any) -> PrototypeDesigner:
    torch.manual_seed(0)
    hiding = (
        {"patch_size": 4, "hidden_prob": 1.0, "hidden_share": (0.3, 0.5)}
        if changes.get("patches")
        else {}
    )
    recipe = MultiCrop(
        (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), global_size=16, local_size=8, num_local=1, **hiding
    )
    arguments: dict[str, Any] = {"num_prototypes": K, "rank": 4, "support": 5}
    made = PrototypeDesigner(
        recipe, ImageEncoder(width=8, depth=2, size=8), **(arguments | changes)
    ).double()
    if open_gates:
        nn.init.normal_(made.gate.weight, std=3.0)
        if made.patches is not None:
            nn.init.normal_(made.patches.gate.weight, std=3.0)
    return made


def patch_teacher(task: Views) -> Tensor:
    """(M, K)"""
    return (
        torch.randn(
            int(task.hidden.sum()), K, dtype=torch.float64, generator=Generator().manual_seed(8)
        )
        .mul(2)
        .softmax(-1)
    )


def teacher(dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(2, 3, K, dtype=torch.float64, generator=Generator().manual_seed(4))
        .mul(2)
        .softmax(-1)
        .to(dtype)
    )


def views(scores: Tensor, gates: Tensor, support: int = 5) -> Views:
    return designer().recipe_task(batch())._replace(scores=scores, gates=gates, support=support)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_designer_leaves_the_teacher_as_it_is_bit_for_bit(dtype: torch.dtype) -> None:
    made = designer()
    task, plain = made(batch()), made.recipe_task(batch())
    assert (task.gates == 0).all()
    assert task.scores.shape == (2, 3, K)
    assert torch.equal(reshape(teacher(dtype), task), teacher(dtype))
    assert reshape(teacher(dtype), plain).equal(teacher(dtype))
    assert torch.equal(task.global_crops, plain.global_crops)
    assert made.regularizer(task).item() == 0


def test_a_gate_at_zero_has_a_gradient_and_so_can_open() -> None:
    made = designer()
    loss = (
        reshape(teacher(), made(batch()))
        * torch.randn(K, dtype=torch.float64, generator=Generator().manual_seed(5))
    ).sum()
    assert all(
        grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, list(made.gate.parameters()))
    )


def naive(p: list[float], r: list[float], gate: float, support: int) -> list[float]:
    """q = (1 - a) p + a * mass * softmax(log p + r) on the support."""
    top = sorted(range(len(p)), key=lambda k: -p[k])[:support]
    sign, a = (-1.0 if gate < 0 else 1.0), abs(gate)
    mass, odds = sum(p[k] for k in top), {k: p[k] * math.exp(sign * r[k]) for k in top}
    return [
        (1 - a) * p[k] + a * mass * odds[k] / sum(odds.values()) if k in top else p[k]
        for k in range(len(p))
    ]


def test_reshape_follows_the_formula() -> None:
    rng = Generator().manual_seed(6)
    scores = torch.randn(2, 3, K, dtype=torch.float64, generator=rng)
    gates = torch.rand(2, 3, dtype=torch.float64, generator=rng) * 2 - 1
    assert (gates < 0).any()
    assert (gates > 0).any()
    q, p = reshape(teacher(), views(scores, gates)), teacher()
    for g in range(2):
        for b in range(3):
            expected = naive(p[g, b].tolist(), scores[g, b].tolist(), gates[g, b].item(), 5)
            torch.testing.assert_close(
                q[g, b], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
            )
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert q.min() >= 0


def test_reshape_is_linear_in_the_gate_and_smooth_through_zero() -> None:
    scores = 1e-3 * torch.randn(2, 3, K, dtype=torch.float64, generator=Generator().manual_seed(6))
    moved = [
        reshape(teacher(), views(scores, torch.full((2, 3), a, dtype=torch.float64))) - teacher()
        for a in (0.2, 0.4, -0.2)
    ]
    torch.testing.assert_close(moved[1], 2 * moved[0], atol=1e-14, rtol=0)
    torch.testing.assert_close(
        moved[2], -moved[0], atol=1e-7, rtol=0
    )  # all but second order in the scores
    assert moved[0].abs().max() > 1e-5


def test_probabilities_that_vanish_stay_finite() -> None:
    probs = torch.zeros(2, 3, K)
    probs[..., 0] = 1.0
    task = views(torch.full((2, 3, K), 2.0, requires_grad=True), torch.full((2, 3), 0.5))
    q = reshape(probs, task)
    assert q.isfinite().all()
    assert torch.autograd.grad(q.square().sum(), task.scores)[0].isfinite().all()


def test_every_parameter_is_reached_and_the_gradient_is_that_of_differences() -> None:
    made = designer(open_gates=True)
    phi = params.clone(params.named(made))
    weight = torch.randn(K, dtype=torch.float64, generator=Generator().manual_seed(5))

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return (reshape(teacher(), task) * weight).sum() + made.regularizer(task)

    assert_gradient_is_that_of_differences(total, phi)


def test_gates_and_scores_stay_within_bounds() -> None:
    made = designer(max_gate=0.3, max_score=1.5)
    with torch.no_grad():
        made.gate.bias.fill_(100.0)
        made.keys.mul_(1000)
    task = made(batch())
    assert task.gates.abs().max() <= 0.3
    assert task.scores.abs().max() <= 1.5
    first, second = made.random_tasks(batch(), 2)
    assert 0 < first.gates.abs().max() <= 0.3
    assert 1.0 < first.scores.abs().max() <= 1.5
    assert not torch.equal(first.scores, second.scores)
    assert torch.equal(first.scores, made.random_tasks(batch(), 1)[0].scores)
    assert torch.equal(first.global_crops, made.recipe_task(batch()).global_crops)


def test_regularizer_and_figure() -> None:
    made = designer(open_gates=True, gate_weight=0.2)
    task = made(batch())
    assert made.regularizer(task).item() == pytest.approx(
        0.2 * sum(g * g for g in task.gates.flatten().tolist()) / 6, abs=1e-12
    )
    assert made.figures(batch(), task)["prototypes"].dtype == "uint8"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="max_gate"):
        designer(max_gate=1.5)
    with pytest.raises(MetaVPTError, match="support=13"):
        designer(support=13)
    with pytest.raises(MetaVPTError, match="no gates"):
        designer().regularizer(designer().recipe_task(batch()))
    with pytest.raises(MetaVPTError, match="num_prototypes"):
        reshape(teacher()[..., :7], designer()(batch()))


def test_a_new_designer_leaves_the_patches_of_the_teacher_as_they_are_bit_for_bit() -> None:
    made = designer(patches=True)
    task = made(batch())
    assert task.patch_scores.shape == (2, 3, 16, K)
    assert (task.patch_gates == 0).all()
    assert torch.equal(reshape_patches(patch_teacher(task), task), patch_teacher(task))
    assert torch.equal(
        reshape_patches(patch_teacher(task), made.recipe_task(batch())), patch_teacher(task)
    )
    assert made.regularizer(task).item() == 0


def test_hidden_patches_follow_the_formula_each_with_its_own_scores_and_gate() -> None:
    made = designer(open_gates=True, patches=True)
    task = made(batch())
    p = patch_teacher(task)
    q = reshape_patches(p, task)
    places = task.hidden.nonzero().tolist()
    assert len(places) == len(p) > 3
    for m, (g, b, n) in enumerate(places):
        expected = naive(
            p[m].tolist(), task.patch_scores[g, b, n].tolist(), task.patch_gates[g, b, n].item(), 5
        )
        torch.testing.assert_close(
            q[m], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
        )
    assert task.patch_gates.std() > 1e-3
    squares = task.gates.square().mean() + task.patch_gates.square().mean()
    torch.testing.assert_close(made.regularizer(task), 0.01 * squares)
    assert made.figures(batch(), task)["prototypes"].dtype == "uint8"


def test_every_parameter_of_patch_targets_is_reached_and_the_gradient_is_that_of_differences() -> (
    None
):
    made = designer(open_gates=True, patches=True)
    phi = params.clone(params.named(made))
    weight = torch.randn(K, dtype=torch.float64, generator=Generator().manual_seed(5))

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return (reshape(teacher(), task) * weight).sum() + (
            reshape_patches(patch_teacher(task), task) * weight
        ).sum()

    assert_gradient_is_that_of_differences(total, phi)


def test_random_patch_targets_stay_within_bounds() -> None:
    first, second = designer(patches=True, max_gate=0.3).random_tasks(batch(), 2)
    assert first.patch_scores.shape == (2, 3, 16, K)
    assert 0.2 < first.patch_gates.abs().max() <= 0.3
    assert not torch.equal(first.patch_scores, second.patch_scores)


def test_patch_targets_without_hidden_patches_are_refused() -> None:
    made = designer(patches=True)
    made.recipe.patch_size = None
    with pytest.raises(MetaVPTError, match=r"problem.terms.ibot"):
        made(batch())
