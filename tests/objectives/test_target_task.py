import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_lm import VOCAB, dense_log_probs, packed, tiny_lm
from scipy.optimize import minimize

from metavpt.check.modes import Float64
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import CentralDifference, ForwardMode
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.objectives.next_token import select_candidates
from metavpt.objectives.prediction import Prediction, predicted_tokens
from metavpt.objectives.target_task import (
    OneHot,
    SoftTargets,
    TargetTask,
    Tilted,
    target_loss,
    target_loss_per_sample,
    target_tail,
)

K = 6
BATCH = packed([[5, 7], [9]])


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


@pytest.fixture
def learner():
    return tiny_lm()


def theta_of(learner):
    return params.detach(params.named(learner))


def direction(learner, seed=5):
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(theta_of(learner)[name].shape, generator=g, dtype=torch.float64)
        for name in learner.aligned_parameters()
    }


def candidates_of(learner, batch=BATCH):
    """log p of the candidates and the candidates, (N, K) each."""
    with torch.no_grad():
        log_probs = dense_log_probs(learner, theta_of(learner), batch)
    candidates = select_candidates(log_probs, batch.tokens[batch.loss_mask], K)
    return log_probs.gather(1, candidates), candidates


def made(targets, learner, batch=BATCH):
    """q (N, K) as the loss would make it."""
    rule = targets.rule(Prediction.of(learner, theta_of(learner), batch))
    return rule(*candidates_of(learner, batch), slice(None))


def advantage(learner, w):
    """A = -d log p [w] of the candidates (N, K), through the whole network, by double backward."""
    theta = theta_of(learner)
    aligned = params.leaves({name: theta[name] for name in w})
    log_probs = dense_log_probs(learner, {**theta, **aligned}, BATCH)
    _, candidates = candidates_of(learner)
    picked = log_probs.gather(1, candidates)
    by = [
        params.dot(
            dict(
                zip(
                    aligned,
                    torch.autograd.grad(p, list(aligned.values()), retain_graph=True),
                    strict=True,
                )
            ),
            w,
        )
        for p in picked.flatten()
    ]
    return -torch.stack(by).view_as(picked)


def test_predicted_are_the_masked_tokens_that_have_a_context():
    batch = packed([[2, 3], [4]], num_prompt=0)
    assert predicted_tokens(batch).int().tolist() == [[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]]


