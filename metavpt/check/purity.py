"""Losses and designer are pure: the same arguments give the same value, and nothing moves.

Estimators evaluate them many times a step; finite differences and unrolls mean nothing otherwise.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from metavpt.check import copies
from metavpt.check.finding import Finding, listed
from metavpt.check.scene import Scene
from metavpt.hypergradients import params, trees
from metavpt.problem import Problem
from metavpt.training.streams import held_out_batches

ROUNDING = 1e-5  # of a sum on a GPU, whose order is another each time: relative
ADVICE = {
    "pretrain_purity": "move state (centre, EMA, BatchNorm statistics, counters) in after_step, "
    "switch dropout off, and let the batch carry its own randomness",
    "feedback_purity": "move state in fit_heads or after_step, use BatchNorm with its running "
    "statistics, switch dropout off",
    "designer_purity": "draw random numbers from a generator seeded by the batch, "
    "see designers.views.MultiCrop",
}


def purity(scene: Scene) -> list[Finding]:
    """Evaluate each of the three twice, on its own twin, so that no change carries over."""
    findings = []
    for name in ADVICE:
        problem = copies.twin(scene.problem)
        theta = params.leaves(params.named(problem.learner))
        with torch.no_grad():
            task = None if name == "designer_purity" else problem.designer(scene.unlabelled[0])
        evaluate: dict[str, Callable[[], Any]] = {
            "pretrain_purity": lambda p=problem, t=task, th=theta: p.pretrain_loss(th, t),
            "feedback_purity": lambda p=problem, th=theta: p.feedback_loss(th, scene.labelled),
            "designer_purity": lambda p=problem: p.designer(scene.unlabelled[0]),
        }
        findings.append(_twice(name, problem, evaluate[name]))
    return findings


def held_out(scene: Scene, seed: int) -> list[Finding]:
    """Compare the first held-out batch with the first feedback batch, sample by sample."""
    source = held_out_batches(scene.problem)
    if source == scene.problem.feedback_batches:  # the problem has none
        return []
    other = next(iter(source(seed)))
    known, rows = (_samples(batch) for batch in (scene.labelled, other))
    shared = sum(row in known for row in rows)
    return [
        Finding(
            "held_out",
            "warning" if 2 * shared >= len(rows) > 0 else "ok",
            f"{shared} of {len(rows)} samples of the first held-out batch are in the first "
            "feedback batch",
            "give held_out_batches examples that feedback_batches never yields, or what updates do "
            "to other examples is not measured"
            if 2 * shared >= len(rows) > 0
            else "",
        )
    ]


def _samples(batch: Any) -> list[bytes]:
    """The rows of the largest tensor of a batch, as bytes."""
    tensors = [leaf for leaf in trees.tensors(batch) if leaf.ndim and leaf.numel()]
    if not tensors:
        return []
    largest = max(tensors, key=Tensor.numel).detach().cpu()
    rows = largest.reshape(len(largest), -1).contiguous().view(torch.uint8)
    return [row.tobytes() for row in rows.numpy()]


def _twice(name: str, problem: Problem, evaluate: Callable[[], Any]) -> Finding:
    before = snapshot(problem)
    with torch.enable_grad():
        values = [[_detached(leaf) for leaf in trees.leaves(evaluate())] for _ in range(2)]
    after = snapshot(problem)
    moved = [
        key
        for key in before.keys() | after.keys()
        if not trees.same(before.get(key), after.get(key))
    ]
    differ = len(values[0]) != len(values[1]) or not all(
        trees.same(a, b) for a, b in zip(*values, strict=True)
    )
    finite = all(
        bool(torch.isfinite(leaf).all())
        for leaf in values[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    what = "task" if name == "designer_purity" else "loss"
    if differ and not moved and what == "loss" and (rounding := on_gpu(*values)):
        return Finding(name, "warning", rounding, ADVICE[name])
    if moved or differ:
        faults = [f"two evaluations gave another {what}"] if differ else []
        faults += [f"it moved {listed(sorted(moved))}"] if moved else []
        return Finding(name, "failed", "; ".join(faults), ADVICE[name])
    if not finite:
        return Finding(
            name,
            "failed",
            f"the {what} is not finite",
            "look at the first batch, and at the learner's weights",
        )
    return Finding(
        name, "ok", f"two evaluations gave the same {what} bit for bit and moved nothing"
    )


def on_gpu(first: list[Any], second: list[Any]) -> str:
    """The finding for two losses on a GPU that differ by no more than `ROUNDING`; none otherwise.

    For some losses of dense predictions torch only has kernels whose order of summation varies.
    """
    losses = [loss for loss in (*first, *second) if isinstance(loss, Tensor) and loss.is_cuda]
    return rounded(*losses) if len(losses) == 2 else ""


def rounded(a: Tensor, b: Tensor) -> str:
    """How far apart two losses are, where that is within `ROUNDING` of the first."""
    apart = float((a - b).abs() / a.abs())
    return (
        f"two evaluations gave losses {apart:.1e} apart, which the order of sums on a GPU may be"
        if apart <= ROUNDING
        else ""
    )


def snapshot(problem: Problem) -> dict[str, Any]:
    """Copy what must not change: parameters, buffers, other state, attributes, random state."""
    taken: dict[str, Any] = {}
    for attribute, value in vars(problem).items():
        if isinstance(value, nn.Module):
            tensors = [*value.named_parameters(), *value.named_buffers()]
            taken.update(
                {f"{attribute}.{name}": tensor.detach().clone() for name, tensor in tensors}
            )
            continue
        tree = value.state_dict() if hasattr(value, "state_dict") else value
        for path, leaf in tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, (Tensor, bool, int, float, str)):
                taken[attribute + "".join(map(str, path))] = _detached(leaf)
    taken["torch's global random state"] = torch.get_rng_state()
    if torch.cuda.is_available():
        taken["CUDA's global random state"] = torch.cuda.get_rng_state()
    taken["numpy's global random state"] = repr(np.random.get_state())
    taken["random's global state"] = repr(random.getstate())
    return taken


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
