"""Aggregation rules on two quadratic feedbacks with known gradients, in float64."""

import copy
import itertools
from typing import ClassVar

import pytest
import torch
from helpers.pulled import CONFLICT, THREE, Pulled, Summed, gradient, hypergradient, rule, trainer

from metavpt import (
    ConjugateGradient,
    Cosine,
    Dot,
    ExactProduct,
    Implicit,
    Learned,
    MetaVPTError,
    OneStep,
    Unrolled,
)
from metavpt.feedback.aggregation import WEIGHTINGS, DomainMatched, TorchJD, WeightedSum
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.hypergradients.optimizer_updates import SGD
from metavpt.strategies.learned import inner_loss

ESTIMATORS = {
    "one_step": OneStep(Dot(), ExactProduct()),
    "cosine": OneStep(Cosine(), ExactProduct()),
    "unrolled": Unrolled(2, SGD(0.1), ExactProduct()),
    "implicit": Implicit(ConjugateGradient(), 0.5, ExactProduct()),
}


def scaled(scale):
    return {name: [scale * value for value in g] for name, g in CONFLICT.items()}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_weighted_sum_is_the_loss_written_by_hand_bit_for_bit_at_the_same_cost(estimator):
    weights = {"a": 0.7, "b": 1.9}
    ours = hypergradient(Pulled(CONFLICT, weights), estimator)
    by_hand = hypergradient(Summed(CONFLICT, weights), estimator)
    assert torch.equal(ours.by_phi["logits"], by_hand.by_phi["logits"])
    assert (ours.value, ours.grad_evals, ours.diagnostics) == (
        by_hand.value,
        by_hand.grad_evals,
        by_hand.diagnostics,
    )


def test_the_gradient_of_the_weighted_sum_is_the_hand_computation():
    problem = Pulled(CONFLICT, {"a": 0.7, "b": 1.9})
    expected = 0.7 * problem.gradients["a"] + 1.9 * problem.gradients["b"]
    torch.testing.assert_close(
        gradient(WeightedSum(), problem)[0], expected, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (CONFLICT["a"], CONFLICT["b"]),
        ([1.0, 0, 0, 0], [3.0, 0.5, 0, 0]),
        ([4.0, 1.0, 0, 0], [1.0, 0, 0, 0]),
        ([1e-4, 0, 0, 0], [-2e-4, 1e-4, 0, 0]),
    ],
    ids=["conflict", "all_a", "all_b", "small"],
)
def test_mgda_on_two_gradients_is_the_closed_form(a, b):
    """gamma_a = clip(<g_b - g_a, g_b> / |g_a - g_b|^2, 0, 1) (Sener and Koltun 2018)."""
    problem = Pulled({"a": a, "b": b})
    g, combined = gradient(rule("MGDA"), problem)
    g_a, g_b = problem.gradients.values()
    gamma = float(((g_b - g_a) @ g_b / (g_a - g_b).square().sum()).clamp(0, 1))
    assert combined.record["weight/a"] == pytest.approx(gamma, abs=1e-12)
    assert combined.record["weight/b"] == pytest.approx(1 - gamma, abs=1e-12)
    assert combined.record["conflict/a-b"] == pytest.approx(
        float(torch.cosine_similarity(g_a, g_b, dim=0)), abs=1e-12
    )
    torch.testing.assert_close(g, gamma * g_a + (1 - gamma) * g_b, rtol=1e-11, atol=1e-14)


def least_square_norm(gramian):
    """min lambda^T G lambda over the simplex, by the stationary points of all its faces."""
    found = []
    for size in range(1, len(gramian) + 1):
        for face in itertools.combinations(range(len(gramian)), size):
            kkt = torch.ones(size + 1, size + 1, dtype=gramian.dtype)
            kkt[:size, :size], kkt[size, size] = gramian[list(face)][:, list(face)], 0
            right = torch.zeros(size + 1, 1, dtype=gramian.dtype)
            right[size] = 1
            point = torch.linalg.lstsq(kkt, right, driver="gelsd").solution[:size, 0]
            if (point >= -1e-12).all() and abs(float(point.sum()) - 1) < 1e-9:
                found.append(float(point @ kkt[:size, :size] @ point))
    return min(found)


