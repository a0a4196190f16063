"""The hypergradient in function space: with respect to the learner's outputs, not its parameters.

Functional bilevel optimisation (Petrulionyte, Mairal & Arbel, arXiv 2403.20233). With a squared
inner loss, the minimiser in function space is the target itself, f* = t_phi. Implicit
differentiation of L_down(f*) gives <dL_down/df, dt_phi/dphi>: the Hessian of the inner problem is
the identity, and there is no linear system to solve. The value A = -dL_down/df is known on labelled
samples alone. A designer that is fitted to it predicts it on all others.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.errors import NonFiniteError
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem, require
from metavpt.strategies.learned import MakeOptimizer, feedback_on
from metavpt.strategies.replay_buffer import Replay, ReplayBuffer
from metavpt.training.schedule import Period
from metavpt.training.strategy import Proposal, TrainState, designed, draw


class SupportsFunctionSpace(Protocol):
    """A problem whose feedback loss can be differentiated by the learner's outputs."""

    def output_values(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """Compute `values` = -dL_down/df on a labelled batch, one row per sample.

        Returns:
            Detached tensors, with what `designer_loss` needs besides the values.
        """
        ...

    def designer_loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute minus the value of the designer's targets plus its trust-region penalty."""
        ...


class Functional:
    """The designer's tasks. Every `every` steps it is fitted to values in function space.

    One batch of values takes a forward pass on labelled samples and no backward pass. The signal is
    not filtered through a parameter step, so one batch is informative: use few, large batches
    (`Amortized` needs many small ones).

    Args:
        optimizer: Makes the designer's optimizer. Default: AdamW with a learning rate of 1e-3 and
            a weight decay of 0.05.
        phi_steps: Steps of the designer at each update.
        batch_size: Labelled samples of each of these steps.
        every: Steps from one update to the next.
        burn_in: Steps before the first update; below 1 the share of the budget
            that they take.
        max_norm: The norm at which the designer's gradient is clipped.
        anneal: Whether the designer's learning rate falls to 0 within each update.
        seed: Of the order in which the designer's steps take the samples.
        permute: The control. Values are permuted across samples and half of them negated, which
            keeps their size and smoothness and removes the information.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        phi_steps: int = 300,
        batch_size: int = 16,
        every: int = 50,
        burn_in: float = 0,
        max_norm: float = 1.0,
        anneal: bool = False,
        seed: int = 0,
        permute: bool = False,
    ) -> None:
        make = optimizer or (
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        )
        self.period, self.permute = Period(every, burn_in), permute
        self.buffer = ReplayBuffer(make, phi_steps, 1, max_norm, batch_size, seed, anneal)
        self.num_skipped = 0

    @property
    def optimizer(self) -> Optimizer:
        """The designer's optimizer, after `start`."""
        return self.buffer.optimizer

    def start(self, problem: Problem) -> None:
        """Check the problem and make the designer's optimizer."""
        require(problem, SupportsFunctionSpace, f"strategy {type(self).__name__}")
        self.buffer.start(problem, f"strategy {type(self).__name__}")

    def next_task(self, state: TrainState) -> Proposal:
        """Fit the designer if it is due, then make its task of the next batch."""
        record: dict[str, float] = {}
        if self.period.due(state.budget):
            with state.budget.timed("designer"):
                record = self._update(state)
        steered = None if self.permute else self.period.num_updates > 0
        return designed(state, draw(state), record, steered)

    def _update(self, state: TrainState) -> dict[str, float]:
        problem = require(state.problem, SupportsFunctionSpace, "function space")
        with state.budget.timed("data"):
            labelled = next(state.streams.feedback)
        try:
            feedback = feedback_on(state.problem, labelled)
            replay = problem.output_values(feedback.theta, labelled)
        except NonFiniteError:
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}
        if self.permute:
            replay = permuted(replay, self.buffer.generator)
        record = self.buffer.fit(state.problem, problem.designer_loss, replay)
        self.period.num_updates += "skipped_updates" not in record
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the replay buffer and the count of skipped updates."""
        return {
            "num_skipped": self.num_skipped,
            "period": self.period.state_dict(),
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_skipped = state["num_skipped"]
        self.period.load_state_dict(state["period"])
        self.buffer.load_state_dict(state["buffer"])


def permuted(replay: Replay, generator: torch.Generator) -> Replay:
    """Permute the values across samples and negate half of them.

    A permutation alone would keep the mean of the values at each position.
    """
    num = collectives.total(len(replay["values"]))
    values = collectives.gather(replay["values"])
    order = torch.randperm(num, generator=generator)
    signs = 2 * torch.randint(2, (num,), generator=generator) - 1
    shape = (-1, *[1] * (values.ndim - 1))
    turned = values[order.to(values.device)] * signs.to(values).view(shape)
    return {**replay, "values": turned[collectives.rows(num)]}
