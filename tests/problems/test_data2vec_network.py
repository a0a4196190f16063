"""data2vec with a network that moves features as its designer, trained in function space."""

import pytest
import torch
from helpers.differences import relative
from helpers.small_data2vec import at, in_float64, maker, slope_of_value
from helpers.training import adam, assert_identical, train, weights
from hydra.errors import InstantiationException

from metavpt import Dot, ExactProduct, Fixed, OneStep
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import CentralDifference, LinearProduct
from metavpt.strategies.amortized import Amortized
from metavpt.strategies.function_space import Functional
from metavpt.strategies.learned import inner_loss


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("rooms"), "designer.hidden_width=8")


def moving(problem):
    return in_float64(problem, problem.designer.network.write.parameters(), 0.3)


def test_a_network_moves_the_targets_and_its_products_agree(make):
    """exact = linear = finite differences in phi, in float64, to a relative 1e-6."""
    problem = moving(make())
    theta, aligned, batch, g_down = at(problem)
    with torch.no_grad():
        task = problem.designer(batch)
        states, features = problem._described(task.images)
        told = problem._step(theta, task).student({})
        expected = (
            (told - features - problem.designer.moves(task, states, features)).square().mean()
        )
    assert float(problem.pretrain_loss(theta, task).detach()) == pytest.approx(
        float(expected), rel=1e-10
    )
    labelled = next(iter(problem.feedback_batches(2)))
    inner, phi = inner_loss(problem, theta, batch), params.detach(params.named(problem.designer))
    outer = lambda theta_s: problem.feedback_loss({**theta, **theta_s}, labelled)
    by = {
        kind: OneStep(Dot(), kind())([inner], outer, aligned, phi)
        for kind in (ExactProduct, LinearProduct)
    }
    assert params.norm(by[ExactProduct].by_phi) > 0
    assert relative(by[LinearProduct].by_phi, by[ExactProduct].by_phi) < 1e-6
    direction = params.zip_with(torch.randn_like, phi)
    slope = slope_of_value(inner, aligned, g_down, phi, direction)
    assert slope == pytest.approx(-float(params.dot(by[ExactProduct].by_phi, direction)), rel=1e-6)


def amortized():
    return Amortized(adam, every=2, phi_steps=3, derivative=CentralDifference())


def functional(permute=False):
    return Functional(adam, permute=permute, phi_steps=3, batch_size=2, every=2)


RESIDUALS = ("designer=residuals", "feedback=cross_fitted", "problem.feedback_batch_size=null")


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (functional, RESIDUALS),
        (lambda: functional(permute=True), RESIDUALS),
        (functional, ("designer=patch_policy", *RESIDUALS[1:], "problem.hidden_at=tail")),
        (functional, ("designer=feature_policy", *RESIDUALS[1:], "+backbone.frozen_blocks=1")),
        (amortized, ()),
    ],
    ids=["functional", "random_functional", "patch_policy", "feature_policy", "amortized"],
)
def test_a_network_trains_and_resumes_bit_for_bit_and_differs_from_fixed(
    make, tmp_path, strategy, options
):
    whole, resumed, fixed = make(*options), make(*options), make(*options)
    train(tmp_path, whole, strategy(), steps=3)
    sorted((tmp_path / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed after step 2
    train(tmp_path, resumed, strategy(), steps=3, resume=True)
    assert_identical(weights(whole), weights(resumed))
    train(tmp_path / "fixed", fixed, Fixed(), steps=3)
    learner = "learner.backbone.tail.norm.weight"
    assert not torch.equal(weights(whole)[learner], weights(fixed)[learner])


@pytest.mark.parametrize("designer", ["residuals", "patch_policy", "feature_policy"])
def test_a_network_that_learns_nothing_is_fixed_bit_for_bit(make, tmp_path, designer):
    options = (f"designer={designer}", *RESIDUALS[1:])
    fixed, still = make(*options), make(*options)
    train(tmp_path / "fixed", fixed, Fixed(), steps=2)
    strategy = Functional(
        lambda parameters: torch.optim.Adam(parameters, lr=0.0),
        phi_steps=2,
        batch_size=2,
        every=1,
    )
    train(tmp_path / "still", still, strategy, steps=2)
    made, expected = weights(still), weights(fixed)
    made["designer.directions"] = expected["designer.directions"]  # of the heads, not learned
    assert_identical(expected, made)


def test_the_parts_of_a_batch_share_the_network_whatever_its_width(make):
    problem = moving(make("designer.hidden_width=4"))  # as wide as the batch is long
    theta, batch = params.detach(params.named(problem.learner)), next(iter(problem.meta_batches(1)))
    with torch.no_grad():
        task = problem.designer(batch)
        whole = problem.pretrain_loss(theta, task)
        parts = [problem.pretrain_loss(theta, part) for part in problem.microbatches(task, 2)]
    assert float(sum(parts)) / 2 == pytest.approx(float(whole), rel=1e-12)


def test_feedback_is_of_the_pool_that_is_asked_for(make):
    every, meta = (
        make("+problem.feedback_pool=labelled", "problem.feedback_batch_size=24"),
        make("problem.feedback_batch_size=8"),
    )
    assert len(next(iter(every.feedback_batches(0)))["labelled"].image) == 24
    assert len(next(iter(meta.feedback_batches(0)))["labelled"].image) == 8
    assert not set(every.data.labelled) & set(every.data.val)
    with pytest.raises(
        InstantiationException, match=r"problem\.feedback_pool=all: known are meta, labelled"
    ):
        make("+problem.feedback_pool=all")
