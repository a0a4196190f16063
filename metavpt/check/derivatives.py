"""Mixed products compared with finite differences in phi of <w, g_pre>.

They show whether a hypergradient is the derivative of the loss that is trained on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from metavpt.check.finding import Finding
from metavpt.check.modes import Uncut
from metavpt.check.scene import Scene, cosine, random_direction, relative_error
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import downstream
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    Product,
    value_and_gradient,
)
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem

NUM_DIRECTIONS = 2
JUMPS = (
    "the task jumps with phi (rounding, top-k, a straight-through estimator): "
    "finite differences cannot judge this designer"
)
# by whether they are in float64: steps in phi, from long to short, and the relative error that an
# exact derivative is allowed
STEPS = {True: ((1e-3, 1e-4, 1e-5, 1e-6), 1e-4), False: ((1.0, 0.3, 0.1), 5e-2)}
UNSMOOTH = 0.1  # relative: a difference whose steps agree no better than this judges nothing


class Slope(NamedTuple):
    """A finite difference along a direction, and how far two of its steps disagree."""

    value: float
    uncertainty: float


@dataclass(frozen=True)
class Differences:
    """The slopes of a function of phi along some directions, by finite differences.

    Attributes:
        directions: In phi.
        slopes: One for each direction.
        tolerance: The relative error that an exact derivative is allowed.
    """

    directions: list[Params]
    slopes: list[Slope]
    tolerance: float

    def error(self, by_phi: Params) -> float:
        """The largest relative disagreement of `by_phi` with the differences."""
        return max(error for error, _ in self._errors(by_phi))

    def agrees(self, by_phi: Params, tolerance: float | None = None) -> bool:
        """Return whether they differ by at most `tolerance` and the differences' uncertainty."""
        allowed = self.tolerance if tolerance is None else tolerance
        return all(
            error <= allowed + 3 * uncertainty for error, uncertainty in self._errors(by_phi)
        )

    def _errors(self, by_phi: Params) -> list[tuple[float, float]]:
        """Return error and uncertainty of the difference for each direction, both relative."""
        norm = params.norm(by_phi)
        count = sum(p.numel() for p in by_phi.values())
        errors = []
        for direction, slope in zip(self.directions, self.slopes, strict=True):
            along = float(params.dot(by_phi, direction))
            # along a random direction a slope can vanish by chance: never divide by less than a
            # tenth of its usual size
            usual = 0.1 * float(norm * params.norm(direction)) / count**0.5
            scale = max(abs(along), abs(slope.value), usual, 1e-300)
            errors.append((abs(along - slope.value) / scale, slope.uncertainty / scale))
        return errors

    @property
    def is_smooth(self) -> bool:
        """Return whether the finite differences are certain enough."""
        return all(
            slope.uncertainty <= UNSMOOTH * abs(slope.value) or slope.value == 0
            for slope in self.slopes
        )

    def is_flat(self, by_phi: Params) -> bool:
        """Return whether the loss is constant where `by_phi` is not zero: a surrogate gradient."""
        along = [abs(float(params.dot(by_phi, direction))) for direction in self.directions]
        return max(abs(slope.value) for slope in self.slopes) <= 1e-6 * max(along)


def differences(
    value: Callable[[Params], float], phi: Params, dtype: torch.dtype, seed: int = 0
) -> Differences:
    """Measure the slopes of `value` at `phi` along random directions.

    Steps shrink until two of them agree, so that kinks (of a clamp, a ReLU) are passed by.

    Args:
        value: A function of phi.
        phi: Where.
        dtype: What `value` computes in.
        seed: Of the directions.
    """
    steps, tolerance = STEPS[dtype == torch.float64]

    def slope(direction: Params) -> Slope:
        def at(step: float) -> float:
            return value(params.add(phi, direction, alpha=step))

        values = ((at(step) - at(-step)) / (2 * step) for step in steps)
        found = []
        for longer, shorter in pairwise(values):
            found.append(Slope(shorter, abs(longer - shorter)))
            if found[-1].uncertainty <= tolerance / 10 * abs(shorter):
                break
        return min(found, key=lambda slope: slope.uncertainty)

    directions = [random_direction(phi, seed + 10 + k) for k in range(NUM_DIRECTIONS)]
    return Differences(directions, [slope(direction) for direction in directions], tolerance)


