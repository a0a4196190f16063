"""The derivative through the learner's real step, and implicit solves, in float64."""

import dataclasses
import math

import pytest
import torch
from channels import Channels
from helpers.small_data2vec import maker
from helpers.small_dino import SMALL, UNET
from helpers.verdicts import findings
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import (
    AdamAware,
    ConjugateGradient,
    Cosine,
    DampedLanczos,
    ExactProduct,
    Implicit,
    OneStep,
    Unrolled,
)
from metavpt.check.learner_step import learner_step
from metavpt.check.scene import Scene
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import optimizer_updates

ADAMW = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)
ACTIVE = 0.05  # gradients have norms of about 0.4


@pytest.fixture
def scene() -> Scene:
    torch.manual_seed(0)
    return Scene.of(Channels()).double()


def errors(measured: str) -> list[float]:
    """The relative errors of the exact and the difference product."""
    said = measured.split("finite differences ")[1]
    return [float(said.split(" exact")[0]), float(said.split("exact, ")[1].split(" by")[0])]


@pytest.mark.parametrize("clip_norm", [ACTIVE, math.inf], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(
    "estimator", [None, OneStep(Cosine()), OneStep(AdamAware()), Unrolled(4), Unrolled(6)], ids=str
)
def test_exact_difference_and_finite_difference_products_agree(scene, estimator, clip_norm) -> None:
    (found,) = learner_step(scene, estimator, ADAMW, clip_norm)
    assert (found.name, found.verdict) == ("learner_step", "ok")
    assert max(errors(found.measured)) < 1e-4
    if estimator is not None and estimator.needs_update:
        assert "cosine 1.0000" in found.measured


@pytest.mark.parametrize("estimator", [OneStep(AdamAware()), Unrolled(2)], ids=str)
def test_an_update_without_the_derivative_of_clipping_is_found(
    scene, estimator, monkeypatch
) -> None:
    """The derivative of the unclipped step, scaled as the clipped one is."""
    monkeypatch.setattr(
        optimizer_updates.ClipGradNorm,
        "clip_vjp",
        lambda self, grad, ct: optimizer_updates.params.scale(ct, 0.1),
    )
    (found,) = learner_step(scene, estimator, ADAMW, ACTIVE)
    assert found.verdict == "failed"
    assert min(errors(found.measured)) > 0.05


def test_the_problem_stays_where_it_was(scene) -> None:
    before = {name: p.clone() for name, p in scene.problem.learner.state_dict().items()}
    learner_step(scene, Unrolled(2), ADAMW, ACTIVE)
    for name, p in scene.problem.learner.state_dict().items():
        assert torch.equal(p, before[name])


def test_solves_are_checked_by_a_product_of_their_own(scene) -> None:
    good = Implicit(ConjugateGradient(200, 1e-10), damping=0.5)
    step, solve = learner_step(scene, good, ADAMW, ACTIVE)
    assert (step.verdict, solve.name, solve.verdict) == ("ok", "implicit_solve", "ok")
    assert solve.measured.startswith("residuals 0.000, 0.000, 0.000, 0.000;")
    assert max(errors(solve.measured)) < 1e-4

    weak = dataclasses.replace(good, solve=ConjugateGradient(1, 1e-10), damping=0.01)
    _, solve = learner_step(scene, weak, ADAMW, ACTIVE)
    assert solve.verdict in {"warning", "failed"}
    assert "raise damping" in solve.advice


def test_a_solver_that_praises_itself_fails(scene) -> None:
    @dataclasses.dataclass(frozen=True)
    class Boastful(ConjugateGradient):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)._replace(residual=0.01, converged=True)

    _, solve = learner_step(scene, Implicit(Boastful(1), damping=0.01), ADAMW, ACTIVE)
    assert solve.verdict == "failed"
    assert "residual" in solve.advice


def test_the_suite_shows_both() -> None:
    torch.manual_seed(0)
    estimator = Implicit(DampedLanczos(4, 0.3))
    found = findings(Channels(), estimator=estimator, optimizer=ADAMW, clip_norm=ACTIVE)
    assert found["learner_step"].verdict == "ok"
    assert found["implicit_solve"].verdict == "ok"


def test_the_shipped_dino_problem_agrees_through_clipped_steps_and_its_solves_end_below_a_half():
    """At its smallest; the mask's teacher is credited, as finite differences see it."""
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*SMALL, *UNET, "strategy=implicit"])
    torch.manual_seed(0)
    problem = instantiate(cfg.problem)
    problem.teacher_credit = True
    dino = Scene.of(problem).double()
    make, clip_norm = instantiate(cfg.trainer.optimizer), cfg.trainer.clip_norm
    step, solve = learner_step(dino, instantiate(cfg.strategy).estimator, make, clip_norm)
    (steps,) = learner_step(dino, Unrolled(2), make, clip_norm)
    assert [found.verdict for found in (step, solve, steps)] == ["ok", "ok", "ok"]
    assert max(errors(step.measured) + errors(solve.measured) + errors(steps.measured)) < 1e-3
    residuals = [float(said) for said in solve.measured.split(";")[0].split(" ", 1)[1].split(", ")]
    assert len(residuals) == 4
    assert max(residuals) < 0.5


def test_the_solves_of_the_shipped_data2vec_problem_end_below_a_half(tmp_path):
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", ["problem=toy_sources", "strategy=implicit"])
    data2vec = Scene.of(maker(tmp_path)()).double()
    sgd = lambda p: torch.optim.SGD(p, lr=0.3)
    *_, solve = learner_step(data2vec, instantiate(cfg.strategy).estimator, sgd, math.inf)
    residuals = [float(said) for said in solve.measured.split(";")[0].split(" ", 1)[1].split(", ")]
    assert len(residuals) == 4
    assert max(residuals) < 0.5


def test_weights_of_a_policy_are_held_within_a_step_and_follow_the_learner_between_steps(tmp_path):
    torch.manual_seed(0)
    options = "feedback=cross_fitted", "designer.hidden_width=8", "problem.feedback_batch_size=8"
    make = maker(tmp_path, *options)
    policy = Scene.of(make("designer=feature_policy")).double()
    sgd = lambda p: torch.optim.SGD(p, lr=0.3)
    # differences of two steps have an error of their own, which the verdict allows for
    for estimator, most in ((OneStep(), 1e-6), (Unrolled(2, product=ExactProduct()), 1e-2)):
        (found,) = learner_step(policy, estimator, sgd, math.inf)
        assert found.verdict == "ok", found
        errors = found.measured.split("finite differences ")[1]
        exact, difference = (float(said.split()[0]) for said in errors.split(", ")[:2])
        assert max(exact, difference) < most


def test_an_optimizer_without_a_rule_fails_with_its_name() -> None:
    with pytest.raises(MetaVPTError, match="RMSprop"):
        learner_step(Scene.of(Channels()).double(), None, lambda p: torch.optim.RMSprop(p), ACTIVE)
