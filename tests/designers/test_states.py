import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_lm import TinyLanguage, packed, tiny_lm

from metavpt.check.modes import Float64
from metavpt.designers.states import StateDesigner
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Dot
from metavpt.hypergradients.estimators import OneStep
from metavpt.hypergradients.linear_targets import ForwardMode, LinearProduct
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    value_and_gradient,
)
from metavpt.objectives.next_token import candidate_scores
from metavpt.objectives.prediction import Prediction
from metavpt.objectives.spread import spread
from metavpt.objectives.target_task import SoftTargets, TargetTask, Tilted, target_loss
from metavpt.strategies.learned import inner_loss

K = 6
BATCH = packed([[5, 7], [9]])


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


def state_designer(moved=0.0, gate=0.5):
    torch.manual_seed(2)
    designer = StateDesigner(16, hidden_width=5, num_candidates=K, gate=gate).double()
    if moved:
        with torch.no_grad():
            for p in designer.parameters():
                p.add_(moved * torch.randn_like(p))
    return designer


def problem_with(designer):
    return TinyLanguage(tiny_lm(), designer)


def task_of(designer):
    with torch.no_grad():
        return designer(BATCH)


def targets_of(task, learner):
    prediction = Prediction.of(learner, params.detach(params.named(learner)), task.batch)
    scores = prediction.scores(K)
    return (
        task.targets.rule(prediction)(scores.log_probs, scores.candidates, slice(None)),
        prediction,
        scores,
    )


def test_with_a_gate_of_0_it_is_the_recipe_bit_for_bit():
    learner, designer = tiny_lm(), state_designer(moved=0.3, gate=0.0)
    theta = params.named(learner)
    plain, own = (
        value_and_gradient(lambda p, t=t: target_loss(learner, p, t), theta)
        for t in (designer.recipe_task(BATCH), task_of(designer))
    )
    assert torch.equal(plain[0], own[0])
    assert all(torch.equal(plain[1][name], own[1][name]) for name in theta)


def test_targets_are_what_the_learner_predicts_from_the_moved_states():
    learner, designer = tiny_lm(), state_designer(moved=0.3)
    with torch.no_grad():
        q, prediction, scores = targets_of(task_of(designer), learner)
        states = (
            prediction.states
            / (
                prediction.states.square().mean(dim=1, keepdim=True)
                + torch.finfo(torch.float64).eps
            ).sqrt()
        )
        moves = designer.moves(torch.nn.functional.gelu(designer.features(states)))
        logits = (prediction.states + moves) @ prediction.unembedding.T
        r = logits.gather(1, scores.candidates).softmax(dim=1)
    expected = 0.5 * r
    expected[:, 0] += 0.5
    torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-13)


def test_with_the_states_derivative_for_a_move_it_is_the_closed_form():
    """`Tilted` is the prediction from h - dh[w] / (tau s)."""
    learner = tiny_lm()
    g = torch.Generator().manual_seed(5)
    theta = params.detach(params.named(learner))
    w = {
        name: torch.randn(theta[name].shape, generator=g, dtype=torch.float64)
        for name in learner.aligned_parameters()
    }
    q, prediction, scores = targets_of(TargetTask(BATCH, Tilted(w, 0.5, 2.0, K)), learner)
    moves = -prediction.slope(w, ForwardMode())
    scale = spread(
        (moves @ prediction.unembedding.T).gather(1, scores.candidates), scores.log_probs
    )
    logits = (prediction.states + moves / (2.0 * scale)) @ prediction.unembedding.T
    r = logits.gather(1, scores.candidates).softmax(dim=1)
    torch.testing.assert_close(q[:, 1:], 0.5 * r[:, 1:], rtol=1e-9, atol=1e-12)


def test_its_linear_product_is_the_exact_one():
    problem = problem_with(state_designer(moved=0.2))
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    outer = lambda p: problem.feedback_loss({**theta, **p}, packed([[8]], seed=9))
    inner, phi = inner_loss(problem, theta, BATCH), params.named(problem.designer)
    products = (LinearProduct(), ExactProduct(), DifferenceProduct())
    by = [OneStep(Dot(), product)([inner], outer, aligned, phi).by_phi for product in products]
    size = params.norm(by[1])
    assert all(float(g.abs().max()) > 0 for g in by[1].values())
    assert float(params.norm(params.add(by[0], by[1], alpha=-1.0)) / size) < 1e-9
    assert float(params.norm(params.add(by[2], by[1], alpha=-1.0)) / size) < 1e-6