@dataclass(frozen=True)
class Reference(Differences):
    """The finite differences of <w, g_pre>(phi) that products are held against."""

    scene: Scene
    w: Params

    @classmethod
    def of(cls, scene: Scene, w: Params | None = None, seed: int = 0) -> "Reference":
        """Compute the finite differences of a scene."""
        direction = downstream(scene.feedback, scene.aligned)[1] if w is None else w

        def value(phi: Params) -> float:
            with torch.no_grad():
                task = scene.task(phi)
            _, gradient = value_and_gradient(
                lambda theta: scene.pretrain(theta, task), scene.aligned
            )
            return float(params.dot(direction, gradient))

        found = differences(value, scene.phi, scene.dtype, seed)
        return cls(found.directions, found.slopes, found.tolerance, scene, direction)

    @cached_property
    def exact(self) -> Params:
        """Return the exact product."""
        return self.by(ExactProduct())

    def by(self, product: Product) -> Params:
        """d<w, g_pre>/dphi by `product`."""
        theta, phi = params.leaves(self.scene.aligned), params.leaves(self.scene.phi)
        with torch.enable_grad():
            loss = self.scene.inner()(phi)
        return params.detach(product(loss, theta, self.w, (phi,)).by[0])

    def hessian_error(self, product: Product) -> float:
        """Compare d<w, g_pre>/dtheta, as Implicit and Unrolled use it, with a difference."""
        theta = params.leaves(self.scene.aligned)
        with torch.no_grad():
            loss = self.scene.inner()(self.scene.phi)
        by_theta = params.detach(product(loss, theta, self.w, (theta,)).by[0])
        # along the product itself: a random direction in so many dimensions would be all but
        # orthogonal to it
        direction = params.scale(
            by_theta,
            1e-3 * params.norm(params.detach(theta)) / params.norm(by_theta).clamp_min(1e-30),
        )
        sides = [
            value_and_gradient(loss, params.add(params.detach(theta), direction, alpha=side))[1]
            for side in (1.0, -1.0)
        ]
        along, slope = (
            float(params.dot(by_theta, direction)),
            float(params.dot(self.w, params.add(sides[0], sides[1], alpha=-1.0))) / 2,
        )
        return abs(along - slope) / max(abs(along), abs(slope), 1e-300)


def check_product(
    product: Product, problem: Problem, name: str = "product", seed: int = 0
) -> Finding:
    """Compare a `Product` with finite differences in phi, in float64 if the code allows it."""
    with torch.random.fork_rng():
        scene = Scene.of(problem, seed)
        try:
            wide = scene.double()
            wide.inner()(wide.phi)(wide.aligned)
        except Exception:
            wide = scene
        reference, _ = settle(Reference.of(wide))
        return compare(name, product, reference)


