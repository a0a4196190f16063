import pytest
import torch
from channels import Channels
from helpers.tiny_lm import TinyLanguage, tiny_designer, tiny_lm

from metavpt import Budget, Checkpoints, Fixed, Learned, OneStep, RunLog, Trainer
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import AdamAware
from metavpt.hypergradients.estimators import downstream
from metavpt.hypergradients.linear_targets import CentralDifference, ForwardMode, LinearProduct
from metavpt.objectives.prediction import Prediction
from metavpt.objectives.target_task import OneHot, Tilted
from metavpt.strategies.controls import Softened
from metavpt.strategies.tilted_targets import Tilt
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Stream, Streams, meta_batches


def trainer_of(folder, strategy):
    problem = TinyLanguage(tiny_lm().float(), tiny_designer().float())
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-3)
    return Trainer(
        problem,
        strategy,
        Budget(steps=6),
        RunLog(folder),
        Checkpoints(folder / "checkpoints"),
        optimizer=optimizer,
        log_every=1,
    )


def weights(trainer):
    return {
        name: p.clone() for name, p in params.detach(params.named(trainer.problem.learner)).items()
    }


def train(folder, strategy):
    trainer = trainer_of(folder, strategy)
    trainer.run()
    return weights(trainer)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def streams_of(problem):
    return Streams(
        *(
            Stream(source, 0)
            for source in (
                problem.pretrain_batches,
                meta_batches(problem),
                problem.feedback_batches,
            )
        )
    )


def tasks(strategy, num_steps, problem=None):
    """The proposals of the first steps, the learner standing still."""
    problem = problem or TinyLanguage()
    optimizer = torch.optim.AdamW(problem.learner.parameters(), lr=1e-3)
    strategy.start(problem)
    streams, budget, proposals = streams_of(problem), Budget(steps=99), []
    for _ in range(num_steps):
        proposals.append(strategy.next_task(TrainState(problem, streams, optimizer, budget)))
        budget.charge(steps=1)
    return proposals


def feedback_gradients(problem, count):
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    batches = [batch for batch, _ in zip(problem.feedback_batches(0), range(count), strict=False)]
    return [
        downstream(lambda p, b=batch: problem.feedback_loss({**theta, **p}, b), aligned)[1]
        for batch in batches
    ]


@pytest.mark.parametrize(
    "strategy",
    [
        Tilt(num_candidates=6, every=2, gate=0.0),
        Softened(gate=0.0, num_candidates=6),
        Tilt(random_seed=0, num_candidates=6, gate=0.0),
    ],
    ids=["tilt", "softened", "random_tilt"],
)
def test_with_a_gate_of_0_every_strategy_is_fixed_bit_for_bit(tmp_path, strategy):
    assert same(train(tmp_path / "a", Fixed()), train(tmp_path / "b", strategy))


def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(tmp_path):
    learned = Learned(
        OneStep(product=LinearProduct()), lambda p: torch.optim.Adam(p, lr=0.0), every=2
    )
    assert same(train(tmp_path / "a", Fixed()), train(tmp_path / "b", learned))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tilt(num_candidates=6, every=2),
        lambda: Tilt(num_candidates=6, every=2, tau=0.0),
        lambda: Tilt(random_seed=0, num_candidates=6, every=2),
        lambda: Softened("smoothing", num_candidates=6),
        lambda: Softened("self_distillation", num_candidates=6),
        lambda: Learned(
            OneStep(product=LinearProduct()), lambda p: torch.optim.Adam(p, lr=1e-2), every=2
        ),
    ],
    ids=["tilt", "greedy", "random_tilt", "smoothing", "self_distillation", "learned"],
)
def test_each_steers_the_learner_elsewhere_and_resumes_bit_for_bit(tmp_path, make):
    whole = train(tmp_path / "whole", make())
    assert not same(whole, train(tmp_path / "fixed", Fixed()))
    killed = trainer_of(tmp_path / "parts", make())
    for _ in range(3):
        killed.step()
    killed.save()
    resumed = trainer_of(tmp_path / "parts", make())
    resumed.resume()
    resumed.run()
    assert same(whole, weights(resumed))


