"""What a run with a learned designer refuses."""

import pytest
import torch
from helpers.regression import Regression, X, Y, trainer_of

from metavpt import Learned, MetaVPTError, UnreachedParameterError
from metavpt.errors import ImpureLossError


class Forgets(Regression):
    def feedback_loss(self, theta, batch):
        return (X[batch] @ self.learner.weight - Y[batch]).square().mean()


class Noisy(Regression):
    def pretrain_loss(self, theta, task):
        return super().pretrain_loss({"weight": torch.dropout(theta["weight"], 0.5, True)}, task)


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        (Forgets, UnreachedParameterError, "feedback loss depends on none of .*weight"),
        (Noisy, ImpureLossError, "pretraining loss is random"),
    ],
)
def test_a_run_stops_on_losses_that_cannot_steer(tmp_path, problem, error, words):
    with pytest.raises(error, match=words) as raised:
        trainer_of(tmp_path, Learned(every=2), problem=problem).run()
    assert isinstance(raised.value, MetaVPTError)
