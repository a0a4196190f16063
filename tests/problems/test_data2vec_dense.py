"""data2vec with a linear map of features for its designer."""

import copy
from functools import partial

import pytest
import torch
from helpers.differences import relative
from helpers.small_data2vec import at, in_float64, maker, slope_of_value
from helpers.training import (
    Forgetful,
    adam,
    assert_identical,
    own_batch_run,
    teacher_passes,
    train,
    weights,
)
from torch.func import functional_call

from metavpt import (
    Budget,
    DifferenceProduct,
    Dot,
    ExactProduct,
    Fixed,
    Learned,
    OneStep,
    RunLog,
    Trainer,
)
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import CentralDifference, LinearLoss, LinearProduct
from metavpt.strategies.amortized import Amortized
from metavpt.strategies.controls import Adversarial, Direct, Uniform
from metavpt.strategies.learned import inner_loss
from metavpt.strategies.selection import Greedy, GreedySelection
from metavpt.strategies.tilted_targets import Tilt


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("rooms"), "designer=feature_targets")


def mapping(problem, std=0.3):
    return in_float64(problem, [problem.designer.map], std)


def test_the_loss_is_the_students_distance_from_the_moved_features_of_the_teacher(make):
    problem = mapping(make())
    task, (theta, *_) = problem.designer(next(iter(problem.meta_batches(1)))), at(problem)
    images, learner = task.images, problem.learner
    state = learner.backbone.trunk(images, hidden=task.hidden, mask_token=learner.mask_token)
    told = torch.nn.functional.layer_norm(
        learner.backbone.tail(state).patches.flatten(2).transpose(1, 2), (24,)
    )
    held = torch.nn.functional.layer_norm(
        problem.teacher(images).patches.flatten(2).transpose(1, 2), (24,)
    )
    y = (held - held.mean(dim=(0, 1))) @ problem.designer.map
    target = held + problem.designer.gate * y / (1 + y.square().mean()).sqrt()
    expected = (told - target).square().mean(dim=(1, 2))
    assert float(problem.pretrain_loss(theta, task).detach()) == pytest.approx(
        float(expected.mean()), rel=1e-10
    )
    torch.testing.assert_close(
        problem.per_sample_tail(theta, task)({}), expected.detach(), rtol=1e-10, atol=0
    )


def test_the_student_does_not_see_what_is_hidden(make):
    problem = make()
    task = problem.recipe(next(iter(problem.meta_batches(1))))
    side = problem.backbone.patch_size
    covered = (
        task.hidden.view(-1, 4, 4).repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    )
    noise = torch.where(covered, torch.randn_like(task.images), task.images)
    with torch.no_grad():
        assert covered.any()
        theta = params.named(problem.learner)
        seen, again = (
            problem._step(theta, task._replace(images=images)).student({})
            for images in (task.images, noise)
        )
        assert torch.equal(seen, again)


def test_linear_exact_and_difference_products_agree_and_are_finite_differences(make):
    """In float64, to a relative 1e-6: the targets enter the learner's gradient linearly."""
    problem = mapping(make())
    theta, aligned, batch, g_down = at(problem)
    labelled = next(iter(problem.feedback_batches(2)))
    inner, phi = inner_loss(problem, theta, batch), params.detach(params.named(problem.designer))
    outer = lambda theta_s: problem.feedback_loss({**theta, **theta_s}, labelled)
    by = {
        kind: OneStep(Dot(), kind())([inner], outer, aligned, phi)
        for kind in (ExactProduct, DifferenceProduct, LinearProduct)
    }
    assert params.norm(by[ExactProduct].by_phi) > 0
    assert isinstance(inner(phi), LinearLoss)
    for kind in (DifferenceProduct, LinearProduct):
        assert relative(by[kind].by_phi, by[ExactProduct].by_phi) < 1e-6
    direction = params.zip_with(torch.randn_like, phi)
    slope = slope_of_value(inner, aligned, g_down, phi, direction)
    assert slope == pytest.approx(-float(params.dot(by[ExactProduct].by_phi, direction)), rel=1e-6)


def test_adversarial_moves_the_designer_up_the_slope_of_the_pretraining_loss(make, tmp_path):
    """The slope by a central difference of the loss itself, in float64."""
    problem = mapping(make("designer.weight=0.0"))
    before = copy.deepcopy(problem)
    theta, phi = (params.detach(params.named(m)) for m in (before.learner, before.designer))
    direction = params.zip_with(torch.randn_like, phi)
    strategy = Adversarial(partial(torch.optim.SGD, lr=1.0), every=1, max_norm=1e9)
    seed = train(tmp_path, problem, strategy, steps=1).streams.meta.seed
    moved = params.add(params.detach(params.named(problem.designer)), phi, alpha=-1)
    batch = next(iter(before.meta_batches(seed)))

    def loss(step):
        task = functional_call(before.designer, params.add(phi, direction, alpha=step), (batch,))
        return float(before.pretrain_loss(theta, task).detach())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx(float(params.dot(moved, direction)), rel=1e-6)