def test_a_new_designer_is_the_learners_own_prediction_and_has_a_gradient_to_leave_it():
    problem = problem_with(state_designer())
    theta = params.detach(params.named(problem.learner))
    q, _, _ = targets_of(task_of(problem.designer), problem.learner)
    own, _, _ = targets_of(TargetTask(BATCH, SoftTargets(0.5, K)), problem.learner)
    assert torch.equal(q, own)
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    outer = lambda p: problem.feedback_loss({**theta, **p}, packed([[8]], seed=9))
    new = OneStep(product=LinearProduct())(
        [inner_loss(problem, theta, BATCH)], outer, aligned, params.named(problem.designer)
    ).by_phi
    assert float(new["moves.bias"].abs().min()) > 0


def test_a_task_holds_no_graph_and_does_not_follow_the_designer():
    designer = state_designer(moved=0.3)
    task, learner = task_of(designer), tiny_lm()
    assert not task.targets.requires_grad
    before = targets_of(task, learner)[0]
    with torch.no_grad():
        designer.moves.bias.add_(1.0)
    assert torch.equal(targets_of(task, learner)[0], before)


def replay_of(learner, designer, rows=None):
    g = torch.Generator().manual_seed(5)
    theta = params.detach(params.named(learner))
    w = {
        name: torch.randn(theta[name].shape, generator=g, dtype=torch.float64)
        for name in learner.aligned_parameters()
    }
    prediction = Prediction.of(learner, theta, BATCH)
    return designer.replay_batch(prediction, w, ForwardMode(), rows), prediction, w


def test_the_loss_is_least_where_targets_are_the_closed_form():
    """Over free logits of r the loss is least at those of `Tilted`, where its gradient vanishes."""
    learner, designer = tiny_lm(), state_designer(moved=0.3)
    designer.tau = 0.8
    lesson, prediction, w = replay_of(learner, designer)
    assert torch.allclose(
        (lesson["log_probs"].exp() * lesson["values"]).sum(dim=1),
        torch.zeros(len(lesson["values"])).double(),
        atol=1e-12,
    )
    assert float(
        (lesson["log_probs"].exp() * lesson["values"].square()).sum(dim=1).mean()
    ) == pytest.approx(1.0, rel=1e-12)

    def loss(scores):
        log_r = (lesson["log_probs"] + scores).log_softmax(dim=1)
        return (
            -(log_r.exp() * (lesson["values"] - 0.8 * (log_r - lesson["log_probs"])))
            .sum(dim=1)
            .mean()
        )

    best = (lesson["values"] / 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best), best)
    assert float(gradient.abs().max()) < 1e-14
    q = Tilted(w, 0.5, 0.8, K).rule(prediction)(*reversed(prediction.scores(K)), slice(None))
    torch.testing.assert_close(
        0.5 * (lesson["log_probs"] + best.detach()).softmax(dim=1)[:, 1:],
        q[:, 1:],
        rtol=1e-9,
        atol=1e-12,
    )
    own = designer.loss(lesson, prediction.unembedding).detach()
    assert float(own) > float(loss(best).detach())
    with torch.no_grad():
        moves = designer.moves(F.gelu(designer.features(F.rms_norm(lesson["states"], (16,)))))
        scores = candidate_scores(moves, prediction.unembedding, lesson["candidates"])
    torch.testing.assert_close(own, loss(scores), rtol=1e-10, atol=0)


def test_a_replay_batch_is_of_the_marked_rows_and_may_be_empty():
    learner, designer = tiny_lm(), state_designer(moved=0.3)
    whole, prediction, _ = replay_of(learner, designer)
    first, _, _ = replay_of(learner, designer, torch.tensor([True, False]))
    count = int(prediction.predicted[0].sum())
    assert torch.equal(first["candidates"], whole["candidates"][:count])
    none, _, _ = replay_of(learner, designer, torch.tensor([False, False]))
    loss = designer.loss(none, prediction.unembedding)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in designer.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(MetaVPTError, match="gate=2"):
        StateDesigner(8, gate=2)
    with pytest.raises(MetaVPTError, match="tau=0"):
        StateDesigner(8, tau=0)
