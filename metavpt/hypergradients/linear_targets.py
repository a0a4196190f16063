"""The product for losses that are linear in the task's targets.

The designer's gradient then needs no backward pass through the learner:

    L(theta) = <q, cost(theta)>   =>   <w, dL/dtheta> = <q, d cost/dtheta [w]>

Only q holds the graph to phi, so one derivative of the costs along w, by forward passes through the
tail, gives the whole product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError
from metavpt.hypergradients.mixed_products import (
    Derivative,
    DifferenceProduct,
    Loss,
    Product,
    central_difference,
    differentiate,
)
from metavpt.hypergradients.params import Params


class DirectionalDerivative(Protocol):
    """d fn(theta + t w) / dt at t = 0, detached; `fn` maps parameters to a tensor of any shape."""

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor:
        """Compute d fn(theta + t w) / dt at t = 0, detached."""
        ...


@dataclass(frozen=True)
class ForwardMode:
    """Exact, by forward-mode autodiff, also in half precision.

    Attention runs unfused inside, since its fused kernels have no forward mode. The result must not
    be differentiated again: through layer_norm that would be silently wrong.
    """

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor:
        """Compute the derivative."""
        theta, w = ({name: p.detach() for name, p in tree.items()} for tree in (theta, w))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(fn, (theta,), (w,))[1].detach()


@dataclass(frozen=True)
class CentralDifference:
    """(fn(theta + eps w) - fn(theta - eps w)) / (2 eps), with the step of `DifferenceProduct`.

    Attention stays fused. It takes two forward passes, where forward mode costs more than three.
    Half precision leaves few digits of the difference: use `ForwardMode` there.
    """

    relative_step: float | None = None

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor:
        """Compute the derivative."""
        with torch.no_grad():
            slope, scale = central_difference(fn, theta, w, self.relative_step)
            return slope * scale


@runtime_checkable
class LinearLoss(Protocol):
    """A loss <targets, cost(theta)>. `targets` alone holds a graph to phi.

    `slopes` is d cost/dtheta [w], detached and of the shape of `targets`. Where `absolute` is False
    it may leave out what the targets cannot change, if that is cheaper: then <targets, slopes> is
    the value over that of the ordinary recipe.
    """

    @property
    def targets(self) -> Tensor:
        """Return q, which alone holds a graph to phi."""
        ...

    def __call__(self, theta: Params) -> Tensor:
        """Compute <targets, cost(theta)>."""
        ...

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        """Compute the derivative of the costs along w, with the shape of the targets."""
        ...


@dataclass(frozen=True)
class LinearProduct:
    """d<q, d cost/dtheta [w]>/d phi by a backward pass through the designer only.

    Needs a `LinearLoss`, and works with any direction. It costs forward passes through the tail,
    and counts as one gradient. If the derivative by theta is needed too (`Implicit`, `Unrolled`),
    linearity does not help, and `general` computes the product.

    Args:
        derivative: The derivative of the costs: exact by default, cheaper by `CentralDifference`.
        general: The product for other losses and for derivatives by theta.
        absolute: False: `Derivative.value` may be relative to the recipe's, where that saves a pass
            (see `LinearLoss`). `by` is the same.
    """

    derivative: DirectionalDerivative = field(default_factory=ForwardMode)
    general: Product = field(default_factory=DifferenceProduct)
    absolute: bool = True
    num_gradients = 1

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
        own = {id(p) for p in theta.values()}
        if any(id(p) in own for group in wrt for p in group.values()):
            return self.general(loss, theta, w, wrt, retain_graph=retain_graph)
        if not isinstance(loss, LinearLoss):
            raise MetaVPTError(
                "LinearProduct: the pretraining loss must be linear in its targets; return a "
                "LinearLoss from pretrain_tail, "
                "or use DifferenceProduct"
            )
        slopes = loss.slopes(theta, w, self.derivative, self.absolute)
        with torch.enable_grad():
            value = (loss.targets * slopes).sum()
            return Derivative(differentiate(value, wrt, retain_graph=retain_graph), value.detach())
