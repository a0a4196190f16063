"""Targets chosen without a designer: those that are best for the feedback within a trust region, in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import Combination
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction
from metavpt.hypergradients.linear_targets import DirectionalDerivative, ForwardMode
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.strategies.learned import Proposal
from metavpt.strategies.selection import Greedy
from metavpt.training.budget import Budget
from metavpt.training.streams import Streams


class Tilt(Greedy):
    """The recipe's targets tilted towards the candidates of highest first-order value; nothing is learned.

    For next tokens see `target_task.Tilted`, for the teacher's prototypes `prototypes.tilted`.

    gate       alpha: the share that is taken from the recipe's target
    tau        how far: the mean KL divergence from what is tilted is about 1 / (2 tau^2). 0: the best candidate alone, greedy
    ema        decay of the moving average of g_down, which is refreshed every `meta_every` steps
    direction  from g_down to w, `Dot` by default

    The candidates' value is that at the learner's parameters of the step itself: it costs forward passes through the tail, within the loss.
    """

    def __init__(
        self,
        gate: float = 0.5,
        tau: float = 1.0,
        num_candidates: int = 64,
        meta_every: int = 8,
        burn_in: int = 0,
        ema: float = 0.8,
        direction: Direction | None = None,
        derivative: DirectionalDerivative | None = None,
        combination: Combination | None = None,
    ) -> None:
        super().__init__(num_candidates, direction, meta_every, burn_in, combination)
        check_gate(gate)
        if tau < 0 or not 0 <= ema < 1:
            raise MetaVPTError(f"strategy: tau={tau} must not be negative and ema={ema} in [0, 1)")
        self.gate, self.tau, self.ema = gate, tau, ema
        self.derivative = derivative or ForwardMode()

    def propose(
        self, problem: Problem, batch: Any, theta: Params, w: Params, budget: Budget
    ) -> Proposal:
        plain = self.without_feedback(problem, batch)
        return plain._replace(
            task=problem.tilt(
                theta, plain.task, w, self.gate, self.tau, self.num_candidates, self.derivative
            )
        )

    def _refresh(
        self, problem: Problem, streams: Streams, budget: Budget
    ) -> tuple[Params | None, dict[str, float]]:
        """The moving average with a new g_down in it; a non-finite one changes nothing."""
        fresh, record = super()._refresh(problem, streams, budget)
        if fresh is None or self._g_down is None:
            return self._g_down if fresh is None else fresh, record
        average = params.add(params.scale(self._g_down, self.ema), fresh, alpha=1 - self.ema)
        return average, {**record, "g_down_norm": float(params.norm(average))}


class RandomTilt(Tilt):
    """`Tilt` with g_down replaced by a random vector of the same norm: targets as soft, for nothing."""

    def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generator = torch.Generator().manual_seed(seed)

    def _direction(
        self,
        problem: Problem,
        batch: Any,
        theta: Params,
        aligned: Params,
        optimizer: Optimizer,
        budget: Budget,
    ) -> Params:
        w = super()._direction(problem, batch, theta, aligned, optimizer, budget)
        noise = params.zip_with(self._draw, w)
        return params.scale(noise, params.norm(w) / params.norm(noise))

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])


def check_gate(gate: float) -> None:
    if not 0 <= gate <= 1:
        raise MetaVPTError(f"strategy.gate={gate} must be in [0, 1]")
