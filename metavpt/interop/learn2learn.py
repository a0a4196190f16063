"""The truncated unroll of SGD by learn2learn's MAML: clone, adapt, backpropagate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Hypergradient, InnerLoss, OuterLoss
from metavpt.hypergradients.mixed_products import Loss
from metavpt.hypergradients.optimizer_updates import Update
from metavpt.hypergradients.params import Params
from metavpt.interop import backpropagated, peer


@dataclass(frozen=True)
class MAMLUnroll:
    """dL_down(theta_K(phi))/dphi through K = `num_steps` plain steps, as `Unrolled(K, SGD(lr))`.

    learn2learn has no other inner optimizer. The graph of all steps is kept: memory grows with K.
    """

    num_steps: int = 4
    lr: float = 1e-3
    needs_update = False

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.lr > 0:
            raise MetaVPTError(
                f"MAMLUnroll: num_steps={self.num_steps} must be at least 1 and lr={self.lr} "
                "positive"
            )

    @property
    def num_batches(self) -> int:
        """Return K."""
        return self.num_steps

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
            # allow_unused is for theta: what the loss does not reach stays as it is. That phi is
            # reached, `differentiate` checks.
            maml = peer("learn2learn").algorithms.MAML(Holder(theta), lr=self.lr, allow_unused=True)
            adapted = maml.clone()
            for inner in inner_losses:
                adapted.adapt(adapted(inner(phi)))
            return backpropagated(outer_loss, theta, adapted.module.theta, phi, self.num_steps)


class Holder(nn.Module):
    """A module that holds parameters under any names; its forward is a loss of them.

    No memory is copied.
    """

    def __init__(self, theta: Params) -> None:
        super().__init__()
        self.names = list(theta)
        for i, p in enumerate(theta.values()):  # a parameter's name may not hold a dot
            self.register_parameter(str(i), nn.Parameter(p.detach()))

    @property
    def theta(self) -> Params:
        """Return the parameters by name."""
        return dict(zip(self.names, self.parameters(), strict=True))

    def forward(self, loss: Loss) -> Tensor:
        """Compute a loss of the parameters."""
        return loss(self.theta)
