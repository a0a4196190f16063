"""The contract of a problem: several feedbacks, and capabilities that strategies ask for."""

import pytest
import torch
from channels import Channels

from metavpt import Budget, MetaVPTError, Problem, RunLog, Trainer
from metavpt.feedback.aggregation import MultipleFeedbacks
from metavpt.hypergradients import params
from metavpt.problem import check_directions, missing_members, require, sign, supports
from metavpt.strategies.amortized import Amortized
from metavpt.strategies.controls import Hardest, Uniform
from metavpt.strategies.function_space import Functional
from metavpt.strategies.selection import Greedy, GreedySelection, SupportsSelection
from metavpt.strategies.tilted_targets import Tilt


class Named(MultipleFeedbacks, Channels):
    """Two feedbacks in place of the one loss."""

    feedback_weights = {"near": 2.0, "far": 0.5}  # noqa: RUF012

    def feedback_losses(self, theta, batch):
        x, y = batch
        return {
            "near": Channels.feedback_loss(self, theta, (x, y)),
            "far": Channels.feedback_loss(self, theta, (x, y + 1)),
        }


def scene(problem):
    return params.named(problem.learner), next(iter(problem.feedback_batches(0)))


def test_feedback_loss_of_several_feedbacks_is_their_weighted_sum():
    problem = Named()
    losses = problem.feedback_losses(*scene(problem))
    assert torch.equal(
        problem.feedback_loss(*scene(problem)), 2.0 * losses["near"] + 0.5 * losses["far"]
    )


def test_feedback_weights_that_name_other_feedbacks_are_an_error():
    problem = Named()
    problem.feedback_weights = {"feedback": 1.0}
    with pytest.raises(MetaVPTError, match=r"near, far.*feedback"):
        problem.feedback_loss(*scene(problem))


def test_problem_without_feedback_loss_cannot_be_built():
    class Mute(Channels):
        feedback_loss = Problem.feedback_loss

    with pytest.raises(TypeError, match="feedback_loss"):
        Mute()


def test_problem_has_at_most_twelve_methods():
    methods = [
        name for name in vars(Problem) if callable(getattr(Problem, name)) and name[0] != "_"
    ]
    assert len(methods) <= 12


@pytest.mark.parametrize(
    "strategy",
    [
        Greedy(burn_in=40),
        GreedySelection(burn_in=40),
        Hardest(),
        Uniform(),
        Tilt(burn_in=40),
        Amortized(burn_in=40),
        Functional(burn_in=40),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_strategy_start_names_what_the_problem_lacks(tmp_path, strategy):
    """Before step 0, whatever the burn-in."""
    with pytest.raises(MetaVPTError, match=rf"{type(strategy).__name__} needs .*Channels"):
        Trainer(Channels(), strategy, Budget(steps=1), RunLog(tmp_path))


def test_require_names_the_shipped_problems_that_have_a_capability():
    with pytest.raises(MetaVPTError, match=r"per_sample_tail .*dino_masks.*toy_sources"):
        require(Channels(), SupportsSelection, "a test")


def test_supports_is_structural():
    problem = Channels()
    assert missing_members(problem, SupportsSelection) == ["per_sample_tail"]
    problem.per_sample_tail = lambda theta, task: None
    assert supports(problem, SupportsSelection)


STATED = check_directions({"ridge/rmse": "lower", "miou": "higher"}, "metrics")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ridge/rmse", -1),
        ("miou", 1),
        ("linear/miou", 1),  # an entry without a `/` holds for every head
        ("rmse", 0),  # an entry with one does not
        ("knn/accuracy", 0),  # a telling name is no statement
        ("loss", 0),
    ],
)
def test_sign_is_what_was_stated(name, expected):
    assert sign(name, STATED) == expected


def test_sign_prefers_the_full_name():
    assert sign("odd/loss", {"odd/loss": "higher", "loss": "lower"}) == 1


def test_check_directions_names_the_key_and_the_choices():
    with pytest.raises(MetaVPTError, match=r"^metrics\.loss=down: write lower or higher"):
        check_directions({"miou": "higher", "loss": "down"}, "metrics")
