"""Ridge regression with log penalties as the designer: all hypergradients have a closed form.

inner  L(theta; phi) = |X theta - y|^2 / (2 n) + sum_j exp(phi_j) theta_j^2 / 2          outer
F(theta) = |V theta - z|^2 / (2 m)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metavpt.hypergradients.params import Params


@dataclass
class Ridge:
    x: Tensor
    y: Tensor
    v: Tensor
    z: Tensor
    phi: Params

    @classmethod
    def random(cls, num_features: int = 6, seed: int = 0) -> "Ridge":
        g = torch.Generator().manual_seed(seed)
        x, v = (torch.randn(20, num_features, generator=g, dtype=torch.float64) for _ in range(2))
        y, z = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
        return cls(
            x,
            y,
            v,
            z,
            {"log_penalty": 0.3 * torch.randn(num_features, generator=g, dtype=torch.float64)},
        )

    def inner(self, phi: Params):
        return lambda theta: (
            ((self.x @ theta["theta"] - self.y) ** 2).mean() / 2
            + (phi["log_penalty"].exp() * theta["theta"] ** 2).sum() / 2
        )

    def outer(self, theta: Params) -> Tensor:
        return ((self.v @ theta["theta"] - self.z) ** 2).mean() / 2

    def hessian(self, phi: Params | None = None) -> Tensor:
        phi = phi or self.phi
        return self.x.T @ self.x / len(self.x) + torch.diag(phi["log_penalty"].exp())

    def solution(self, phi: Params | None = None) -> Params:
        return {"theta": torch.linalg.solve(self.hessian(phi), self.x.T @ self.y / len(self.x))}

    def g_down(self, theta: Params) -> Tensor:
        return self.v.T @ (self.v @ theta["theta"] - self.z) / len(self.v)

    def hypergradient(self) -> Tensor:
        """dF(theta*(phi))/dphi = -(exp(phi) * theta*) * (H^-1 g_down)."""
        theta = self.solution()
        adjoint = torch.linalg.solve(self.hessian(), self.g_down(theta))
        return -self.phi["log_penalty"].exp() * theta["theta"] * adjoint
