"""The task of next-token prediction with designed targets.

A target is q_t = (1 - alpha_t) onehot(true) + alpha_t r_t on the candidates
C_t = {true token} + the K - 1 other tokens that the learner finds likeliest. Kinds of targets
differ in alpha and r, except `Weighted`, which scales the one-hot target of each token. The
learner's log-probabilities enter detached: q may hold a graph to phi, never to theta.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.data.tokens import TokenBatch
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.linear_targets import DirectionalDerivative, ForwardMode
from metavpt.hypergradients.params import Params
from metavpt.learners.lm import Hidden, LanguageModel
from metavpt.objectives.next_token import (
    NextTokenLoss,
    Rule,
    Scores,
    candidate_scores,
    check_num_candidates,
    next_token_loss,
    token_losses,
)
from metavpt.objectives.prediction import Prediction
from metavpt.objectives.spread import spread


class Targets(Protocol):
    """How targets are made from a learner's prediction."""

    @property
    def num_candidates(self) -> int:
        """Return K."""
        ...

    @property
    def requires_grad(self) -> bool:
        """Return whether the targets have a graph."""
        ...

    @property
    def sums_to_one(self) -> bool:
        """Return whether the targets of a token are a distribution."""
        ...

    def rule(self, prediction: Prediction) -> Rule:
        """Return the function that makes the targets from a prediction."""
        ...


class TargetTask(NamedTuple):
    """A batch of tokens with a target distribution for each."""

    batch: TokenBatch
    targets: Targets


@dataclass(frozen=True)
class OneHot:
    """The true token: plain next-token prediction."""

    num_candidates = 1
    requires_grad = False
    sums_to_one = True

    def rule(self, prediction: Prediction) -> Rule:
        """Return probability 1 for the true token."""
        return lambda log_probs, candidates, rows: torch.ones_like(log_probs)


@dataclass(frozen=True)
class Weighted:
    """The true token with the weight `weights` (B, T)."""

    weights: Tensor
    num_candidates = 1
    sums_to_one = False

    @property
    def requires_grad(self) -> bool:
        """Return whether the weights have a graph."""
        return self.weights.requires_grad

    def rule(self, prediction: Prediction) -> Rule:
        """Return the weights for the true tokens."""
        weights = self.weights[prediction.predicted][:, None]
        return lambda log_probs, candidates, rows: weights[rows].to(log_probs.dtype)


@dataclass(frozen=True)
class SoftTargets:
    """r_t = softmax over C_t of residual * log p_t(c) + vectors_t . table[c].

    Attributes:
        gate: alpha, a number or (B, T).
        residual: The weight of the learner's own prediction, a number or a scalar tensor: 0 for
            none, 1 for all.
        vectors, table: (B, T, d) and (V, d), or None for no score. Then residual 1 is
            self-distillation and residual 0 is uniform smoothing.
        excess: How far the gate's logits lie outside their range, (B, T), for a regularizer.
    """

    gate: Tensor | float
    num_candidates: int = 64
    residual: Tensor | float = 1.0
    vectors: Tensor | None = None
    table: Tensor | None = None
    excess: Tensor | None = None
    sums_to_one = True

    @property
    def requires_grad(self) -> bool:
        """Return whether a part has a graph."""
        return any(
            isinstance(part, Tensor) and part.requires_grad
            for part in (self.gate, self.residual, self.vectors, self.table)
        )

    def rule(self, prediction: Prediction) -> Rule:
        """Return the softmax over the candidates, blended by the gate."""
        gate = self.gate[prediction.predicted][:, None] if isinstance(self.gate, Tensor) else None
        vectors = None if self.vectors is None else self.vectors[prediction.predicted]

        def rule(log_probs: Tensor, candidates: Tensor, rows: slice) -> Tensor:
            logits = self.residual * log_probs
            if vectors is not None and self.table is not None:
                logits = logits + candidate_scores(vectors[rows], self.table, candidates)
            return mixed(self.gate if gate is None else gate[rows], logits.softmax(dim=1))

        return rule


@dataclass(frozen=True)
class Tilted:
    """r_t = softmax over C_t of log p_t(c) + A_t(c) / tau, with the value A = -d log p_t(c)[w].

    r maximises <r, A> - tau KL(r || p_t on C_t): it is the best target within a trust region
    (method.md, section 6). A is centred under p_t on C_t and scaled once per batch to a mean square
    of 1, so that tau has no unit: for large tau the mean KL is 1 / (2 tau^2). With tau = 0 the best
    candidate takes all of r (greedy).

    Attributes:
        w: The direction in theta_S that the value is taken along: g_down, or what a `Direction`
            makes of it.
    """

    w: Params
    gate: float = 0.5
    tau: float = 1.0
    num_candidates: int = 64
    derivative: DirectionalDerivative = field(default_factory=ForwardMode)
    requires_grad = False
    sums_to_one = True

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise MetaVPTError(f"tau={self.tau} must not be negative")

    @torch.no_grad()
    def rule(self, prediction: Prediction) -> Rule:
        """Return the tilted distribution over the candidates."""
        # Only the part of d log p that differs between candidates: the rest is taken away by the
        # centring.
        vectors, table = -prediction.slope(self.w, self.derivative), prediction.unembedding.detach()
        if self.tau == 0:
            return self._greedy(vectors, table)
        scores = prediction.scores(self.num_candidates)
        scale = spread(candidate_scores(vectors, table, scores.candidates), scores.log_probs)
        vectors = vectors / (self.tau * scale.clamp_min(torch.finfo(scale.dtype).tiny))

        def rule(log_probs: Tensor, candidates: Tensor, rows: slice) -> Tensor:
            return mixed(
                self.gate,
                (log_probs + candidate_scores(vectors[rows], table, candidates)).softmax(dim=1),
            )

        return rule

    def _greedy(self, vectors: Tensor, table: Tensor) -> Rule:
        def rule(log_probs: Tensor, candidates: Tensor, rows: slice) -> Tensor:
            best = candidate_scores(vectors[rows], table, candidates).argmax(dim=1, keepdim=True)
            return mixed(self.gate, torch.zeros_like(log_probs).scatter_(1, best, 1.0))

        return rule


