"""What a learner predicts of one batch, with the trunk run once: where targets are made from, and values of candidates."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metavpt.data.tokens import TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.lm import Hidden, LanguageModel
from metavpt.objectives.next_token import Scores, score


@dataclass(frozen=True)
class Prediction:
    """A learner on one batch at theta; its trunk has run, once.

    predicted (B, T) bool marks the N tokens to predict, tokens (N,), from states (N, D) and unembedding (V, D).
    """

    learner: LanguageModel
    theta: Params
    hidden: Hidden
    predicted: Tensor
    tokens: Tensor
    states: Tensor
    unembedding: Tensor
    _scores: dict[int, Scores] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, learner: LanguageModel, theta: Params, batch: TokenBatch) -> "Prediction":
        hidden, predicted = learner.hidden(theta, batch), predicted_tokens(batch)
        states = before(learner.states(theta, hidden), predicted)
        return cls(
            learner,
            theta,
            hidden,
            predicted,
            batch.tokens[predicted],
            states,
            learner.unembedding(theta),
        )

    def at(self, theta_s: Params) -> Tensor:
        """The states (N, D) at theta_S = `theta_s`: the tail alone runs."""
        outside = [name for name in theta_s if not name.startswith("tail.")]
        if outside:
            raise MetaVPTError(
                f"aligned_parameters names {outside[0]}, not in the learner's tail; raise tail_layers, or leave it out"
            )
        return before(self.learner.states({**self.theta, **theta_s}, self.hidden), self.predicted)

    def scores(self, num_candidates: int) -> Scores:
        """Candidates and their log-probabilities, without a graph; made once for each number of them."""
        if num_candidates not in self._scores:
            self._scores[num_candidates] = score(
                self.states.detach(), self.unembedding, self.tokens, num_candidates
            )
        return self._scores[num_candidates]

    def slope(self, w: Params, derivative: DirectionalDerivative) -> Tensor:
        """d states [w], (N, D), detached, for a direction w in theta_S."""
        with torch.no_grad():
            own = Prediction(
                self.learner,
                params.detach(self.theta),
                self.hidden.detach(),
                self.predicted,
                self.tokens,
                self.states,
                self.unembedding,
            )
        return derivative(own.at, {name: own.theta[name] for name in w}, w)


def predicted_tokens(batch: TokenBatch) -> Tensor:
    """(B, T) bool: asked for by `loss_mask`, and with a context; the first token of a document has none."""
    predicted = batch.loss_mask.clone()
    predicted[:, 0] = False
    predicted[:, 1:] &= batch.documents[:, 1:] == batch.documents[:, :-1]
    return predicted


def before(states: Tensor, predicted: Tensor) -> Tensor:
    """The states (N, D), of (B, T, D), that the predicted tokens are predicted from: each one's predecessor."""
    return states[:, :-1][predicted[:, 1:]]
