"""What a problem may leave out, and what it is told where it leaves out too much."""

import pytest
import torch
from channels import Channels

from metavpt import MetaVPTError, Problem
from metavpt.hypergradients import params


class Named(Channels):
    """Two feedbacks in place of the one loss."""

    feedback_loss = Problem.feedback_loss
    feedback_weights = {"near": 2.0, "far": 0.5}  # noqa: RUF012

    def feedback_losses(self, theta, batch):
        x, y = batch
        return {
            "near": Channels.feedback_loss(self, theta, (x, y)),
            "far": Channels.feedback_loss(self, theta, (x, y + 1)),
        }


def scene(problem):
    return params.named(problem.learner), next(iter(problem.feedback_batches(0)))


def test_one_loss_is_one_named_feedback():
    problem = Channels()
    losses = problem.feedback_losses(*scene(problem))
    assert losses.keys() == problem.feedback_weights.keys() == {"feedback"}
    assert torch.equal(losses["feedback"], problem.feedback_loss(*scene(problem)))


def test_several_feedbacks_make_one_loss_by_their_weights():
    problem = Named()
    losses = problem.feedback_losses(*scene(problem))
    assert torch.equal(
        problem.feedback_loss(*scene(problem)), 2.0 * losses["near"] + 0.5 * losses["far"]
    )


def test_feedbacks_without_weights_are_told_what_is_missing():
    problem = Named()
    problem.feedback_weights = Problem.feedback_weights
    with pytest.raises(
        MetaVPTError, match="feedback_losses gives near, far; feedback_weights names feedback"
    ):
        problem.feedback_loss(*scene(problem))


def test_neither_loss_is_an_error_before_anything_runs():
    class Mute(Channels):
        feedback_loss = Problem.feedback_loss

    with pytest.raises(
        MetaVPTError, match="Mute has no feedback; define feedback_loss, or feedback_losses"
    ):
        Mute()