def test_the_tilt_and_the_replayed_targets_raise_the_value_and_lower_the_feedback_loss(
    make,
):
    """<g_down, g_pre> of a moved task exceeds the recipe's by <shift, value>."""
    problem = mapping(make("designer.gate=0.5"), std=0.0)
    theta, aligned, batch, g_down = at(problem)
    derivative = CentralDifference()
    recipe = problem.recipe(batch)

    def value(task):
        leaves = params.leaves(aligned)
        g_pre = torch.autograd.grad(
            problem.pretrain_tail(theta, task)(leaves), list(leaves.values())
        )
        return sum(float((g * w).sum()) for g, w in zip(g_pre, g_down.values(), strict=True))

    tilted = problem.tilt(theta, recipe, g_down, 0.5, 1.0, 0, derivative)
    replay = problem.replay_batch(theta, batch, g_down, derivative)
    with torch.no_grad():
        raw = problem._values(theta, recipe, g_down, derivative)
    gain = 2 * float((tilted.shift * raw).mean())
    assert value(tilted) - value(recipe) == pytest.approx(gain, rel=1e-5)
    assert float(replay["values"].square().mean()) == pytest.approx(1.0, rel=1e-9)
    optimizer = torch.optim.Adam(problem.designer.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        problem.designer_loss(replay).backward()
        optimizer.step()
    assert value(recipe) < value(problem.designer(batch)) < value(tilted)


def test_taught_is_minus_the_value_of_the_designers_shift_and_its_regularizer(make):
    problem = mapping(make("designer.weight=0.3"))
    theta, _, batch, g_down = at(problem)
    replay = problem.replay_batch(theta, batch, g_down, CentralDifference())
    task = problem.designer(batch)
    with torch.no_grad():
        shift = (
            functional_call(problem.teacher, {}, (task.images,)).patches.flatten(2).transpose(1, 2)
        )
        shift = torch.nn.functional.layer_norm(shift, (24,))
        shift = (shift - shift.mean(dim=(0, 1))) @ problem.designer.map
        shift = problem.designer.gate * shift / (1 + shift.square().mean()).sqrt()
    expected = -float((shift * replay["values"]).mean()) + float(problem.designer.regularizer(task))
    assert float(problem.designer_loss(replay).detach()) == pytest.approx(expected, rel=1e-6)


def amortized():
    return Amortized(adam, every=2, phi_steps=3, derivative=CentralDifference())


@pytest.mark.parametrize(
    "strategy",
    [
        Fixed, amortized, lambda: Tilt(every=2, derivative=CentralDifference()),
        lambda: Tilt(tau=0.0, derivative=CentralDifference()),
        lambda: Tilt(random_seed=0, every=2, derivative=CentralDifference()),
        lambda: Learned(OneStep(product=LinearProduct(CentralDifference())), adam, every=2),
        lambda: Greedy(2, every=2), lambda: GreedySelection(2, every=2), Uniform, Direct,
    ],
    ids=[
        "fixed", "amortized", "tilt", "greedy_targets", "random_tilt", "one_step_linear", "greedy",
        "greedy_selection", "uniform", "direct",
    ],
)  # fmt: skip
def test_every_strategy_trains_and_resumes_bit_for_bit(make, tmp_path, strategy):
    whole, resumed = make(), make()
    train(tmp_path, whole, strategy(), steps=3)
    sorted((tmp_path / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed after step 2
    trainer = train(tmp_path, resumed, strategy(), steps=3, resume=True)
    assert trainer.budget.steps == 3
    assert_identical(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "strategy", [lambda p: Learned(optimizer=p, every=1), lambda p: Amortized(p, every=1)]
)
def test_with_designer_lr_0_it_is_fixed_bit_for_bit(make, tmp_path, strategy):
    fixed, still = make(), make()
    train(tmp_path / "fixed", fixed, Fixed(), steps=2)
    train(
        tmp_path / "still",
        still,
        strategy(lambda parameters: torch.optim.Adam(parameters, lr=0.0)),
        steps=2,
    )
    assert_identical(weights(fixed), weights(still))


def test_the_report_has_a_picture_of_the_targets(make, tmp_path):
    problem = make()
    train(tmp_path, problem, Fixed(), steps=1)
    figures = problem.figures()
    assert set(figures) == {"targets", "predictions"}
    assert figures["targets"].shape[1] >= 3 * 16
    assert figures["targets"].dtype == "uint8"


def test_an_update_on_the_learners_own_batch_asks_the_teacher_once(make, tmp_path):
    """The run is bit for bit that in which the step asks the teacher again."""
    known, again = make(), make()
    assert own_batch_run(tmp_path / "known", known)[1] == [1, 1, 1, 1]
    assert own_batch_run(tmp_path / "again", again, Forgetful)[1] == [1, 2, 1, 2]
    assert_identical(weights(known), weights(again))


def test_tilting_asks_the_teacher_once(make, tmp_path):
    strategy = Tilt(every=2, derivative=CentralDifference())
    trainer = Trainer(make(), strategy, Budget(steps=9), RunLog(tmp_path))
    trainer.step()
    assert teacher_passes(trainer, steps=3) == [1, 1, 1]