def test_one_hot_targets_are_plain_next_token_prediction(learner):
    tokens = packed([[9], [9]])
    logits = learner.transformers_model(tokens.tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.tokens[:, 1:].flatten())
    loss = target_loss(learner, params.named(learner), TargetTask(tokens, OneHot()))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(loss, list(learner.parameters()))
    for a, b in zip(ours, torch.autograd.grad(expected, list(learner.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_soft_targets_are_the_formula_token_by_token(learner):
    g = torch.Generator().manual_seed(2)
    gate, vectors = torch.rand(2, 12, generator=g), torch.randn(2, 12, 3, generator=g)
    table, residual = torch.randn(VOCAB, 3, generator=g), 0.7
    q = made(SoftTargets(gate, K, residual, vectors, table), learner)
    log_probs, candidates = candidates_of(learner)
    for n, (b, t) in enumerate(BATCH.loss_mask.nonzero().tolist()):
        scores = [
            residual * float(log_probs[n, c]) + float(vectors[b, t] @ table[candidates[n, c]])
            for c in range(K)
        ]
        r = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
        for c in range(K):
            true = float(candidates[n, c] == BATCH.tokens[b, t])
            expected = (1 - gate[b, t]) * true + gate[b, t] * r[c]
            assert float(q[n, c]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("residual", [0.0, 1.0])
def test_without_scores_targets_are_smoothed_or_self_distilled(learner, residual):
    q = made(SoftTargets(0.4, K, residual), learner)
    log_probs, _ = candidates_of(learner)
    expected = 0.4 * (
        torch.full_like(q, 1 / K)
        if residual == 0
        else log_probs.exp() / log_probs.exp().sum(dim=1, keepdim=True)
    )
    expected[:, 0] += 0.6
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-14)


def test_the_tilt_is_the_formula(learner):
    w = direction(learner)
    log_probs, _ = candidates_of(learner)
    base, values = log_probs.softmax(dim=1), advantage(learner, w)
    centred = values - (base * values).sum(dim=1, keepdim=True)
    scale = (base * centred**2).sum(dim=1).mean().sqrt()
    expected = 0.3 * (base.log() + centred / scale / 0.8).softmax(dim=1)
    expected[:, 0] += 0.7
    torch.testing.assert_close(
        made(Tilted(w, 0.3, 0.8, K, ForwardMode()), learner), expected, rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(
        made(Tilted(w, 0.3, 0.8, K, CentralDifference()), learner), expected, rtol=1e-6, atol=1e-8
    )


def test_the_tilt_is_indifferent_to_the_length_of_its_direction(learner):
    w = direction(learner)
    torch.testing.assert_close(
        made(Tilted(params.scale(w, 1e4), num_candidates=K), learner),
        made(Tilted(w, num_candidates=K), learner),
    )


def test_the_tilt_is_the_best_target_within_its_trust_region(learner):
    """Against a numerical optimiser of <r, A> - tau KL(r || base) over the simplex."""
    w, tau = direction(learner), 0.8
    log_probs, _ = candidates_of(learner)
    base, values = log_probs.softmax(dim=1), advantage(learner, w)
    centred = values - (base * values).sum(dim=1, keepdim=True)
    values = centred / (base * centred**2).sum(dim=1).mean().sqrt()
    tilted = made(Tilted(w, 1.0, tau, K), learner)
    for n in range(0, len(base), 4):

        def loss(logits, n=n):
            z = torch.tensor(logits, requires_grad=True)
            r = z.softmax(dim=0)
            value = -((r * values[n]).sum() - tau * (r * (r.log() - base[n].log())).sum())
            return float(value.detach()), torch.autograd.grad(value, z)[0].numpy()

        found = minimize(
            loss, torch.zeros(K).numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        torch.testing.assert_close(
            torch.tensor(found.x).softmax(dim=0), tilted[n], rtol=1e-5, atol=1e-6
        )


def test_a_wide_trust_region_has_mean_kl_1_over_2_tau_squared(learner):
    tau = 300.0
    log_probs, _ = candidates_of(learner)
    r = made(Tilted(direction(learner), 1.0, tau, K), learner)
    kl = (r * (r.log() - log_probs.log_softmax(dim=1))).sum(dim=1).mean()
    assert float(kl) * 2 * tau**2 == pytest.approx(1.0, rel=0.02)


def test_tau_0_is_the_best_q_within_the_gate(learner):
    w = direction(learner)
    values = advantage(learner, w)
    q = made(Tilted(w, 0.5, 0.0, K), learner)
    for n, row in enumerate(
        values
    ):  # V is linear in q: its maximum stands at a vertex, all of the gate on one candidate
        vertices = [0.5 * torch.eye(K)[0] + 0.5 * torch.eye(K)[c] for c in range(K)]
        best = max(vertices, key=lambda vertex, row=row: float((vertex * row).sum()))
        torch.testing.assert_close(q[n], best)
    assert (q[:, 0] < 1).any()


def test_a_direction_without_slope_leaves_the_learners_own_prediction(learner):
    log_probs, _ = candidates_of(learner)
    q = made(Tilted(params.zeros_like(direction(learner)), 1.0, 1.0, K), learner)
    torch.testing.assert_close(q, log_probs.softmax(dim=1))


@pytest.mark.parametrize("kind", ["tilted", "greedy", "soft"])
def test_a_gate_of_0_is_plain_bit_for_bit(learner, kind):
    g = torch.Generator().manual_seed(2)
    soft = SoftTargets(
        torch.zeros(2, 12),
        K,
        1.0,
        torch.randn(2, 12, 3, generator=g),
        torch.randn(VOCAB, 3, generator=g),
    )
    w = direction(learner)
    targets = {"tilted": Tilted(w, 0.0, 1.0, K), "greedy": Tilted(w, 0.0, 0.0, K), "soft": soft}[
        kind
    ]
    theta = params.named(learner)
    plain, other = (
        value_and_gradient(lambda p, t=t: target_loss(learner, p, TargetTask(BATCH, t)), theta)
        for t in (OneHot(), targets)
    )
    assert torch.equal(plain[0], other[0])
    assert all(torch.equal(plain[1][name], other[1][name]) for name in theta)


@pytest.mark.parametrize("kind", ["one_hot", "self_distilled", "tilted"])
def test_the_tail_is_the_loss(learner, kind):
    targets = {
        "one_hot": OneHot(),
        "self_distilled": SoftTargets(0.5, K),
        "tilted": Tilted(direction(learner), 0.5, 1.0, K),
    }[kind]
    theta, task = theta_of(learner), TargetTask(BATCH, targets)
    aligned = {name: theta[name] for name in learner.aligned_parameters()}
    whole, gradient = value_and_gradient(
        lambda theta_s: target_loss(learner, {**theta, **theta_s}, task), aligned
    )
    tail, by_tail = value_and_gradient(target_tail(learner, theta, task), aligned)
    torch.testing.assert_close(tail, whole, rtol=1e-13, atol=0)
    for name in aligned:
        torch.testing.assert_close(by_tail[name], gradient[name], rtol=1e-9, atol=1e-13)


def test_the_trunk_runs_once(learner):
    runs = []
    learner.trunk.register_forward_hook(lambda *_: runs.append(1))
    theta, task = theta_of(learner), TargetTask(BATCH, Tilted(direction(learner), 0.5, 1.0, K))
    target_loss(learner, params.named(learner), task).backward()
    assert len(runs) == 1
    loss = target_tail(learner, theta, task)
    aligned = {name: theta[name] for name in learner.aligned_parameters()}
    value_and_gradient(loss, aligned)
    loss.slopes(aligned, direction(learner), ForwardMode())
    assert len(runs) == 2


def test_a_theta_s_outside_the_tail_is_named(learner):
    loss = target_tail(learner, theta_of(learner), TargetTask(BATCH, OneHot()))
    with pytest.raises(
        MetaVPTError, match=r"trunk\.embed_tokens\.weight, not in the learner's tail"
    ):
        loss({"trunk.embed_tokens.weight": theta_of(learner)["trunk.embed_tokens.weight"]})


def test_losses_of_samples_are_means_over_their_own_tokens(learner):
    batch = packed([[5, 7], [9], [1]])
    theta = theta_of(learner)
    losses = target_loss_per_sample(learner, theta, TargetTask(batch, OneHot()))({})
    for b, row in enumerate([[5, 7], [9]]):
        alone = packed([[5, 7], [9], [1]])
        loss_mask = torch.zeros_like(alone.loss_mask)
        loss_mask[b] = alone.loss_mask[b]
        expected = target_loss(
            learner, theta, TargetTask(alone._replace(loss_mask=loss_mask), OneHot())
        )
        torch.testing.assert_close(losses[b], expected, rtol=1e-12, atol=0)
        assert int(loss_mask.sum()) == sum(row) - len(row)
    assert float(losses[2]) == 0.0


def test_more_candidates_than_the_vocabulary_holds_is_an_error(learner):
    for targets in (
        SoftTargets(0.5, VOCAB + 1),
        Tilted(direction(learner), num_candidates=VOCAB + 1),
    ):
        with pytest.raises(
            MetaVPTError, match=f"num_candidates={VOCAB + 1}: choose from 1 to {VOCAB}"
        ):
            target_loss(learner, theta_of(learner), TargetTask(BATCH, targets))
    with pytest.raises(MetaVPTError, match="tau=-1"):
        Tilted({}, tau=-1)
