"""Steering of some domains of the stream, and the designer that learns the tilt from states."""

import pytest
import torch
from helpers.small_language import TWO_DOMAINS, composed, fresh_problems, in_float64
from helpers.training import assert_identical, train, weights
from hydra.utils import instantiate

from metavpt import Fixed
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import ForwardMode
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import target_tail

STATES = ["designer=states", "strategy=amortized", "strategy.phi_steps=3", "strategy.every=2"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with fresh_problems(tmp_path_factory) as fresh:
        yield fresh


@pytest.mark.parametrize(
    "overrides",
    [STATES, [*STATES, *TWO_DOMAINS[:1], "problem.steered_domains=[math]"]],
    ids=["states", "math alone"],
)
def test_the_designer_that_reads_states_runs_and_resumes_exactly(make, tmp_path, overrides):
    def strategy():
        return instantiate(composed(*overrides).strategy, _convert_="all")

    whole, fixed, resumed = make(*overrides), make(*overrides), make(*overrides)
    train(tmp_path, whole, strategy(), steps=4)
    sorted((tmp_path / "checkpoints").glob("*.pt"))[-1].unlink()
    train(tmp_path, resumed, strategy(), steps=4, resume=True)
    assert_identical(weights(whole), weights(resumed))
    train(tmp_path / "fixed", fixed, Fixed(), steps=4)
    assert any(not torch.equal(p, weights(fixed)[name]) for name, p in weights(whole).items())


@pytest.mark.parametrize("choice", ["tilt", "designer"])
def test_domains_that_are_not_steered_keep_the_true_token(make, choice):
    """Their rows have the gradient of next-token prediction, steered rows that of the targets."""
    problem = in_float64(make(*TWO_DOMAINS, "problem.steered_domains=[math]"))
    batch, theta = next(iter(problem.meta_batches(0))), params.detach(params.named(problem.learner))
    assert sorted(batch.domain.tolist()) == [0, 1]
    w = {name: theta[name] for name in problem.aligned_parameters()}
    task = (
        problem.tilt(theta, problem.recipe(batch), w, 0.5, 1.0, 6, ForwardMode())
        if choice == "tilt"
        else problem.designer(batch)
    )
    with torch.no_grad():
        q = problem.pretrain_tail(theta, task).targets
        whole = target_tail(problem.learner, theta, task).targets
    is_math = (batch.domain == 0)[predicted_tokens(batch).nonzero()[:, 0]]
    assert torch.equal(q[is_math], whole[is_math])
    assert torch.equal(
        q[~is_math], torch.eye(q.shape[1], dtype=q.dtype)[:1].expand(int((~is_math).sum()), -1)
    )
    losses = [problem.per_sample_tail(theta, t)({}) for t in (task, problem.recipe(batch))]
    torch.testing.assert_close(losses[0][batch.domain == 1], losses[1][batch.domain == 1])
    torch.testing.assert_close(
        problem.pretrain_loss(theta, task), problem.pretrain_tail(theta, task)(w)
    )
