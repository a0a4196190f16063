"""Updates of the designer on the batch that the learner trains on next."""

import itertools
import math

import pytest
import torch
from helpers.regression import Regression, sgd, trainer_of

from metavpt import (
    ConjugateGradient,
    Cosine,
    ExactProduct,
    Fixed,
    Implicit,
    Learned,
    MetaVPTError,
    OneStep,
    Unrolled,
)
from metavpt.feedback.aggregation import DomainMatched
from metavpt.hypergradients import params
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Streams

ESTIMATORS = {
    "one_step": OneStep(Cosine()),
    "two_batches": OneStep(product=ExactProduct(), num_batches=2),
    "unrolled": Unrolled(3),
    "implicit": Implicit(ConjugateGradient(200, 1e-10), damping=1.0),
}


def theta_of(trainer):
    return trainer.problem.learner.weight.detach().clone()


def phi_of(trainer):
    return trainer.problem.designer.weight.detach().clone()


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_estimate_is_that_of_the_batch_and_the_task_that_of_phi_before(tmp_path, estimator):
    """The task of this problem holds phi itself, whose memory the designer's optimizer writes."""
    trainer = trainer_of(tmp_path, Fixed())
    for _ in range(3):
        trainer.step()
    problem, own = trainer.problem, trainer.streams.pretrain
    torch.nn.init.normal_(problem.designer.weight)
    labelled = next(problem.feedback_batches(8))
    mine = next(itertools.islice(problem.pretrain_batches(own.seed), 3, None))
    others = list(itertools.islice(problem.meta_batches(7), estimator.num_batches - 1))

    def state(meta):
        streams = Streams(own, iter(meta), iter([labelled]))
        return TrainState(problem, streams, trainer.optimizer, trainer.budget)

    expected, _ = Learned(estimator).estimate(state([mine, *others]))
    phi = phi_of(trainer)
    strategy = Learned(estimator, sgd(0.1), every=3, max_norm=math.inf, own_batch=True)
    strategy.start(problem)
    proposal = strategy.next_task(state(others))
    rows, move = proposal.task
    assert torch.equal(rows, mine)
    assert torch.equal(move, phi)
    assert not move.requires_grad
    torch.testing.assert_close(
        phi_of(trainer), phi - 0.1 * expected.by_phi["weight"], rtol=1e-12, atol=0
    )
    assert (proposal.num_samples, proposal.record["value"]) == (8, expected.value)


def test_a_run_is_one_of_updates_that_follow_their_step(tmp_path):
    """In float64, against steps on the designer's tasks with updates taken out of them by hand."""
    found = trainer_of(tmp_path, Learned(OneStep(Cosine()), sgd(0.1), every=2, own_batch=True))
    by_hand = trainer_of(tmp_path / "by_hand", Fixed())
    problem = by_hand.problem
    problem.recipe = lambda batch: (batch, problem.designer.weight.detach().clone())
    update = Learned(OneStep(Cosine()), sgd(0.1))
    update.start(problem)
    labelled = problem.feedback_batches(by_hand.streams.feedback.seed)
    batches = problem.pretrain_batches(by_hand.streams.pretrain.seed)
    for step in range(12):
        found.step()
        batch = next(batches)
        before = phi_of(by_hand)
        if step % 2 == 0:
            streams = Streams(None, iter([batch]), labelled)
            state = TrainState(problem, streams, by_hand.optimizer, by_hand.budget)
            by_hand._schedule()
            update.apply(state, *update.estimate(state))
        after = phi_of(by_hand)
        problem.designer.weight.data.copy_(before)
        by_hand.step()
        problem.designer.weight.data.copy_(after)
    assert float(phi_of(found).abs().max()) > 0.01
    torch.testing.assert_close(phi_of(found), phi_of(by_hand), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theta_of(found), theta_of(by_hand), rtol=1e-12, atol=1e-12)
    assert found.streams.meta.position == 0


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_with_a_designer_that_stands_still_the_run_is_the_fixed_one(tmp_path, estimator):
    fixed = trainer_of(tmp_path / "fixed", Fixed())
    own = trainer_of(tmp_path / "own", Learned(estimator, sgd(0.0), every=3, own_batch=True))
    for trainer in (fixed, own):
        trainer.run()
    assert torch.equal(theta_of(fixed), theta_of(own))
    assert own.budget.samples == fixed.budget.samples
    assert len([r for r in own.log.records() if r["kind"] == "designer"]) == 4


@pytest.mark.parametrize("random_seed", [None, 0])
@pytest.mark.parametrize("estimator", ["one_step", "two_batches"])
def test_a_run_resumes_bit_for_bit(tmp_path, estimator, random_seed):
    make = lambda: Learned(
        ESTIMATORS[estimator], sgd(0.1), every=2, random_seed=random_seed, own_batch=True
    )
    whole = trainer_of(tmp_path / "whole", make())
    whole.run()
    for step in (5, 6):  # before a step with an update, and after one
        cut, resumed = (trainer_of(tmp_path / f"{step}{k}", make()) for k in range(2))
        for _ in range(step):
            cut.step()
        resumed.load_state_dict(cut.state_dict())
        resumed.run()
        assert torch.equal(theta_of(whole), theta_of(resumed))
        assert torch.equal(phi_of(whole), phi_of(resumed))


@pytest.mark.parametrize(("burn_in", "steered"), [(0, 11), (4, 7), (11, 0)])
def test_the_step_of_the_first_update_is_not_steered(tmp_path, burn_in, steered):
    """Its task is that of phi before."""
    strategy = Learned(every=6, burn_in=burn_in, own_batch=True)
    trainer = trainer_of(tmp_path, strategy)
    trainer.run()
    assert strategy.period.num_updates == (1 if burn_in == 11 else 2)
    assert trainer.steered.steered == steered
    warned = any("none of the 12 steps" in r.get("message", "") for r in trainer.log.records())
    assert warned == (steered == 0)


class NoFeedback(Regression):
    def feedback_loss(self, theta, batch):
        return super().feedback_loss(theta, batch) * math.nan


class NoRegularizer(Regression):
    def regularizer(self, task):
        return task[1].sum() * math.nan


class Saddle(Regression):
    def pretrain_loss(self, theta, task):
        return -super().pretrain_loss(theta, task)


@pytest.mark.parametrize("problem", [NoFeedback, NoRegularizer, Saddle])
def test_the_learner_trains_on_the_batch_of_an_update_that_is_skipped(tmp_path, problem):
    """Before the task is made, after it, and in between: no batch is lost."""
    fixed = trainer_of(tmp_path / "fixed", Fixed(), problem=problem)
    estimator = Implicit(ConjugateGradient()) if problem is Saddle else OneStep()
    strategy = Learned(estimator, every=2, own_batch=True)
    trainer = trainer_of(tmp_path / "learned", strategy, problem=problem)
    for one in (fixed, trainer):
        for _ in range(6):
            one.step()
    assert (strategy.num_skipped, strategy.num_unsolved) == (
        (0, 3) if problem is Saddle else (3, 0)
    )
    assert torch.equal(theta_of(trainer), theta_of(fixed))
    assert not params.norm(params.named(trainer.problem.designer))


def test_a_rule_that_splits_batches_is_refused():
    with pytest.raises(MetaVPTError, match=r"own_batch=true: DomainMatched .*use WeightedSum"):
        Learned(combination=DomainMatched(), own_batch=True)
