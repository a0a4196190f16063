"""Target designers that read the learner's own states.

They predict what the learner would predict if a step for the feedback had moved its states.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.data.tokens import TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.objectives.next_token import Rule, candidate_scores
from metavpt.objectives.prediction import Prediction
from metavpt.objectives.spread import spread
from metavpt.objectives.target_task import OneHot, TargetTask, mixed


@dataclass(frozen=True)
class MovedStates:
    """r_t = softmax over C_t of log p_t(c) + u_t . W_c, the prediction from the state h_t + u_t.

    W is the learner's unembedding. `phi` holds the weights of `StateDesigner`, which computes u_t
    from h_t; `gate` is alpha.
    """

    phi: Params
    num_candidates: int = 64
    gate: float = 0.5
    sums_to_one = True

    @property
    def requires_grad(self) -> bool:
        """Return whether the targets depend on phi with a graph."""
        return any(p.requires_grad for p in self.phi.values())

    def rule(self, prediction: Prediction) -> Rule:
        """Return the rule of the targets for a prediction."""
        table, moves = (
            prediction.unembedding.detach(),
            moves_of(self.phi, prediction.states.detach()),
        )

        def rule(log_probs: Tensor, candidates: Tensor, rows: slice) -> Tensor:
            return mixed(
                self.gate,
                (log_probs + candidate_scores(moves[rows], table, candidates)).softmax(dim=1),
            )

        return rule


class StateDesigner(nn.Module):
    """`MovedStates` by a network of one hidden layer; its cost is small beside the learner's.

    Logits are linear in the states, so the best r within a trust region (`Tilt`) is the prediction
    from h_t - dh_t[w] / (tau s). The network learns this as a function of h_t, for the steps
    between updates. Moves start at 0: the learner's own prediction. The gate is fixed: a learned
    gate closes early, while r is still uninformative, and r then receives no gradient.

    Args:
        width: The learner's.
        hidden_width: Of the network.
        num_candidates, gate, tau: K, alpha and the temperature, as in `Tilt`. With gate 0 this is
            plain next-token prediction, bit for bit.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int = 128,
        num_candidates: int = 64,
        gate: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= gate <= 1 or not tau > 0:
            raise MetaVPTError(
                f"StateDesigner: gate={gate} must be in [0, 1] and tau={tau} positive"
            )
        self.num_candidates, self.gate, self.tau = num_candidates, gate, tau
        self.features = nn.Linear(width, hidden_width)
        self.moves = nn.Linear(hidden_width, width)
        for parameter in self.moves.parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: TokenBatch) -> TargetTask:
        """Make the task of a batch."""
        phi: Params = dict(self.named_parameters())
        if not torch.is_grad_enabled():
            # The parameters themselves would require a gradient in the learner's loss, and the task
            # would follow later steps of phi.
            phi = {name: p.detach().clone() for name, p in phi.items()}
        return TargetTask(batch, MovedStates(phi, self.num_candidates, self.gate))

    def recipe_task(self, batch: TokenBatch) -> TargetTask:
        """Plain next-token prediction; no network runs."""
        return TargetTask(batch, OneHot())

    def regularizer(self, task: TargetTask) -> None:
        """None: the trust region is part of `loss`."""

    @torch.no_grad()
    def replay_batch(
        self,
        prediction: Prediction,
        w: Params,
        derivative: DirectionalDerivative,
        rows: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return states (N, D), candidates, log_probs and values (N, K) of tokens on `rows` (B,).

        Values are as in `Tilted`.
        """
        scores, row = prediction.scores(self.num_candidates), prediction.predicted.nonzero()[:, 0]
        kept = torch.ones_like(row, dtype=torch.bool) if rows is None else rows[row]
        values = candidate_scores(
            -prediction.slope(w, derivative), prediction.unembedding, scores.candidates
        )[kept]
        log_probs = scores.log_probs[kept].log_softmax(dim=1)
        values = values - (log_probs.exp() * values).sum(dim=1, keepdim=True)
        if len(values):
            values = values / spread(values, log_probs).clamp_min(torch.finfo(values.dtype).tiny)
        return {
            "states": prediction.states[kept],
            "candidates": scores.candidates[kept],
            "log_probs": log_probs,
            "values": values,
        }

    def loss(self, replay: dict[str, Tensor], table: Tensor) -> Tensor:
        """Compute -mean_t (<r_t, A_t> - tau KL(r_t || p_t)); the closed form is its minimum.

        `table` is the unembedding. The loss of an empty batch is 0.
        """
        phi: Params = dict(self.named_parameters())
        if not len(replay["states"]):
            return torch.stack([0.0 * p.sum() for p in phi.values()]).sum()
        moves = moves_of(phi, replay["states"])
        log_r = (
            replay["log_probs"] + candidate_scores(moves, table, replay["candidates"])
        ).log_softmax(dim=1)
        return (
            -(log_r.exp() * (replay["values"] - self.tau * (log_r - replay["log_probs"])))
            .sum(dim=1)
            .mean()
        )


def moves_of(phi: Params, states: Tensor) -> Tensor:
    """Compute u (N, D) from states (N, D)."""
    features = F.gelu(
        F.linear(F.rms_norm(states, states.shape[1:]), phi["features.weight"], phi["features.bias"])
    )
    return F.linear(features, phi["moves.weight"], phi["moves.bias"])
