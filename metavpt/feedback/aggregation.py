"""How several named feedbacks become the outer losses that hypergradients are taken of.

A rule is a value object, called on a labelled batch at theta. `WeightedSum` and `TorchJD` answer
with one outer loss, sum_j lambda_j w_j L_j with lambda held constant, so that every estimator takes
it as it is; `DomainMatched` with one for each domain.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from importlib import import_module
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.distributed_losses import averaged
from metavpt.hypergradients.estimators import Hypergradient, OuterLoss
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require, supports

# Those of torchjd's weightings that read the Gramian alone: no random numbers, and no state that a
# checkpoint would have to hold.
WEIGHTINGS = ("AlignedMTL", "CAGrad", "DualProj", "FairGrad", "IMTLG", "MGDA", "Sum", "UPGrad")


class MultipleFeedbacks(Protocol):
    """A problem with several feedbacks. Inherit from it before `Problem`.

    Attributes:
        feedback_weights: Weight of each feedback by name.
    """

    feedback_weights: Mapping[str, float]

    def feedback_losses(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the feedbacks, a scalar each, by the names in `feedback_weights`.

        One of weight 0 may be left out.
        """
        ...

    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        """Compute the weighted sum of the feedbacks."""
        return weighted_sum(self.feedback_losses(theta, batch), self.feedback_weights)


class SplitsDomains(Protocol):
    """A problem whose unlabelled batches hold several domains, one for each feedback."""

    def by_domain(self, batch: Any) -> dict[str, Any]:
        """Split an unlabelled meta batch by the names in `feedback_weights`."""
        ...


@dataclass(frozen=True)
class Feedback:
    """A labelled batch at a point. Losses are functions of theta_S.

    Attributes:
        problem: The problem.
        theta: The learner's parameters, detached.
        aligned: theta_S at this point.
        labelled: The batch.
    """

    problem: Problem
    theta: Params
    aligned: Params
    labelled: Any

    @property
    def all_weights(self) -> Mapping[str, float]:
        """The weight of each feedback by name."""
        if supports(self.problem, MultipleFeedbacks):
            return self.problem.feedback_weights
        return {"feedback": 1.0}

    @property
    def weights(self) -> dict[str, float]:
        """w_j by name, without those that are 0."""
        weights = {name: weight for name, weight in self.all_weights.items() if weight}
        if not weights:
            raise MetaVPTError(
                f"{type(self.problem).__name__}.feedback_weights: every weight is 0, so there is "
                "no feedback"
            )
        return weights

    def loss(self, theta_s: Params) -> Tensor:
        """The feedback loss as the problem has it."""
        return averaged(
            lambda own: self.problem.feedback_loss({**self.theta, **own}, self.labelled)
        )(theta_s)

    def terms(self, weights: Mapping[str, float], theta_s: Params) -> dict[str, Tensor]:
        """Compute weight * L_j for each name in `weights`."""
        theta = {**self.theta, **collectives.enter(theta_s)}
        if supports(self.problem, MultipleFeedbacks):
            losses = self.problem.feedback_losses(theta, self.labelled)
        else:
            losses = {"feedback": self.problem.feedback_loss(theta, self.labelled)}
        weighted(losses, self.all_weights)  # names that do not match are an error
        return {name: weight * collectives.leave(losses[name]) for name, weight in weights.items()}

    def gradients(self) -> dict[str, Params]:
        """d(w_j L_j)/d theta_S by name, detached: one forward pass, a backward pass each."""
        theta_s = params.leaves(self.aligned)
        with torch.enable_grad():
            losses = self.terms(self.weights, theta_s)
        return {name: _gradient(name, loss, theta_s) for name, loss in losses.items()}


class Pair(NamedTuple):
    """An outer loss and the unlabelled batches for its hypergradient.

    Attributes:
        outer_loss: The loss.
        unlabelled: The batches.
        share: Its share in the mean over pairs.
    """

    outer_loss: OuterLoss
    unlabelled: Sequence[Any]
    share: float = 1.0


@dataclass(frozen=True)
class Combined:
    """The result of a rule.

    Attributes:
        pairs: Pairs by name.
        grad_evals: Gradient evaluations of the rule.
        record: Measurements for the log.
    """

    pairs: dict[str, Pair]
    grad_evals: int = 0
    record: dict[str, float] = field(default_factory=dict)

    @property
    def outer_loss(self) -> OuterLoss:
        """Return the outer loss of the only pair."""
        (pair,) = self.pairs.values()
        return pair.outer_loss

    def mean(self, estimates: Mapping[str, Hypergradient]) -> Hypergradient:
        """Average the estimates of the pairs. Several keep diagnostics as `<diagnostic>/<pair>`."""
        if len(estimates) == 1:
            (one,) = estimates.values()
            return replace(
                one,
                grad_evals=one.grad_evals + self.grad_evals,
                diagnostics={**one.diagnostics, **self.record},
            )
        shared = [
            params.scale(estimate.by_phi, self.pairs[name].share)
            for name, estimate in estimates.items()
        ]
        measured = {
            name: {"value": estimate.value, **estimate.diagnostics}
            for name, estimate in estimates.items()
        }
        return Hypergradient(
            reduce(params.add, shared),
            sum(self.pairs[name].share * estimate.value for name, estimate in estimates.items()),
            self.grad_evals + sum(estimate.grad_evals for estimate in estimates.values()),
            {
                **self.record,
                **{
                    f"{key}/{name}": value
                    for name, group in measured.items()
                    for key, value in group.items()
                },
            },
        )


