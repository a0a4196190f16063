"""The matrix of implicit differentiation: the Hessian of the loss, or its Gauss-Newton part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import Loss, Product
from metavpt.hypergradients.params import Params


@dataclass(frozen=True)
class ComposedLoss:
    """theta -> criterion(outputs(theta)), a loss whose parts are known, as Gauss-Newton needs.

    Attributes:
        outputs: theta -> outputs.
        criterion: outputs -> loss.
        at: theta -> this loss as a step at that theta takes it, where the criterion holds what the
            student says there, such as the weights of a policy. Until then it holds what it says
            at the theta that the loss was made at. None: it holds nothing.
    """

    outputs: Callable[[Params], Tensor]
    criterion: Callable[[Tensor], Tensor]
    at: "Callable[[Params], ComposedLoss] | None" = field(default=None, kw_only=True)

    def __call__(self, theta: Params) -> Tensor:
        """Compute the loss."""
        return self.criterion(self.outputs(theta))


def at_step(loss: Loss, theta: Params) -> Loss:
    """Return `loss` as a step at `theta` takes it, see `ComposedLoss.at`.

    What it then holds is differentiable by phi and by `theta`.
    """
    at = getattr(loss, "at", None)
    return loss if at is None else at(theta)


class Curvature(Protocol):
    """v -> A v for the curvature A of `loss` at theta; `product` is the estimator's own."""

    def __call__(self, loss: Loss, theta: Params, v: Params, product: Product) -> Params:
        """Compute A v.

        Args:
            loss: The pretraining loss.
            theta: The parameters.
            v: The vector.
            product: The mixed product of the estimator.
        """
        ...


@dataclass(frozen=True)
class Hessian:
    """A = d2L/dtheta2: exact, and indefinite away from a minimum."""

    def __call__(self, loss: Loss, theta: Params, v: Params, product: Product) -> Params:
        """Compute A v."""
        return product(loss, theta, v, (theta,)).by[0]


@dataclass(frozen=True)
class GaussNewton:
    """A = J^T H_out J with J = d outputs / d theta and H_out the Hessian of the criterion.

    Positive semi-definite wherever the criterion is convex in its outputs, as cross-entropy is in
    logits (Schraudolph, 2002). Needs a `ComposedLoss`. It uses reverse mode only: forward mode
    through a norm cannot be trusted to be differentiated (see the check command).

    Args:
        otherwise: The curvature of a loss that is not a `ComposedLoss`. None: such a loss is an
            error.
    """

    otherwise: Curvature | None = None

    def __call__(self, loss: Loss, theta: Params, v: Params, product: Product) -> Params:
        """Return A v, exact."""
        if not isinstance(loss, ComposedLoss):
            if self.otherwise is not None:
                return self.otherwise(loss, theta, v, product)
            raise MetaVPTError(
                "GaussNewton: the pretraining loss must be a ComposedLoss(outputs, criterion); "
                "return one from pretrain_tail"
            )
        theta = params.leaves(theta)
        leaves = list(theta.values())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            outputs = loss.outputs(theta)
            # J v without forward mode: u -> J^T u is linear, and its derivative along v is J v
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, leaves, u, create_graph=True, materialize_grads=True
            )
            (pushed,) = torch.autograd.grad(
                params.dot(dict(zip(theta, pulled, strict=True)), v), u, retain_graph=True
            )
            at = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss.criterion(at), at, create_graph=True)
            (bent,) = torch.autograd.grad(slope, at, pushed)
            return dict(
                zip(
                    theta,
                    torch.autograd.grad(outputs, leaves, bent, materialize_grads=True),
                    strict=True,
                )
            )
