"""Random directions, for the controls of strategies that follow a feedback gradient."""

from typing import Any

import torch
from torch import Tensor

from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params


class RandomDirection:
    """Draws random vectors. They take the place of g_down: equal norm, no feedback."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def like(self, vector: Params) -> Params:
        """Draw a random vector of the shape and norm of `vector`."""
        noise = params.zip_with(self._draw, vector)
        return params.scale(noise, params.norm(vector) / params.norm(noise))

    def _draw(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=like.dtype)
        return drawn.to(like.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.set_state(state["generator"])
