"""How well the first-order value of a step predicts what the step does to the feedback loss."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.check.finding import Finding
from metavpt.check.scene import Scene
from metavpt.compare.paired_statistics import pearson
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.hypergradients.optimizer_updates import first_order_value, from_torch
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.training.streams import Stream

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
NUM_PAIRS = 16
FEWEST_PAIRS = 8
# steps before the first pair: an AdamW without moments steps by the sign of the gradient alone
WARM_UP = 4
FORESEEN = 0.5


def default_optimizer(parameters: list[Tensor]) -> Optimizer:
    """The learner's optimizer where none is given."""
    return torch.optim.AdamW(parameters, lr=1e-4)


class Pair(NamedTuple):
    """The drop of the feedback loss in one step: predicted to first order, and real."""

    plain: float  # lr <g_down, g_pre>, not clipped
    aware: float  # <g_down, theta - theta'> through clipping and AdamW's moments
    same: float  # real, on the labelled batch that g_down was taken on
    held_out: float  # real, on another one


def first_order(
    scene: Scene,
    optimizer: MakeOptimizer,
    clip_norm: float = math.inf,
    seed: int = 0,
    deadline: float = math.inf,
) -> Finding:
    """Correlate predicted and measured changes, after a short warm-up of the optimizer."""
    pairs = _pairs(
        scene.problem,
        optimizer,
        clip_norm,
        seed,
        deadline,
    )
    columns = dict(zip(Pair._fields, zip(*pairs, strict=True), strict=True))
    r = {
        (a, b): math.nan if (found := pearson(columns[a], columns[b]).r) is None else found
        for a in ("plain", "aware")
        for b in ("same", "held_out")
    }
    measured = (
        f"r of predicted and real change in {len(pairs)} single steps: AdamW-aware "
        f"{r['aware', 'same']:.2f} on the same labelled batch, "
        f"{r['aware', 'held_out']:.2f} on another; plain inner product {r['plain', 'same']:.2f} "
        f"and {r['plain', 'held_out']:.2f}"
    )
    name = "first_order"
    if not r["aware", "same"] >= FORESEEN:
        advice = (
            "the step is too long for a first-order value, or theta_S is too small a part: "
            "lower the learning rate, enlarge S"
        )
        return Finding(name, "warning", measured, advice)
    return Finding(name, "ok", measured)


def _pairs(
    problem: Problem,
    make_optimizer: MakeOptimizer,
    clip_norm: float,
    seed: int,
    deadline: float,
) -> list[Pair]:
    """On copies of theta alone; the problem does not move."""
    unlabelled = Stream(problem.pretrain_batches, seed, "pretrain_batches")
    feedback = Stream(problem.feedback_batches, seed, "feedback_batches")
    theta = params.leaves(params.clone(params.named(problem.learner)))
    optimizer = make_optimizer(list(theta.values()))
    for _ in range(WARM_UP):
        step(optimizer, theta, _gradient(problem, theta, next(unlabelled)), clip_norm)
    start, state = params.clone(theta), copy_state(optimizer)
    labelled, pairs = next(feedback), []
    while len(pairs) < NUM_PAIRS and not (
        len(pairs) >= FEWEST_PAIRS and time.monotonic() > deadline
    ):
        restore(optimizer, theta, start, state)
        g_pre = _gradient(problem, theta, next(unlabelled))
        another = next(feedback)
        pairs.append(_pair(problem, optimizer, clip_norm, theta, g_pre, labelled, another))
        labelled = another
    return pairs


def _pair(
    problem: Problem,
    optimizer: Optimizer,
    clip_norm: float,
    theta: Params,
    g_pre: Params,
    labelled: Any,
    another: Any,
) -> Pair:
    loss, g_down = value_and_gradient(
        lambda theta_s: problem.feedback_loss({**theta, **theta_s}, labelled),
        {name: theta[name] for name in problem.aligned_parameters()},
    )
    plain = float(optimizer.param_groups[0]["lr"] * params.dot(g_down, g_pre))
    update = from_torch(optimizer, theta, clip_norm)
    aware = float(first_order_value(update, g_pre, {**params.zeros_like(theta), **g_down})[1])
    with torch.no_grad():
        before = float(loss), float(problem.feedback_loss(theta, another))
        step(optimizer, theta, g_pre, clip_norm)
        after = (
            float(problem.feedback_loss(theta, labelled)),
            float(problem.feedback_loss(theta, another)),
        )
    return Pair(plain, aware, before[0] - after[0], before[1] - after[1])


def _gradient(problem: Problem, theta: Params, batch: Any) -> Params:
    with torch.no_grad():
        task = problem.designer(batch)
    return value_and_gradient(lambda theta: problem.pretrain_loss(theta, task), theta)[1]


def step(optimizer: Optimizer, theta: Params, gradient: Params, clip_norm: float) -> float:
    """Take the learner's step on `gradient`: clip it by its norm, then let the optimizer step.

    Returns:
        The norm before it was clipped.
    """
    for name, p in theta.items():
        p.grad = gradient[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(theta.values(), clip_norm)
    optimizer.step()
    return float(norm)


def copy_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Copy what the optimizer remembers of its parameters, for `restore`."""
    return {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in held.items()}
        for p, held in optimizer.state.items()
    }


@torch.no_grad()
def restore(
    optimizer: Optimizer, theta: Params, start: Params, state: dict[Tensor, dict[str, Any]]
) -> None:
    """Bring parameters and optimizer back to where they were."""
    for name, p in theta.items():
        p.copy_(start[name])
    for p, held in state.items():
        optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in held.items()}