class Combination(Protocol):
    """A rule that combines several feedbacks."""

    @property
    def pairs_batches(self) -> bool:
        """Return whether the rule needs `unlabelled`.

        Only strategies with a learned designer have it.
        """
        ...

    def __call__(self, feedback: Feedback, unlabelled: Sequence[Any] = ()) -> Combined:
        """Combine the feedbacks of a batch.

        Args:
            feedback: The labelled batch.
            unlabelled: The batches for the hypergradient.
        """
        ...


@dataclass(frozen=True)
class WeightedSum:
    """sum_j w_j L_j with the problem's own weights, which is its `feedback_loss`."""

    pairs_batches = False

    def __call__(self, feedback: Feedback, unlabelled: Sequence[Any] = ()) -> Combined:
        """Return the problem's `feedback_loss` as the only pair."""
        return Combined({"feedback": Pair(feedback.loss, unlabelled)})


class TorchJD:
    """sum_j lambda_j w_j L_j, with lambda from the gradients of w_j L_j by theta_S.

    It reconciles feedbacks in conflict. It costs one gradient for each feedback in addition to
    those of the estimator. The log holds `weight/<name>`, which is lambda_j w_j, and
    `conflict/<a>-<b>`, the cosine between two gradients, negative in conflict. A single feedback is
    unchanged.

    Args:
        weighting: MGDA (the point of least norm in the convex hull of the gradients, see
            `min_norm_weights`), UPGrad (Quinton and Rey 2024) or another of `WEIGHTINGS`. All but
            MGDA come from the package torchjd. Sum changes nothing and only logs.
        normalize: Whether to scale the gradients to equal length first, their root mean square.
            Then only their directions count.
        options: The options of the weighting, as torchjd names them. MGDA has none.
    """

    pairs_batches = False

    def __init__(
        self,
        weighting: str = "MGDA",
        options: Mapping[str, Any] | None = None,
        normalize: bool = False,
    ) -> None:
        check_known(weighting, "strategy.combination.weighting", *WEIGHTINGS)
        self.normalize = normalize
        self.weighting = self._weighting(weighting, options or {})

    @staticmethod
    def _weighting(name: str, options: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        if name == "MGDA":
            if options:
                raise MetaVPTError(
                    f"strategy.combination.options of MGDA: remove {', '.join(options)}; "
                    "it is solved exactly and has no options"
                )
            return min_norm_weights
        try:
            torchjd = import_module("torchjd.aggregation")
        except ImportError as error:
            raise MetaVPTError(
                f"strategy.combination: torchjd cannot be imported ({error}); pip install "
                "'metavpt[torchjd]'"
            ) from error
        try:
            return getattr(torchjd, f"{name}Weighting")(**options)
        except ImportError as error:  # its solver is a package of its own
            raise MetaVPTError(f"strategy.combination.weighting={name}: {error}") from error
        except (TypeError, ValueError) as error:
            raise MetaVPTError(f"strategy.combination.options of {name}: {error}") from error

    def __call__(self, feedback: Feedback, unlabelled: Sequence[Any] = ()) -> Combined:
        """Return one pair whose loss has the rule's weights."""
        weights = feedback.weights
        if len(weights) == 1:
            return WeightedSum()(feedback, unlabelled)
        gradients = feedback.gradients()
        gramian = _gramian(list(gradients.values()))
        lambdas = dict(zip(gradients, self.lambdas(gramian).tolist(), strict=True))
        combined = {name: lambdas[name] * weight for name, weight in weights.items()}
        record = {
            **{f"weight/{name}": weight for name, weight in combined.items()},
            **_conflicts(list(gradients), gramian),
        }

        def outer_loss(theta_s: Params) -> Tensor:
            return torch.stack(list(feedback.terms(combined, theta_s).values())).sum()

        return Combined({"feedback": Pair(outer_loss, unlabelled)}, len(gradients), record)

    def lambdas(self, gramian: Tensor) -> Tensor:
        """Return lambda (J,) from the inner products (J, J) of the gradients.

        NaN if a gradient is not finite. Then the sum is not finite either, and the update is
        skipped.
        """
        if not torch.isfinite(gramian).all():
            return torch.full_like(gramian[0], torch.nan)
        norms = gramian.diagonal().sqrt()
        scale = torch.ones_like(norms)
        if self.normalize:
            scale = torch.where(norms > 0, norms.square().mean().sqrt() / norms, scale)
            gramian = scale[:, None] * gramian * scale
        # The solvers' tolerances are absolute: hand over a trace of one.
        return scale * self.weighting(
            gramian / gramian.trace().clamp_min(torch.finfo(gramian.dtype).tiny)
        )


@dataclass(frozen=True)
class DomainMatched:
    """Hypergradients of each domain's feedback through unlabelled batches of the same domain.

    Their mean has the problem's weights. Source: language multitask in V-Pretraining, section 4.
    Domains are the names of the feedbacks; `problem.by_domain` finds them in an unlabelled batch.
    Each domain costs an estimate.
    """

    pairs_batches = True

    def __call__(self, feedback: Feedback, unlabelled: Sequence[Any] = ()) -> Combined:
        """Return a pair for each domain."""
        weights = feedback.weights
        problem = require(feedback.problem, SplitsDomains, "strategy.combination=DomainMatched")
        domains = [problem.by_domain(batch) for batch in unlabelled]
        for parts in domains:
            if set(weights) - set(parts) or set(parts) - set(feedback.all_weights):
                raise MetaVPTError(
                    "strategy.combination=DomainMatched: by_domain gives "
                    f"{', '.join(parts) or 'nothing'}, the feedbacks are "
                    f"{', '.join(weights)}; every unlabelled batch must hold each domain that has "
                    "feedback, and no other"
                )
        total = sum(weights.values())
        return Combined({
            name: Pair(partial(_term, feedback, name), [parts[name] for parts in domains],
                weight / total)
            for name, weight in weights.items()
        })  # fmt: skip


def min_norm_weights(gramian: Tensor) -> Tensor:
    """Solve for the convex combination of vectors that has the least norm (Désidéri, 2012).

    The minimizer x >= 0 of |F x|^2 + (sum x - 1)^2 with F^T F = G is a multiple of the answer: for
    x = s lambda with sum lambda = 1, the minimum over s is q / (1 + q) with q = |F lambda|^2, which
    grows with q. An active-set method solves this non-negative least squares problem exactly.

    Args:
        gramian: inner products <g_i, g_j> of the vectors, (J, J), with a trace of about 1.

    Returns:
        lambda (J,): lambda >= 0, sum lambda = 1, lambda^T G lambda minimal.
    """
    from scipy.optimize import nnls  # slow to import, and only MGDA needs it

    values, vectors = torch.linalg.eigh(gramian.to("cpu", torch.float64))
    factor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    system = torch.cat([factor, factor.new_ones(1, len(factor))])
    goal = torch.zeros(len(system), dtype=system.dtype)
    goal[-1] = 1.0
    x = torch.from_numpy(nnls(system.numpy(), goal.numpy())[0])
    return (x / x.sum()).to(gramian)


def unpaired(combination: Combination | None) -> Combination:
    """Check a rule for a strategy without hypergradients. None becomes `WeightedSum`.

    Raises:
        MetaVPTError: The rule pairs batches.
    """
    combination = combination or WeightedSum()
    if combination.pairs_batches:
        raise MetaVPTError(
            f"strategy.combination={type(combination).__name__} pairs unlabelled batches with "
            "feedback, which only strategies that "
            "learn a designer do; use WeightedSum or TorchJD"
        )
    return combination


def _gradient(name: str, loss: Tensor, theta_s: Params) -> Params:
    if not loss.requires_grad:
        raise MetaVPTError(
            f"feedback_losses: {name} depends on none of aligned_parameters, so it cannot be "
            "weighed by its gradient"
        )
    parts = torch.autograd.grad(
        loss, list(theta_s.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(theta_s, parts, strict=True))


def _term(feedback: Feedback, name: str, theta_s: Params) -> Tensor:
    return feedback.terms({name: 1.0}, theta_s)[name]


def _gramian(gradients: Sequence[Params]) -> Tensor:
    """<g_i, g_j>, (J,J) float64 on the CPU."""
    rows = [torch.stack([params.dot(a, b) for b in gradients]) for a in gradients]
    return torch.stack(rows).to("cpu", torch.float64)


def _conflicts(names: Sequence[str], gramian: Tensor) -> dict[str, float]:
    norms = gramian.diagonal().sqrt().clamp_min(torch.finfo(gramian.dtype).tiny)
    cosines = gramian / norms / norms[:, None]
    return {
        f"conflict/{names[i]}-{names[j]}": float(cosines[i, j])
        for i, j in combinations(range(len(names)), 2)
    }


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Compute weight * loss by name, in the order of `weights`, without those of weight 0."""
    active = [name for name, weight in weights.items() if weight]
    if not active or set(active) - set(losses) or set(losses) - set(weights):
        raise MetaVPTError(
            f"feedback_losses gives {', '.join(losses) or 'nothing'}; feedback_weights names "
            f"{', '.join(weights) or 'nothing'}: "
            "every loss needs a weight, every weight but 0 a loss, and one must not be 0"
        )
    return {name: weights[name] * losses[name] for name in active}


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of weight * loss, a scalar."""
    return torch.stack(list(weighted(losses, weights).values())).sum()
