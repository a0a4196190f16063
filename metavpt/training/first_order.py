"""Compares the first-order prediction of a step with its measured effect on held-out feedback."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.hypergradients import params
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import downstream
from metavpt.hypergradients.optimizer_updates import last_clip_factor
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, aligned_names, supports
from metavpt.training.streams import Stream, held_out_batches


class FitsHeads(Protocol):
    """A problem whose `fit_heads` writes attributes that a probe must save and restore."""

    def heads(self) -> Sequence[str]:
        """Return the names of the attributes that `fit_heads` writes."""
        ...


def head_names(problem: Problem) -> Sequence[str]:
    """Return the attributes that `fit_heads` writes. Default: none."""
    return problem.heads() if supports(problem, FitsHeads) else ()


class Before(NamedTuple):
    """Quantities of a step before it is taken."""

    theta: Params
    g_down: Params
    plain: float
    labelled: Any
    loss: float
    held_out: Any
    held_out_loss: float


class FirstOrderProbe:
    """Predicted and measured change of the feedback loss in one step of the learner.

    The prediction uses one labelled batch, the measurement a held-out one. A record holds

    - `realised`: L(theta') - L(theta) on the held-out batch.
    - `realised_same`: the same on the batch of g_down. It shows curvature without sampling noise.
    - `predicted`: <g_down, theta' - theta>, for the learner's optimizer and all parameters.
    - `predicted_aligned`: the same on theta_S only.
    - `predicted_plain`: -lr <g_down, g_pre> on theta_S, with g_pre before clipping. This is the
      paper's value (arXiv 2601.22108, section 5, which reports r = 0.657).

    The probe fits its own heads and then restores those of the strategy, so it changes no run.

    Args:
        problem: The problem.
        seed: The seed of the two streams.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem = problem
        self.feedback = Stream(problem.feedback_batches, seed, "feedback_batches")
        self.held_out = Stream(held_out_batches(problem), seed + 100_000, "held_out_batches")
        self._heads: dict[str, Any] = {}

    def before(self, optimizer: Optimizer) -> Before:
        """Predict the step. Call it after clipping and before the optimizer's step."""
        live = params.named(self.problem.learner)
        theta = {name: p.detach().clone() for name, p in live.items()}
        labelled, held_out = next(self.feedback), next(self.held_out)
        with self._own_heads():
            self.problem.fit_heads()
            loss, g_down = downstream(
                averaged(lambda t: self.problem.feedback_loss(t, labelled)), theta
            )
            held_out_loss = self._loss(theta, held_out)
        lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        aligned = aligned_names(self.problem, theta)
        clipped = -sum(
            lr[id(p)] * float((g_down[name] * p.grad).sum())
            for name in aligned
            if (p := live[name]).grad is not None
        )
        plain = clipped / last_clip_factor(optimizer)
        return Before(theta, g_down, plain, labelled, loss, held_out, held_out_loss)

    def after(self, before: Before) -> dict[str, float]:
        """Measure the step after it was taken, and return the record."""
        live = params.named(self.problem.learner)
        change = {name: p.detach() - before.theta[name] for name, p in live.items()}
        aligned = aligned_names(self.problem, change)
        with self._own_heads():
            realised = self._loss(live, before.held_out) - before.held_out_loss
            same = self._loss(live, before.labelled) - before.loss
        return {
            "realised": realised,
            "realised_same": same,
            "predicted": float(params.dot(before.g_down, change)),
            "predicted_aligned": sum(
                float((before.g_down[name] * change[name]).sum()) for name in aligned
            ),
            "predicted_plain": before.plain,
        }

    @torch.no_grad()
    def _loss(self, theta: Params, batch: Any) -> float:
        return float(collectives.leave(self.problem.feedback_loss(theta, batch)))

    @contextmanager
    def _own_heads(self) -> Iterator[None]:
        theirs = self._head_state()
        self._load_heads(self._heads)
        try:
            yield
        finally:
            self._heads = self._head_state()
            self._load_heads(theirs)

    def _head_state(self) -> dict[str, Any]:
        return {
            name: copy.deepcopy(getattr(self.problem, name).state_dict())
            for name in head_names(self.problem)
        }

    def _load_heads(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self.problem, name).load_state_dict(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "feedback": self.feedback.state_dict(),
            "held_out": self.held_out.state_dict(),
            "heads": self._heads,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.feedback.load_state_dict(state["feedback"])
        self.held_out.load_state_dict(state["held_out"])
        self._heads = state["heads"]