@pytest.mark.parametrize("seed", range(40))
def test_mgda_is_the_least_norm_in_the_convex_hull(seed):
    """Three to six gradients in conflict; some seeds repeat one or hold a zero."""
    generator = torch.Generator().manual_seed(seed)
    count = 3 + seed % 4
    gradients = torch.randn(count, 9, generator=generator, dtype=torch.float64)
    gradients[0] *= 10
    if seed % 5 == 1:
        gradients[1] = gradients[2]
    if seed % 5 == 2:
        gradients[1] = 0
    gramian = gradients @ gradients.T
    lambdas = TorchJD("MGDA").lambdas(gramian)
    assert (lambdas >= 0).all()
    assert float(lambdas.sum()) == pytest.approx(1, abs=1e-12)
    square_norm = float(lambdas @ gramian @ lambdas)
    assert square_norm == pytest.approx(least_square_norm(gramian), rel=1e-6, abs=1e-12)


def test_upgrad_on_two_conflicting_gradients_is_the_mean_of_their_projections():
    problem = Pulled(CONFLICT)
    g, _ = gradient(rule("UPGrad"), problem)
    g_a, g_b = problem.gradients.values()
    assert g_a @ g_b < 0
    projected = g_a - (g_a @ g_b) / (g_b @ g_b) * g_b, g_b - (g_a @ g_b) / (g_a @ g_a) * g_a
    torch.testing.assert_close(g, (projected[0] + projected[1]) / 2, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradients", [CONFLICT, THREE], ids=["two", "three"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("MGDA", {}), ("UPGrad", {}), ("DualProj", {})],
)
def test_the_direction_opposes_no_feedback(name, options, gradients):
    """<d, g_j> >= 0, which the plain sum breaks on the same gradients."""
    problem = Pulled(gradients)
    d, _ = gradient(rule(name, **options), problem)
    cosines = [float(torch.cosine_similarity(d, g, dim=0)) for g in problem.gradients.values()]
    assert min(cosines) > -1e-5
    plain, _ = gradient(WeightedSum(), problem)
    assert min(float(plain @ g) for g in problem.gradients.values()) < -0.1


def test_upgrad_by_torchjds_own_solver():
    """The same weights as scipy, also for small gradients, up to its regularisation of 1e-4."""
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")
    for scale in (1.0, 1e-4):
        problem = Pulled(scaled(scale))
        own, by_scipy = (
            gradient(combination, problem)[1].record
            for combination in (TorchJD("UPGrad"), rule("UPGrad"))
        )
        assert own == pytest.approx(by_scipy, rel=2e-3)


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name not in ("CAGrad",)])
def test_every_weighting_is_indifferent_to_the_unit_of_the_losses(name):
    """Up to one common factor, which directions undo."""
    combination = rule(name, **({"alpha": 2.0} if name == "FairGrad" else {}))
    directions = []
    for scale in (1.0, 1e-5):
        d, _ = gradient(combination, Pulled(scaled(scale)))
        directions.append(d / d.norm())
    torch.testing.assert_close(*directions, rtol=1e-6, atol=1e-6)


def test_normalize_compares_directions_only():
    """lambda_j |g_j| is the rule's answer for unit gradients: for MGDA on two, the bisector."""
    pytest.importorskip("torchjd")
    problem = Pulled(CONFLICT, {"a": 10.0, "b": 0.1})
    g, combined = gradient(TorchJD("MGDA", normalize=True), problem)
    g_a, g_b = (
        weight * g for weight, g in zip((10.0, 0.1), problem.gradients.values(), strict=True)
    )
    length = ((g_a.square().sum() + g_b.square().sum()) / 2).sqrt()
    torch.testing.assert_close(
        g, length * (g_a / g_a.norm() + g_b / g_b.norm()) / 2, rtol=1e-12, atol=1e-12
    )
    assert combined.record["weight/a"] == pytest.approx(
        10.0 * float(length / g_a.norm() / 2), rel=1e-12
    )


def test_sum_changes_nothing_and_logs_the_conflict():
    pytest.importorskip("torchjd")
    weights = {"a": 0.7, "b": 1.9}
    g, combined = gradient(TorchJD("Sum"), Pulled(CONFLICT, weights))
    torch.testing.assert_close(
        g, gradient(WeightedSum(), Pulled(CONFLICT, weights))[0], rtol=1e-14, atol=0
    )
    assert (combined.record["weight/a"], combined.record["weight/b"]) == (0.7, 1.9)
    assert combined.record["conflict/a-b"] < 0


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_every_estimator_takes_the_combined_loss_and_the_extra_gradients_are_charged(estimator):
    pytest.importorskip("torchjd")
    found = hypergradient(Pulled(CONFLICT), estimator, TorchJD("MGDA"))
    weights = {name: found.diagnostics[f"weight/{name}"] for name in CONFLICT}
    by_hand = hypergradient(Summed(CONFLICT, weights), estimator)
    torch.testing.assert_close(found.by_phi, by_hand.by_phi, rtol=1e-12, atol=1e-14)
    assert found.grad_evals == by_hand.grad_evals + 2


