"""The direction of the feedback through an implicit solve, in float64 on a regression."""

import pytest
import torch
from helpers.regression import X, assert_resumes, trainer_of

from metavpt import AdamAware, Fixed
from metavpt.errors import MetaVPTError, UnsolvedError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Implicit
from metavpt.strategies.amortized import Amortized
from metavpt.strategies.feedback_direction import FeedbackDirection
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Stream, Streams, meta_batches


def state_of(trainer):
    problem = trainer.problem
    sources = problem.pretrain_batches, meta_batches(problem), problem.feedback_batches
    streams = Streams(*(Stream(source, 0) for source in sources))
    return TrainState(problem, streams, trainer.optimizer, trainer.budget)


def test_w_solves_the_linear_system_of_the_recipe(tmp_path):
    state = state_of(trainer_of(tmp_path, Fixed()))
    direction = FeedbackDirection(implicit=Implicit(damping=0.1))
    direction.renew(state)
    rows = torch.arange(8)
    w = direction.along(state, rows)["weight"]
    # the loss is mean |x theta - target|^2 over 8 rows of 3 outputs: H = 2 X^T X / 24, per output
    curvature = 2 * X[rows].T @ X[rows] / 24 + 0.1 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(w, torch.linalg.solve(curvature, direction.g_down["weight"]))


def test_one_solve_serves_all_steps_to_the_next_g_down(tmp_path):
    state = state_of(trainer_of(tmp_path, Fixed()))
    direction = FeedbackDirection(every=2, implicit=Implicit(damping=0.1))
    found = []
    for k in range(3):
        direction.renew(state)
        found.append(direction.along(state, torch.arange(8) + k))
        state.budget.charge(steps=1)
    assert found[0] is found[1]
    assert float(params.norm(params.add(found[1], found[2], alpha=-1.0))) > 0


class Unsolvable(Implicit):
    """Counts its solves, which all fail."""

    num_solves = 0

    def solution(self, losses, g_down, theta, start=None):
        Unsolvable.num_solves += 1
        raise UnsolvedError("no better than x = 0", 1)


def test_a_failed_solve_gives_the_recipe_until_the_next_g_down_and_is_counted(tmp_path):
    state = state_of(trainer_of(tmp_path, Fixed()))
    direction = FeedbackDirection(every=2, implicit=Unsolvable())
    for _ in range(2):
        direction.renew(state)
        assert direction.along(state, torch.arange(8)) is None
        assert not direction.steers
        state.budget.charge(steps=1)
    assert Unsolvable.num_solves == 1
    assert direction.renew(state)["skipped_updates"] == 1


def test_a_direction_beside_a_solve_is_refused():
    with pytest.raises(MetaVPTError, match=r"strategy\.direction=AdamAware"):
        FeedbackDirection(direction=AdamAware(), implicit=Implicit())


def test_a_run_with_a_solve_resumes_bit_for_bit(tmp_path):
    assert_resumes(trainer_of, lambda: Amortized(every=3, implicit=Implicit(damping=0.1)), tmp_path)
