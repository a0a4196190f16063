"""The truncated unroll by TorchOpt's differentiable optimizers and plain backpropagation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Hypergradient, InnerLoss, OuterLoss
from metavpt.hypergradients.optimizer_updates import SGD, Adam, Rule, Update
from metavpt.hypergradients.params import Params
from metavpt.hypergradients.trajectory import Unroll
from metavpt.interop import backpropagated, peer


@dataclass(frozen=True)
class TorchOptUnroll(Unroll):
    """dL_down(theta_K(phi))/dphi, as `Unrolled`, through the graph of all K = `num_steps` steps.

    Memory grows with K. TorchOpt's Adam differentiates sqrt(0) where an entry never had a gradient;
    that raises NonFiniteError.
    """

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update | None = None,
        start: Params | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient through K batches."""
        phi = params.leaves(phi)
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            update = self.begin(theta, phi, update)
            steppers = {name: _Stepper(update, name) for name in theta}
            after = params.leaves(theta)
            for inner in inner_losses:
                gradients = torch.autograd.grad(
                    inner(phi)(after),
                    list(after.values()),
                    create_graph=True,
                    materialize_grads=True,
                )
                clipped = update.rule.clip(dict(zip(after, gradients, strict=True)))
                after = {name: steppers[name](p, clipped[name]) for name, p in after.items()}
            return backpropagated(outer_loss, theta, after, phi, self.num_steps)


class _Stepper:
    """TorchOpt's update of one parameter; parameter groups differ in their options."""

    def __init__(self, update: Update, name: str) -> None:
        self.transform = _transform(update.rule.of(name))
        p, moments, num_steps = (
            update.theta[name].detach(),
            update.state.moments[name],
            update.state.num_steps[name],
        )
        if num_steps:
            # TorchOpt's SGD keeps "no step taken yet" in the transform, not in its state: without
            # this the first step would forget momentum
            self.transform.update(
                [torch.zeros_like(p)], self.transform.init([p]), params=[p], inplace=False
            )
        self.state = tuple(
            _filled(part, moments, num_steps, p.dtype) for part in self.transform.init([p])
        )

    def __call__(self, p: Tensor, gradient: Tensor) -> Tensor:
        (change,), self.state = self.transform.update(
            [gradient], self.state, params=[p], inplace=False
        )
        return p + change


def _transform(rule: Rule) -> Any:
    torchopt = peer("torchopt")
    if isinstance(rule, SGD):
        return torchopt.sgd(
            rule.lr, rule.momentum, rule.dampening, rule.weight_decay, rule.nesterov
        )
    if isinstance(rule, Adam):
        make = torchopt.adamw if rule.decoupled_weight_decay else torchopt.adam
        return make(rule.lr, rule.betas, rule.eps, rule.weight_decay)
    raise MetaVPTError(
        f"TorchOptUnroll: has no counterpart of {type(rule).__name__}; use SGD, Adam or AdamW"
    )


def _filled(part: Any, moments: Params, num_steps: int, dtype: torch.dtype) -> Any:
    """Fill one part of TorchOpt's chained state with our moments."""
    if hasattr(part, "mu"):
        # TorchOpt counts in int64, and so takes 1 - beta^count in float32 whatever the dtype of
        # theta: 1e-5 off at beta2 = 0.999
        count = torch.tensor(num_steps, dtype=dtype, device=moments["exp_avg"].device)
        return part._replace(mu=[moments["exp_avg"]], nu=[moments["exp_avg_sq"]], count=[count])
    return part._replace(trace=[moments["momentum_buffer"]]) if hasattr(part, "trace") else part
