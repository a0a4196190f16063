"""Greedy selection and its controls, on the README's problem with per-sample losses."""

import pytest
import torch
from channels import Channels
from torch.func import functional_call

from metavpt import Budget, Cosine, Learned, MetaVPTError, RunLog, Trainer
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware, Dot
from metavpt.hypergradients.estimators import downstream
from metavpt.strategies.amortized import Amortized
from metavpt.strategies.controls import Adversarial, Direct, Hardest, Uniform
from metavpt.strategies.function_space import Functional
from metavpt.strategies.selection import Greedy, GreedySelection
from metavpt.strategies.tilted_targets import Tilt


class Selectable(Channels):
    """Channels with a row of weights per sample, so that tasks can be selected sample by sample."""

    def recipe(self, batch):
        return batch, torch.full_like(batch, 1 / 16)

    def candidates(self, batch, num_candidates):
        generator = torch.Generator().manual_seed(int(batch[0, 0].abs() * 1e6))
        draw = lambda: torch.randn(batch.shape, generator=generator).softmax(1)
        return [(batch, draw()) for _ in range(num_candidates)]

    def per_sample_tail(self, theta, task):
        x, weights = task
        return lambda theta_s: (
            weights * (functional_call(self.learner, {**theta, **theta_s}, (x,)) - x) ** 2
        ).sum(1)


def trainer(folder, strategy, problem=None, steps=6):
    torch.manual_seed(0)
    problem = problem or Selectable()
    return Trainer(
        problem,
        strategy,
        Budget(steps=steps),
        RunLog(folder),
        optimizer=lambda g: torch.optim.AdamW(g, lr=1e-2),
    )


def alignment(problem, task, g_down, sample):
    """<g_down, g_i> by a backward pass for one sample: the naive score."""
    theta = params.leaves(params.named(problem.learner))
    loss = problem.per_sample_tail(theta, task)({})[sample]
    gradient = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    return float(params.dot(g_down, gradient))


def test_greedy_takes_for_each_sample_the_candidate_with_the_largest_alignment(tmp_path):
    loop = trainer(tmp_path, Greedy(num_candidates=4))
    problem = loop.problem
    proposal = loop.strategy.next_task(loop.state)
    batch, chosen = proposal.task
    labelled = next(iter(problem.feedback_batches(loop.streams.feedback.seed)))
    theta = params.detach(params.named(problem.learner))
    _, g_down = downstream(lambda theta: problem.feedback_loss(theta, labelled), theta)
    tasks = problem.candidates(batch, 4)
    for sample in range(0, 64, 7):
        scores = [alignment(problem, task, g_down, sample) for task in tasks]
        best = max(range(4), key=scores.__getitem__)
        assert torch.equal(chosen[sample], tasks[best][1][sample])


def test_selection_keeps_the_samples_of_the_pool_with_the_largest_alignment(tmp_path):
    loop = trainer(tmp_path, GreedySelection(pool_batches=3))
    problem = loop.problem
    proposal = loop.strategy.next_task(loop.state)
    pool = [
        batch
        for batch, _ in zip(
            problem.pretrain_batches(loop.streams.pretrain.seed), range(3), strict=False
        )
    ]
    labelled = next(iter(problem.feedback_batches(loop.streams.feedback.seed)))
    theta = params.detach(params.named(problem.learner))
    _, g_down = downstream(lambda theta: problem.feedback_loss(theta, labelled), theta)
    scores = torch.tensor(
        [
            [alignment(problem, problem.recipe(batch), g_down, i) for i in range(64)]
            for batch in pool
        ]
    )
    expected = torch.cat(pool)[scores.flatten().topk(64).indices]
    assert {tuple(row) for row in proposal.task[0].tolist()} == {
        tuple(row) for row in expected.tolist()
    }
    assert proposal.num_samples == 64