@pytest.mark.parametrize("combination", [WeightedSum(), "MGDA", "UPGrad"])
def test_a_weight_of_zero_is_the_other_feedback_alone_at_its_cost(combination):
    combination = rule(combination) if isinstance(combination, str) else combination
    both = hypergradient(Pulled(CONFLICT, {"a": 1.0, "b": 0.0}), OneStep(), combination)
    alone = hypergradient(Summed(CONFLICT, {"a": 1.0, "b": 0.0}), OneStep())
    assert torch.equal(both.by_phi["logits"], alone.by_phi["logits"])
    assert both.grad_evals == alone.grad_evals
    assert both.diagnostics == alone.diagnostics


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_domain_matched_is_the_weighted_mean_of_separate_estimates(estimator):
    problem = Pulled(CONFLICT, {"a": 1.0, "b": 3.0})
    found = hypergradient(problem, estimator, DomainMatched())
    streams = trainer(problem, Learned(estimator)).streams
    batches = [next(streams.meta) for _ in range(estimator.num_batches)]
    theta = params.detach(params.named(problem.learner))
    phi, estimates = params.named(problem.designer), {}
    for j, (name, goal) in enumerate(problem.goals.items()):
        inner = [inner_loss(problem, theta, batch[batch[:, 4] == j]) for batch in batches]
        outer = lambda theta_s, goal=goal: ((theta_s["p"] - goal) ** 2).sum() / 2
        g_pre = value_and_gradient(inner[0](phi), theta)[1]
        estimates[name] = estimator(inner, outer, theta, phi).relative(
            lambda g=g_pre: float(params.norm(g))
        )
    expected = 0.25 * estimates["a"].by_phi["logits"] + 0.75 * estimates["b"].by_phi["logits"]
    torch.testing.assert_close(found.by_phi["logits"], expected, rtol=1e-12, atol=1e-14)
    assert found.value == pytest.approx(
        0.25 * estimates["a"].value + 0.75 * estimates["b"].value, rel=1e-12
    )
    assert found.grad_evals == estimates["a"].grad_evals + estimates["b"].grad_evals
    assert found.diagnostics["feedback_loss/b"] == estimates["b"].diagnostics["feedback_loss"]
    assert found.diagnostics["value/a"] == estimates["a"].value


def test_each_domain_starts_its_solve_from_its_own_solution(tmp_path):
    class Recording(Implicit):
        starts: ClassVar = []

        def __call__(self, *args, start=None, **options):
            self.starts.append(start)
            return super().__call__(*args, start=start, **options)

    problem = Pulled(CONFLICT)
    strategy = Learned(
        Recording(damping=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1),
        every=1,
        combination=DomainMatched(),
    )
    loop = trainer(problem, strategy, tmp_path, steps=2)
    loop.step()
    kept = copy.deepcopy(strategy.state_dict()["solutions"])
    assert not torch.equal(kept["a"]["p"], kept["b"]["p"])
    strategy.load_state_dict(copy.deepcopy(strategy.state_dict()))
    loop.step()
    first, second = Recording.starts[:2], Recording.starts[2:]
    assert first == [None, None]
    assert [
        torch.equal(start["p"], kept[name]["p"]) for start, name in zip(second, "ab", strict=True)
    ] == [True, True]


@pytest.mark.parametrize(
    "domains", [["a"], ["a", "b", "c"], []], ids=["missing", "unknown", "none"]
)
def test_domains_that_do_not_match_name_both_lists(domains):
    problem = Pulled(CONFLICT)
    problem.by_domain = lambda batch: dict.fromkeys(domains, batch)
    with pytest.raises(
        MetaVPTError,
        match=f"by_domain gives {', '.join(domains) or 'nothing'}, the feedbacks are a, b",
    ):
        hypergradient(problem, OneStep(), DomainMatched())


def test_a_domain_without_weight_needs_no_batch_and_may_have_one():
    problem = Pulled(THREE, {"a": 1.0, "b": 1.0, "c": 0.0})
    with_batch = hypergradient(problem, OneStep(), DomainMatched())
    split = problem.by_domain
    problem.by_domain = lambda batch: {name: split(batch)[name] for name in "ab"}
    assert torch.equal(
        with_batch.by_phi["logits"],
        hypergradient(problem, OneStep(), DomainMatched()).by_phi["logits"],
    )


def test_a_problem_without_by_domain_says_so():
    class Whole(Pulled):
        @property
        def by_domain(self):
            raise AttributeError

    with pytest.raises(
        MetaVPTError,
        match=r"DomainMatched needs by_domain .*Whole",
    ):
        hypergradient(Whole(CONFLICT), OneStep(), DomainMatched())
