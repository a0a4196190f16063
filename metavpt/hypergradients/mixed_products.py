"""The derivative of <w, dL/dtheta>: the one product that every hypergradient is made of.

With respect to phi it is the mixed product, with respect to theta the Hessian product. Both ways of
taking it share one call:

    (by_theta, by_phi), value = product(loss, theta, w, (theta, phi))

`loss` maps parameters to a scalar and may hold a graph to phi (the designer's, and the trunk's that
ran once on its task).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError, UnreachedParameterError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params

Loss = Callable[[Params], Tensor]

UNUSED = "appears to not have been used"  # autograd's words for a tensor that nothing depends on


class Derivative(NamedTuple):
    """`by[i]` is d<w, dL/dtheta>/d wrt[i]; `value` is <w, dL/dtheta>, a detached scalar."""

    by: tuple[Params, ...]
    value: Tensor


class Product(Protocol):
    """d<w, dL/dtheta>/d wrt for each dict in `wrt`.

    Attributes:
        num_gradients: The cost in evaluations of dL/dtheta.
    """

    num_gradients: int

    def __call__(
        self,
        loss: Loss,
        theta: Params,
        w: Params,
        wrt: Sequence[Params],
        *,
        retain_graph: bool = False,
    ) -> Derivative:
        """Compute the product.

        Args:
            loss: theta -> loss. Its graph is freed unless `retain_graph`.
            theta: Parameters that require a gradient.
            w: The direction.
            wrt: Parameters to differentiate by, which require a gradient.
            retain_graph: Whether the graph of `loss` is kept.
        """
        ...


@dataclass(frozen=True)
class ExactProduct:
    """Double backward, in the dtype of theta.

    Fused attention has no second derivative, so attention runs unfused inside (pytorch #116350).
    """

    num_gradients = 2

    def __call__(
        self,
        loss: Loss,
        theta: Params,
        w: Params,
        wrt: Sequence[Params],
        *,
        retain_graph: bool = False,
    ) -> Derivative:
        """Compute the product, see `Product`."""
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            gradient = differentiate(loss(theta), (theta,), create_graph=True)[0]
            value = params.dot(w, gradient)
            return Derivative(differentiate(value, wrt, retain_graph=retain_graph), value.detach())


@dataclass(frozen=True)
class DifferenceProduct:
    """The central difference (dL(theta + eps w) - dL(theta - eps w)) / (2 eps).

    It uses first-order autodiff only. The trunk, held in `loss`, runs once; what depends on theta
    runs twice. Fused attention stays as it is. The step is relative, eps |w| = relative_step
    |theta|, so that scaling w or theta changes only the scale. The error is O(relative_step^2) from
    truncation and O(machine eps / relative_step) from rounding, which balance near the cube root of
    the machine epsilon. `relative_step=None` takes a fifth of that, in the dtype that the loss is
    computed in: the losses of transformers bend on a scale shorter than |theta|, and a fifth was
    more exact there, in float32 and in float64.
    """

    relative_step: float | None = None
    num_gradients = 1

    def __post_init__(self) -> None:
        if self.relative_step is not None and not self.relative_step > 0:
            raise MetaVPTError(
                f"relative_step={self.relative_step}: the step of a difference must be positive"
            )

    def __call__(
        self,
        loss: Loss,
        theta: Params,
        w: Params,
        wrt: Sequence[Params],
        *,
        retain_graph: bool = False,
    ) -> Derivative:
        """Compute the product, see `Product`."""
        with torch.enable_grad():
            slope, scale = central_difference(loss, theta, w, self.relative_step)
            by = differentiate(slope, wrt, retain_graph=retain_graph)
            return Derivative(
                tuple(params.scale(group, scale) for group in by), slope.detach() * scale
            )


def central_difference(
    fn: Callable[[Params], Tensor], theta: Params, w: Params, relative_step: float | None = None
) -> tuple[Tensor, float]:
    """Take the derivative of `fn` at theta along w / scale by a central difference.

    `scale` is the power of two for which the largest entry of w / scale lies in [1/2, 1). Scaling
    by it is exact, and no length of w, zero included, leaves the range of the dtype.

    Args:
        fn: Maps parameters to a tensor of any shape.
        theta: Where to differentiate. Where all of it is zero, the step is absolute.
        w: The direction, shaped like `theta`.
        relative_step: As in `DifferenceProduct`.

    Returns:
        The derivative along w / scale, and scale. Their product is the derivative along w.
    """
    first = next(iter(theta.values()))
    with torch.no_grad():
        largest = max(float(torch.linalg.vector_norm(p, math.inf)) for p in w.values() if p.numel())
        scale = 2.0 ** math.frexp(largest)[1]
        w = params.zip_with(lambda p: p / scale, w)
        length = params.norm(theta)
        length = torch.where(length > 0, length, torch.ones_like(length))
        step = (relative_step or default_relative_step(first)) * length
        step = step / params.norm(w).clamp_min(0.5)  # below 0.5 w is zero
    above, below = fn(params.add(theta, w, alpha=step)), fn(params.add(theta, w, alpha=-step))
    return (above - below) / (2 * step), scale


def default_relative_step(p: Tensor) -> float:
    """Return a fifth of the cube root of the machine epsilon.

    The dtype is that of p, or autocast's if it is on, since it rounds p for the loss.
    """
    device = p.device.type
    dtype = (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and p.dtype == torch.float32
        else p.dtype
    )
    return torch.finfo(dtype).eps ** (1 / 3) / 5


def differentiate(
    value: Tensor, wrt: Sequence[Params], *, create_graph: bool = False, retain_graph: bool = False
) -> tuple[Params, ...]:
    """Compute d value / d wrt, one dict for each in `wrt`.

    Raises:
        UnreachedParameterError: `value` does not depend on a tensor. The message names it.
    """
    names = [name for group in wrt for name in group]
    inputs = [p for group in wrt for p in group.values()]
    if not value.requires_grad:
        raise UnreachedParameterError(_unreached(names))
    try:
        gradients = torch.autograd.grad(
            value, inputs, create_graph=create_graph, retain_graph=retain_graph or create_graph
        )
    except RuntimeError as error:
        if UNUSED not in str(error):
            raise
        missing = [name for name, p in zip(names, inputs, strict=True) if not _reaches(value, p)]
        raise UnreachedParameterError(_unreached(missing)) from None
    flat = iter(gradients)
    return tuple({name: next(flat) for name in group} for group in wrt)


def value_and_gradient(
    loss: Loss, theta: Params, name: str = "pretraining"
) -> tuple[Tensor, Params]:
    """Compute L and dL/dtheta, detached.

    The graph to phi that `loss` holds stays: what is freed lies between theta and the value, and
    each call makes that anew.

    Args:
        loss: theta -> scalar.
        theta: where the gradient is taken.
        name: of the loss, for the error.

    Returns:
        The value and its gradient, zero for a parameter that the loss does not use (a projection
        head in a feedback loss).

    Raises:
        UnreachedParameterError: the loss uses no parameter in `theta`.
    """
    theta = params.leaves(theta)
    with torch.enable_grad():
        value = loss(theta)
    check_reached(value, theta, name)
    gradients = torch.autograd.grad(value, list(theta.values()), materialize_grads=True)
    return value.detach(), dict(zip(theta, gradients, strict=True))


def check_reached(value: Tensor, theta: Params, name: str) -> None:
    """Raise UnreachedParameterError if the loss `value` depends on none of the leaves `theta`."""
    leaves = {id(p) for p in theta.values()}
    pending, seen = [value.grad_fn], set[object]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in leaves:
            return
        seen.add(node)
        pending += [parent for parent, _ in node.next_functions]
    raise UnreachedParameterError(
        f"the {name} loss depends on none of the parameters that it is given "
        f"({_listed(list(theta))}): "
        "its gradient would be a silent zero. Use them in the loss, "
        "functional_call(model, theta, inputs) instead of model(inputs)"
    )


def reached(loss: Loss, theta: Params) -> list[str]:
    """Return the names of the parameters that `loss` depends on."""
    theta = params.leaves(theta)
    with torch.enable_grad():
        value = loss(theta)
    if not value.requires_grad:
        return []
    gradients: Any = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
    return [name for name, grad in zip(theta, gradients, strict=True) if grad is not None]


def _reaches(value: Tensor, p: Tensor) -> bool:
    """Whether there is a path from p to `value`.

    That its buffers have been freed by now is another error than that there is none.
    """
    try:
        torch.autograd.grad(value, p, retain_graph=True)
    except RuntimeError as error:
        return UNUSED not in str(error)
    return True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _unreached(names: list[str]) -> str:
    return (
        f"the pretraining loss does not depend on {_listed(names)}: its hypergradient would be a "
        "silent zero. "
        "Use the parameter in the task, drop it from the designer, or look for a no_grad or "
        "detach on the way to the loss"
    )