@pytest.mark.parametrize(
    "direction", [Dot(), Cosine(), AdamAware()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize(
    "make",
    [lambda d: Greedy(3, direction=d), lambda d: GreedySelection(2, direction=d)],
    ids=["greedy", "selection"],
)
def test_every_direction_runs_and_is_charged(tmp_path, make, direction):
    loop = trainer(tmp_path, make(direction))
    loop.run()
    assert loop.budget.grad_evals > 6 * 2
    assert loop.budget.times["designer"] > 0


def test_greedy_trains_on_the_recipe_until_burn_in(tmp_path):
    loop = trainer(tmp_path, Greedy(2, burn_in=3))
    for step in range(3):
        task = loop.strategy.next_task(loop.state).task
        assert torch.equal(task[1], torch.full_like(task[0], 1 / 16)), step
        loop.budget.charge(steps=1)


def test_greedy_without_feedback_that_is_finite_trains_on_the_recipe(tmp_path):
    problem = Selectable()
    problem.feedback_loss = lambda theta, batch: (
        functional_call(Channels().learner, theta, (batch[0],)).sum() * float("nan")
    )
    loop = trainer(tmp_path, Greedy(2), problem)
    assert torch.equal(
        loop.strategy.next_task(loop.state).task[1][0],
        torch.full((16,), 1 / 16),
    )
    assert loop.strategy.feedback.num_skipped == 1


def test_hardest_takes_the_candidate_with_the_largest_loss(tmp_path):
    loop = trainer(tmp_path, Hardest(num_candidates=3))
    task = loop.strategy.next_task(loop.state).task
    theta = params.detach(params.named(loop.problem.learner))
    losses = [
        loop.problem.per_sample_tail(theta, candidate)({})
        for candidate in loop.problem.candidates(task[0], 3)
    ]
    torch.testing.assert_close(
        loop.problem.per_sample_tail(theta, task)({}), torch.stack(losses).max(0).values
    )


def test_uniform_is_one_random_candidate(tmp_path):
    loop = trainer(tmp_path, Uniform())
    batch, weights = loop.strategy.next_task(loop.state).task
    assert torch.equal(weights, loop.problem.candidates(batch, 1)[0][1])


def test_random_feedback_has_the_norm_of_the_true_one_and_another_direction(tmp_path):
    strategy = Learned(random_seed=1)
    problem = trainer(tmp_path, strategy).problem
    theta = params.detach(params.named(problem.learner))
    labelled = next(iter(problem.feedback_batches(0)))
    outer = lambda t: problem.feedback_loss(t, labelled)
    true = downstream(outer, theta)[1]
    noise = strategy.random.like(true)
    assert float(params.norm(noise)) == pytest.approx(float(params.norm(true)), rel=1e-5)
    assert abs(float(params.dot(noise, true)) / float(params.norm(true)) ** 2) < 0.4


def test_adversarial_moves_the_designer_up_the_pretraining_loss(tmp_path):
    loop = trainer(
        tmp_path,
        Adversarial(optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_norm=1e9),
        Channels(),
    )
    problem = loop.problem
    batch = next(iter(problem.pretrain_batches(loop.streams.meta.seed)))
    before = problem.designer.logits.detach().clone()
    theta = params.detach(params.named(problem.learner))
    loss = problem.pretrain_loss(theta, problem.designer(batch))
    (expected,) = torch.autograd.grad(loss, problem.designer.logits)
    loop.strategy.next_task(loop.state)
    torch.testing.assert_close(problem.designer.logits.detach() - before, expected)


def test_direct_adds_the_feedback_loss_to_the_learners_own(tmp_path):
    loop = trainer(tmp_path, Direct(weight=2.0, every=2))
    first = loop.strategy.next_task(loop.state)
    theta = params.detach(params.named(loop.problem.learner))
    labelled = next(iter(loop.problem.feedback_batches(loop.streams.feedback.seed)))
    torch.testing.assert_close(
        first.labelled_loss(theta), 2 * loop.problem.feedback_loss(theta, labelled)
    )
    loop.budget.charge(steps=1)
    assert loop.strategy.next_task(loop.state).labelled_loss is None


class Unmeasured(Channels):
    """Fails where it is measured or asked for a batch before what it lacks is named."""

    def evaluate(self):
        raise AssertionError("measured")

    def pretrain_batches(self, seed):
        raise AssertionError("read")

    feedback_batches = pretrain_batches


@pytest.mark.parametrize(
    ("strategy", "lacks"),
    [
        (Greedy(2, burn_in=4), "candidates"),
        (GreedySelection(2, burn_in=4), "per_sample_tail"),
        (Uniform(), "candidates"),
        (Hardest(2), "candidates"),
        (Tilt(burn_in=4), "tilt"),
        (Amortized(burn_in=4), "replay"),
        (Functional(burn_in=4), "output_values"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_strategy_needs_and_a_problem_lacks_is_named_before_step_0(
    tmp_path, strategy, lacks
):
    with pytest.raises(MetaVPTError, match=rf"needs .*{lacks}.*Unmeasured"):
        trainer(tmp_path, strategy, Unmeasured()).run()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Greedy(num_candidates=0), "num_candidates=0"),
        (lambda: GreedySelection(pool_batches=0), "pool_batches=0"),
        (lambda: Hardest(num_candidates=-1), "num_candidates=-1"),
        (lambda: Direct(weight=0.0), "weight=0"),
    ],
)
def test_bad_hyper_parameters_are_named(make, words):
    with pytest.raises(MetaVPTError, match=words):
        make()
