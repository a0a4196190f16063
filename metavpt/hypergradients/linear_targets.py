"""The product for losses that are linear in the task's targets, where the designer's gradient needs no backward pass through the learner.

    L(theta) = <q, cost(theta)>   =>   <w, dL/dtheta> = <q, d cost/dtheta [w]>

With q alone holding the graph to phi, one derivative of the costs along w, forward passes through
the tail, gives the whole product.
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

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor: ...


@dataclass(frozen=True)
class ForwardMode:
    """Exact, by forward-mode autodiff, in half precision too. Attention runs unfused inside: its fused kernels have no forward mode.

    Not to be differentiated again: through layer_norm that would be silently wrong.
    """

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor:
        theta, w = ({name: p.detach() for name, p in tree.items()} for tree in (theta, w))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(fn, (theta,), (w,))[1].detach()


@dataclass(frozen=True)
class CentralDifference:
    """(fn(theta + eps w) - fn(theta - eps w)) / (2 eps), with the step of `DifferenceProduct`; attention stays fused.

    Two forward passes, where forward mode costs more than three. Half precision leaves few digits
    of the difference: there `ForwardMode`.
    """

    relative_step: float | None = None

    def __call__(self, fn: Callable[[Params], Tensor], theta: Params, w: Params) -> Tensor:
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
    def targets(self) -> Tensor: ...

    def __call__(self, theta: Params) -> Tensor: ...

    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor: ...


@dataclass(frozen=True)
class LinearProduct:
    """d<q, d cost/dtheta [w]>/d phi by backward through the designer alone. Needs a `LinearLoss`, and goes with any direction.

    Its cost is that of forward passes through the tail; it is counted as one gradient. Where the
    derivative by theta is asked for too (`Implicit`, `Unrolled`), linearity is of no help and
    `general` takes the product.

    derivative  of the costs: exact by default, cheaper by `CentralDifference`
    absolute    False: `Derivative.value` may be that over the ordinary recipe, where that saves a
    pass (see `LinearLoss`); `by` is the same
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
