"""What a learner predicts for one batch, with the trunk run once."""

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
    """A learner on one batch at theta, after its trunk has run.

    Attributes:
        predicted: The N tokens to predict, bool of shape (B, T).
        tokens: Their true tokens, (N,). They are predicted from states (N, D) and the unembedding
            (V, D).
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
    def of(
        cls, learner: LanguageModel, theta: Params, batch: TokenBatch, hidden: Hidden | None = None
    ) -> "Prediction":
        """Run the trunk of a learner at theta on a batch, unless its output is given."""
        if hidden is None:
            hidden = learner.hidden(theta, batch)
        predicted = predicted_tokens(batch)
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
        """Return the states (N, D) at theta_S = `theta_s`. Only the tail runs."""
        outside = [name for name in theta_s if not name.startswith("tail.")]
        if outside:
            raise MetaVPTError(
                f"aligned_parameters names {outside[0]}, not in the learner's tail; raise "
                "tail_layers, or leave it out"
            )
        return before(self.learner.states({**self.theta, **theta_s}, self.hidden), self.predicted)

    def scores(self, num_candidates: int) -> Scores:
        """Return candidates and their log-probabilities, without a graph.

        They are cached by number.
        """
        if num_candidates not in self._scores:
            self._scores[num_candidates] = score(
                self.states.detach(), self.unembedding, self.tokens, num_candidates
            )
        return self._scores[num_candidates]

    def slope(self, w: Params, derivative: DirectionalDerivative) -> Tensor:
        """Return d states [w], (N, D), detached, for a direction w in theta_S."""
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
    """Mark the tokens to predict, bool of shape (B, T).

    `loss_mask` asks for them, and they have a context: the first token of a document has none.
    """
    predicted = batch.loss_mask.clone()
    predicted[:, 0] = False
    predicted[:, 1:] &= batch.documents[:, 1:] == batch.documents[:, :-1]
    return predicted


def before(states: Tensor, predicted: Tensor) -> Tensor:
    """Return the states (N, D) that precede the predicted tokens, from states (B, T, D)."""
    return states[:, :-1][predicted[:, 1:]]