def test_g_down_is_refreshed_and_averaged():
    problem = TinyLanguage()
    first, second, third = feedback_gradients(problem, 3)
    proposals = tasks(Tilt(num_candidates=6, every=2, ema=0.8), 5, problem)
    average = params.add(params.scale(first, 0.8), second, alpha=0.2)
    expected = [
        first,
        first,
        average,
        average,
        params.add(params.scale(average, 0.8), third, alpha=0.2),
    ]
    for proposal, w in zip(proposals, expected, strict=True):
        for name in w:
            torch.testing.assert_close(
                proposal.task.targets.w[name], w[name], rtol=1e-12, atol=1e-15
            )


def test_burn_in_trains_on_the_recipe():
    kinds = [
        type(proposal.task.targets)
        for proposal in tasks(Tilt(num_candidates=6, every=1, burn_in=2), 4)
    ]
    assert kinds == [OneHot, OneHot, Tilted, Tilted]


def test_the_direction_may_be_that_of_the_learners_own_optimizer():
    problem = TinyLanguage()
    (plain,) = tasks(Tilt(num_candidates=6), 1, problem)
    (aware,) = tasks(Tilt(num_candidates=6, direction=AdamAware()), 1, problem)
    w, v = plain.task.targets.w, aware.task.targets.w
    assert float(params.dot(w, v) / (params.norm(w) * params.norm(v))) < 0.999


def test_a_random_direction_has_the_length_of_the_true_one():
    problem = TinyLanguage()
    (true,), (noise,) = (
        tasks(Tilt(num_candidates=6, random_seed=seed), 1, problem) for seed in (None, 0)
    )
    w, v = true.task.targets.w, noise.task.targets.w
    torch.testing.assert_close(params.norm(v), params.norm(w))
    assert abs(float(params.dot(w, v) / params.norm(w) ** 2)) < 0.2


def test_the_tilt_is_worth_more_than_the_recipe_and_less_than_greedy():
    """V = <g_down, g_pre> of each task at the learner's own parameters."""
    problem = TinyLanguage()
    (g_down,) = feedback_gradients(problem, 1)
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in g_down}
    values = {}
    for name, strategy in {
        "fixed": Fixed(),
        "tilt": Tilt(num_candidates=6),
        "greedy": Tilt(num_candidates=6, tau=0.0),
    }.items():
        (proposal,) = tasks(strategy, 1, problem)
        gradient = downstream(
            lambda p, t=proposal.task: problem.pretrain_loss({**theta, **p}, t), aligned
        )[1]
        values[name] = float(params.dot(g_down, gradient))
    assert values["fixed"] < values["tilt"] < values["greedy"]


def test_both_derivatives_give_the_same_slope_in_float32():
    problem = TinyLanguage(tiny_lm().float())
    (proposal,) = tasks(Tilt(num_candidates=6), 1, problem)
    batch, targets = proposal.task
    prediction = Prediction.of(problem.learner, params.detach(params.named(problem.learner)), batch)
    exact, near = (
        prediction.slope(targets.w, derivative)
        for derivative in (ForwardMode(), CentralDifference())
    )
    assert float((near - exact).norm() / exact.norm()) < 1e-3


def test_bad_arguments_are_named():
    with pytest.raises(MetaVPTError, match=r"gate=1\.5"):
        Tilt(gate=1.5)
    with pytest.raises(MetaVPTError, match="ema=1"):
        Tilt(ema=1.0)
    with pytest.raises(MetaVPTError, match="kind=hard"):
        Softened(kind="hard")
    with pytest.raises(MetaVPTError, match="without targets"):
        tasks(Softened(), 1, Channels())
    with pytest.raises(MetaVPTError, match="Tilt needs tilt"):
        tasks(Tilt(), 1, Channels())