def compare(name: str, product: Product, reference: Reference) -> Finding:
    """`product` against the differences, and where it can be had against double backward."""
    kind = type(product).__name__
    by_phi = reference.exact if isinstance(product, ExactProduct) else reference.by(product)
    error = reference.error(by_phi)
    dtype = str(reference.scene.dtype).removeprefix("torch.")
    measured = (
        f"{kind} against finite differences in phi, {dtype}: relative error {error:.1e} "
        f"along {NUM_DIRECTIONS} directions"
    )
    if not isinstance(product, ExactProduct):
        exact = reference.exact
        apart = relative_error(by_phi, exact)
        measured += f"; against ExactProduct cosine {cosine(by_phi, exact):.6f}, "
        measured += f"relative error {apart:.1e}"
    if not isinstance(product, (ExactProduct, DifferenceProduct)):
        hessian_error = reference.hessian_error(product)
        measured += f"; by theta {hessian_error:.1e}"
        if not hessian_error <= 10 * reference.tolerance:
            return Finding(name, "failed", measured, _advice(product))
    if not params.is_finite(by_phi):
        return Finding(
            name, "failed", measured + "; not finite", "look for sqrt(0), 0/0 or log(0) in the loss"
        )
    # the difference product has an error of its own that a user cannot mend here; its step is
    # judged by `difference_step`
    if reference.agrees(
        by_phi, max(reference.tolerance, 1e-3) if isinstance(product, DifferenceProduct) else None
    ):
        return Finding(name, "ok", measured)
    if not reference.is_smooth or reference.is_flat(by_phi):
        return Finding(name, "warning", measured, JUMPS)
    return Finding(name, "failed", measured, _advice(product))


def _advice(product: Product) -> str:
    if isinstance(product, (ExactProduct, DifferenceProduct)):
        return (
            "look for .data, .item(), numpy, in-place changes or a custom autograd.Function "
            "between the designer and the loss"
        )
    return (
        "use ExactProduct or DifferenceProduct; forward mode (torch.func.jvp) differentiated "
        "once more "
        "is silently wrong through LayerNorm and BatchNorm"
    )


def settle(reference: Reference) -> tuple[Reference, Finding]:
    """Find a complete reference, and whether no_grad or detach cuts part of it.

    Finite differences see everything that phi changes, a no_grad teacher's targets included;
    autograd sees what no_grad and detach do not cut. If the two disagree, and agree once the cut is
    undone, the cut is the whole difference.
    """
    name = "teacher_credit"
    plain = reference.exact
    if reference.agrees(plain):
        return reference, Finding(
            name, "ok", "nothing on the way from phi to the loss is cut by no_grad or detach"
        )
    if not reference.is_smooth or reference.is_flat(plain):
        return reference, Finding(name, "ok", "not measured: " + JUMPS)
    chosen = getattr(reference.scene.problem, "teacher_credit", None) is False
    for whole in [_credited(reference)] * chosen + [_under(reference, Uncut)]:
        if (by_phi := _whole(whole)) is None:
            continue
        measured = (
            f"part of the dependence on phi is cut: relative error {reference.error(plain):.2g} "
            "against finite differences, "
            f"{whole.error(by_phi):.1e} without the cut, cosine of the two "
            f"{cosine(plain, by_phi):.3f}"
        )
        if chosen:
            return whole, Finding(name, "ok", measured + "; by choice (teacher_credit=False)")
        advice = (
            "drop the no_grad (freezing a teacher's parameters is enough), or declare it: "
            "give the problem teacher_credit = False"
        )
        return whole, Finding(name, "failed", measured, advice)
    if chosen:
        measured = (
            "teacher_credit=False, but undoing no_grad and detach leaves a relative error of "
            f"{reference.error(plain):.2g}"
        )
        return reference, Finding(
            name, "warning", measured, "more than the teacher's part is missing: see exact_product"
        )
    return reference, Finding(
        name, "ok", "no_grad and detach do not explain the disagreement with finite differences"
    )


def _whole(reference: Reference) -> Params | None:
    """Return the exact product without the cut, if it agrees. Undoing a cut may break the code."""
    try:
        by_phi = reference.exact
    except Exception:
        return None
    return by_phi if reference.agrees(by_phi) else None


def _credited(reference: Reference) -> Reference:
    problem: Any = copy(reference.scene.problem)
    problem.teacher_credit = True
    return replace(reference, scene=replace(reference.scene, problem=problem))


def _under(reference: Reference, around: Callable[[], AbstractContextManager[Any]]) -> Reference:
    return replace(reference, scene=reference.scene.under(around))
