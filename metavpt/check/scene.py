"""A problem at one point, on copies: the closures that every check evaluates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from metavpt.check import copies, modes
from metavpt.hypergradients import params, trees
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.estimators import Estimator, Hypergradient, InnerLoss, OneStep
from metavpt.hypergradients.linear_targets import DirectionalDerivative, LinearLoss
from metavpt.hypergradients.mixed_products import Product
from metavpt.hypergradients.optimizer_updates import Update
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, aligned_names, supports
from metavpt.strategies.learned import ReadsHeads, inner_loss
from metavpt.training.streams import Stream, meta_batches

NUM_BATCHES = 4  # as many as Unrolled(4) takes


@dataclass(frozen=True)
class Scene:
    """A problem at theta, with phi beside its value, and its first batches.

    phi is moved a little at random. Designers start on purpose where derivatives are special: a
    zero last layer hides all others, and a mask at the edge of its range has another slope on
    either side. `around` is the context of every evaluation of the user's code.
    """

    problem: Problem
    theta: Params
    phi: Params
    unlabelled: list[Any]
    labelled: Any
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(cls, problem: Problem, seed: int = 0) -> "Scene":
        """The scene of a twin of `problem`, its heads fitted."""
        twin = copies.twin(problem)
        stream, feedback = (
            Stream(meta_batches(twin), seed, "meta_batches"),
            Stream(twin.feedback_batches, seed, "feedback_batches"),
        )
        unlabelled = [next(stream) for _ in range(NUM_BATCHES)]
        labelled = next(feedback)
        twin.fit_heads()
        if supports(reader := cast(object, twin), ReadsHeads):
            reader.describe_heads(labelled)
        phi = params.named(twin.designer)
        nearby = params.add(params.detach(phi), random_direction(phi, seed)) if phi else {}
        return cls(twin, params.detach(params.named(twin.learner)), nearby, unlabelled, labelled)

    def double(self) -> "Scene":
        """The same in float64, whatever the user's code makes of it; see `modes.Float64`."""
        twin = copies.to_double(self.problem)
        theta = params.detach(params.named(twin.learner))
        phi = params.zip_with(Tensor.double, self.phi)
        unlabelled, labelled = (
            trees.map_tensors(_widen, batches) for batches in (self.unlabelled, self.labelled)
        )
        return Scene(twin, theta, phi, unlabelled, labelled, modes.Float64)

    def under(self, around: Callable[[], AbstractContextManager[Any]]) -> "Scene":
        """The same with `around` entered within what is entered already."""
        return replace(self, around=lambda: _both(self.around, around))

    @property
    def aligned(self) -> Params:
        """Return theta_S."""
        return {name: self.theta[name] for name in aligned_names(self.problem, self.theta)}

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of theta."""
        return next(iter(self.theta.values())).dtype

    @property
    def device(self) -> torch.device:
        """Return the device of theta."""
        return next(iter(self.theta.values())).device

    def task(self, phi: Params | None = None, batch: int = 0) -> Any:
        """Make the task of a batch."""
        with self.around():
            return functional_call(
                self.problem.designer, self.phi if phi is None else phi, (self.unlabelled[batch],)
            )

    def pretrain(self, theta_s: Params, task: Any) -> Tensor:
        """The whole pretraining loss at theta with theta_S = `theta_s`."""
        with self.around():
            return self.problem.pretrain_loss({**self.theta, **theta_s}, task)

    def feedback(self, theta_s: Params) -> Tensor:
        """Compute the feedback loss at theta_S."""
        with self.around():
            return self.problem.feedback_loss({**self.theta, **theta_s}, self.labelled)

    def inner(self, batch: int = 0) -> InnerLoss:
        """Return phi -> (theta_S -> pretraining loss), through the problem's tail."""
        inner = inner_loss(self.problem, self.theta, self.unlabelled[batch])

        def at_phi(phi: Params) -> Callable[[Params], Tensor]:
            with self.around():
                tail = inner(phi)
            # what it is must show: products and curvatures need to know
            if isinstance(tail, ComposedLoss):
                parts: dict[str, Any] = {
                    part.name: getattr(tail, part.name) for part in fields(tail)
                }
                return replace(
                    tail, **{name: self._within(f) for name, f in parts.items() if callable(f)}
                )
            if isinstance(tail, LinearLoss):
                return _LinearUnder(tail, self.around)
            return self._within(tail)

        return at_phi

    def _within(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same function, with `around` entered around it."""

        def within(at: Any) -> Any:
            with self.around():
                return function(at)

        return within

    def estimate(self, estimator: Estimator, update: Update | None = None) -> Hypergradient:
        """Estimate the hypergradient."""
        inner = [self.inner(k % NUM_BATCHES) for k in range(estimator.num_batches)]
        return estimator(inner, self.feedback, self.aligned, self.phi, update=update)

    def one_step(self, product: Product) -> Params:
        """-d<g_down, g_pre>/dphi by `product`, all in this scene's dtype."""
        return self.estimate(OneStep(product=product)).by_phi


@dataclass(frozen=True)
class _LinearUnder:
    """A `LinearLoss` with `around` entered around every evaluation."""

    loss: LinearLoss
    around: Callable[[], AbstractContextManager[Any]]

    @property
    def targets(self) -> Tensor:
        return self.loss.targets

    def __call__(self, theta: Params) -> Tensor:
        with self.around():
            return self.loss(theta)

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        with self.around():
            return self.loss.slopes(theta, w, derivative, absolute)


def random_direction(phi: Params, seed: int, scale: float = 0.02) -> Params:
    """Draw normal numbers of scale `scale`, or of a tenth of the tensor's RMS if larger."""
    generator = torch.Generator().manual_seed(seed)

    def draw(p: Tensor) -> Tensor:
        width = p.detach().float().square().mean().sqrt().mul(0.1).clamp_min(scale)
        return torch.randn(p.shape, generator=generator).to(p) * width.to(p)

    return params.zip_with(draw, params.detach(phi))


def cosine(x: Params, y: Params) -> float:
    """In float64; NaN where either is zero."""
    x, y = (params.zip_with(Tensor.double, params.detach(z)) for z in (x, y))
    return float(params.dot(x, y) / (params.norm(x) * params.norm(y)))


def relative_error(x: Params, truth: Params) -> float:
    """|x - truth| / |truth|, in float64."""
    x, truth = (params.zip_with(Tensor.double, params.detach(z)) for z in (x, truth))
    return float(params.norm(params.add(x, truth, alpha=-1.0)) / params.norm(truth))


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def _both(
    outer: Callable[[], AbstractContextManager[Any]],
    inner: Callable[[], AbstractContextManager[Any]],
) -> Iterator[None]:
    with outer(), inner():
        yield