@dataclass(frozen=True)
class OnRows:
    """`targets` on the rows of the batch marked by `rows` (B,), the true token on others."""

    targets: Targets
    rows: Tensor

    @property
    def num_candidates(self) -> int:
        """Return K of the inner targets."""
        return self.targets.num_candidates

    @property
    def requires_grad(self) -> bool:
        """Return whether the inner targets have a graph."""
        return self.targets.requires_grad

    @property
    def sums_to_one(self) -> bool:
        """Return whether the inner targets are distributions."""
        return self.targets.sums_to_one

    def rule(self, prediction: Prediction) -> Rule:
        """Return the inner rule on the marked rows, and one-hot targets elsewhere."""
        marked, rule = (
            self.rows[prediction.predicted.nonzero()[:, 0]][:, None],
            self.targets.rule(prediction),
        )
        return lambda log_probs, candidates, rows: mixed(
            marked[rows].to(log_probs.dtype), rule(log_probs, candidates, rows)
        )


def mixed(gate: Tensor | float, r: Tensor) -> Tensor:
    """Return (1 - gate) onehot + gate r; the true token comes first. Exactly one-hot for gate 0."""
    onehot = torch.zeros_like(r)
    onehot[:, 0] = 1.0
    return (1.0 - gate) * onehot + gate * r


def target_loss(learner: LanguageModel, theta: Params, task: TargetTask) -> Tensor:
    """Compute the cross-entropy to the targets of `task`: a scalar, the mean over predicted tokens.

    Candidates, targets and loss come from one pass through the learner at `theta`.
    """
    if task.targets.requires_grad and torch.is_grad_enabled():
        return target_tail(learner, theta, task)({})
    return collectives.weighed(*own_target_loss(learner, theta, task))


def own_target_loss(
    learner: LanguageModel, theta: Params, task: TargetTask, hidden: Hidden | None = None
) -> tuple[Tensor, int]:
    """Compute the same for this rank's tokens, and return it with their number.

    The trunk does not run where its output `hidden` is given.
    """
    prediction = Prediction.of(learner, theta, task.batch, hidden)
    arguments = _checked(task.targets, prediction)
    return next_token_loss(
        prediction.states, prediction.unembedding, prediction.tokens, *arguments
    ), len(prediction.tokens)


def target_tail(learner: LanguageModel, theta: Params, task: TargetTask) -> NextTokenLoss:
    """Return theta_S -> `target_loss`, with the trunk run once.

    Candidates and the learner's part of the targets are those at theta.
    """
    prediction = Prediction.of(learner, theta, task.batch)
    scores, targets = _targets(task.targets, prediction)
    return NextTokenLoss(
        prediction.at, prediction.unembedding, scores.candidates, targets, task.targets.sums_to_one
    )


def target_loss_per_sample(
    learner: LanguageModel, theta: Params, task: TargetTask
) -> Callable[[Params], Tensor]:
    """Return theta_S -> the mean loss of each row, (B,), without a graph.

    A row with nothing to predict counts 0.
    """
    with torch.no_grad():
        prediction = Prediction.of(learner, theta, task.batch)
        scores, targets = _targets(task.targets, prediction)
    row = prediction.predicted.nonzero()[:, 0]

    def per_sample(theta_s: Params) -> Tensor:
        losses = token_losses(
            prediction.at(theta_s), prediction.unembedding, scores.candidates, targets
        )
        total = losses.new_zeros(len(prediction.predicted)).index_add_(0, row, losses)
        return total / prediction.predicted.sum(dim=1).clamp_min(1)

    return per_sample


def _targets(targets: Targets, prediction: Prediction) -> tuple[Scores, Tensor]:
    """Return candidates and q (N, K) of all tokens."""
    num_candidates, rule = _checked(targets, prediction)
    scores = prediction.scores(num_candidates)
    return scores, rule(scores.log_probs, scores.candidates, slice(None))


def _checked(targets: Targets, prediction: Prediction) -> tuple[int, Rule]:
    check_num_candidates(targets.num_candidates, len(prediction.unembedding))
    return targets.num_candidates, targets.rule(prediction)
