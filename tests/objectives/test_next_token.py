import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metavpt.errors import MetaVPTError
from metavpt.objectives import next_token
from metavpt.objectives.next_token import (
    candidate_scores,
    next_token_loss,
    score,
    select_candidates,
    soft_cross_entropy,
    token_losses,
)

N, V, D, K = 11, 13, 5, 4


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """Three tokens at a time, so that the last chunk is a smaller one."""
    monkeypatch.setattr(next_token, "CHUNK", 3)


def inputs(dtype=torch.float64, num_candidates=K):
    g = torch.Generator().manual_seed(0)
    states, unembedding = (
        torch.randn(n, D, generator=g, dtype=dtype).requires_grad_() for n in (N, V)
    )
    tokens = torch.randint(V, (N,), generator=g)
    log_probs = (states @ unembedding.T).log_softmax(dim=1).detach()
    candidates = select_candidates(log_probs, tokens, num_candidates)
    targets = (
        torch.rand(N, num_candidates, generator=g, dtype=dtype).softmax(dim=1).requires_grad_()
    )
    return states, unembedding, tokens, candidates, targets


def dense(states, unembedding, candidates, targets):
    return (
        -(targets * (states @ unembedding.T).log_softmax(dim=1).gather(1, candidates))
        .sum(dim=1)
        .mean()
    )


def naive(states, unembedding, candidates, targets):
    """The formula, one number at a time."""
    states, unembedding, targets = (x.detach() for x in (states, unembedding, targets))
    total = 0.0
    for t in range(len(states)):
        logits = [
            sum(float(h) * float(w) for h, w in zip(states[t], row, strict=True))
            for row in unembedding
        ]
        log_z = math.log(sum(math.exp(z) for z in logits))
        total -= sum(
            float(q) * (logits[int(c)] - log_z)
            for q, c in zip(targets[t], candidates[t], strict=True)
        )
    return total / len(states)


def test_the_loss_is_the_formula():
    states, unembedding, _, candidates, targets = inputs()
    assert float(
        soft_cross_entropy(states, unembedding, candidates, targets).detach()
    ) == pytest.approx(naive(states, unembedding, candidates, targets), rel=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_chunks_give_the_dense_loss_and_gradient(dtype, tolerance):
    states, unembedding, _, candidates, targets = inputs(dtype)
    leaves = (states, unembedding, targets)
    chunked, whole = (
        fn(states, unembedding, candidates, targets) for fn in (soft_cross_entropy, dense)
    )
    torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)
    for got, expected in zip(
        torch.autograd.grad(3 * chunked, leaves),
        torch.autograd.grad(3 * whole, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_targets_that_do_not_sum_to_one_are_differentiated_alike():
    states, unembedding, _, candidates, targets = inputs()
    targets = (2 * targets).detach()
    got, expected = (
        torch.autograd.grad(fn(states, unembedding, candidates, targets), (states, unembedding))
        for fn in (soft_cross_entropy, dense)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_first_and_second_derivatives_are_those_of_finite_differences():
    states, unembedding, _, candidates, targets = inputs()
    loss = lambda h, w, q: soft_cross_entropy(h, w, candidates, q)
    assert torch.autograd.gradcheck(loss, (states, unembedding, targets))
    assert torch.autograd.gradgradcheck(loss, (states, unembedding, targets))


def test_a_frozen_unembedding_costs_no_gradient_and_changes_none():
    states, unembedding, _, candidates, targets = inputs()
    loss = soft_cross_entropy(states, unembedding.detach(), candidates, targets.detach())
    (got,) = torch.autograd.grad(loss, states)
    (expected,) = torch.autograd.grad(dense(states, unembedding, candidates, targets), states)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_candidates_chosen_on_the_way_give_the_same_loss_and_gradient():
    states, unembedding, tokens, candidates, targets = inputs()
    chosen = []

    def rule(log_probs, own, rows):
        chosen.append(own)
        return targets[rows]

    loss = next_token_loss(states, unembedding, tokens, K, rule)
    assert torch.equal(torch.cat(chosen), candidates)
    expected = soft_cross_entropy(states, unembedding, candidates, targets.detach())
    assert torch.equal(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, (states, unembedding)),
        torch.autograd.grad(expected, (states, unembedding)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_fused_loss_may_be_differentiated_twice():
    states, unembedding, tokens, _, _ = inputs()
    loss = lambda h, w: next_token_loss(
        h, w, tokens, V, lambda log_probs, own, rows: torch.full_like(log_probs, 1 / V)
    )
    assert torch.autograd.gradgradcheck(loss, (states, unembedding))


def test_candidates_hold_the_true_token_once_and_first_beside_the_most_probable():
    log_probs = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.1, 0.4, 0.3, 0.2]]).log()
    assert select_candidates(log_probs, torch.tensor([0, 2]), 3).tolist() == [[0, 1, 2], [2, 1, 3]]
    everything = select_candidates(log_probs, torch.tensor([3, 1]), 4)
    assert everything.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 2
    assert everything[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize("num_candidates", [0, V + 1])
def test_more_candidates_than_tokens_is_an_error(num_candidates):
    with pytest.raises(
        MetaVPTError, match=rf"num_candidates={num_candidates}: choose from 1 to {V}"
    ):
        inputs(num_candidates=num_candidates)


def test_a_batch_with_nothing_to_predict_is_an_error():
    with pytest.raises(MetaVPTError, match="no token to predict"):
        score(torch.zeros(0, D), torch.zeros(V, D), torch.zeros(0, dtype=torch.int64), 1)


def test_scores_are_the_log_probabilities_of_the_candidates():
    states, unembedding, tokens, candidates, _ = inputs()
    scores = score(states, unembedding, tokens, K)
    assert torch.equal(scores.candidates, candidates)
    torch.testing.assert_close(
        scores.log_probs, (states @ unembedding.T).log_softmax(dim=1).gather(1, candidates).detach()
    )


def test_token_losses_average_to_the_loss():
    states, unembedding, _, candidates, targets = inputs()
    losses = token_losses(states, unembedding, candidates, targets)
    assert losses.shape == (N,)
    torch.testing.assert_close(
        losses.mean(),
        soft_cross_entropy(states, unembedding, candidates, targets),
        rtol=1e-13,
        atol=0,
    )


def test_candidate_scores_and_their_gradient():
    states, unembedding, _, candidates, _ = inputs()
    scores = candidate_scores(states, unembedding, candidates)
    torch.testing.assert_close(
        scores, (states @ unembedding.T).gather(1, candidates), rtol=1e-13, atol=1e-13
    )
    assert torch.autograd.gradcheck(
        lambda h, w: candidate_scores(h, w, candidates), (states, unembedding)
    )


def test_half_precision_is_summed_in_float32():
    states, unembedding, _, candidates, targets = (
        x.bfloat16() if x.is_floating_point() else x for x in map(torch.detach, inputs())
    )
    leaves = (states.requires_grad_(), unembedding.requires_grad_())
    loss = soft_cross_entropy(*leaves, candidates, targets.float())
    expected = dense(*(x.float() for x in leaves), candidates, targets.float())
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for got, exact in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), exact.float(), rtol=0.05, atol=2e-3)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.entries = max(
            [
                self.entries,
                *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)),
            ]
        )
        return result


def test_logits_of_the_whole_batch_never_exist_at_once():
    states, unembedding, tokens, _, _ = inputs()
    with Largest() as largest:
        next_token_loss(
            states, unembedding, tokens, K, lambda log_probs, own, rows: log_probs.softmax(dim=1)
        ).backward()
    assert largest.entries == V * D  # the unembedding itself; three tokens' logits are 3 V
    with Largest() as largest:
        dense(*inputs()[:2], *inputs()[3:])
    assert largest.entries == N * V


@pytest.mark.parametrize("num_candidates", [3, 30])
def test_scores_of_few_and_of_many_candidates_are_the_same_products(num_candidates):
    """Few rows of the table gathered, many picked from the full product; gradients too."""
    g = torch.Generator().manual_seed(0)
    vectors, table = (
        torch.randn(7, 4, generator=g, dtype=torch.float64),
        torch.randn(40, 4, generator=g, dtype=torch.float64),
    )
    candidates = torch.stack([torch.randperm(40, generator=g)[:num_candidates] for _ in range(7)])
    weights = torch.randn(7, num_candidates, generator=g, dtype=torch.float64)
    by = []
    for fn in (next_token.candidate_scores, lambda v, t, c: torch.einsum("nd,nkd->nk", v, t[c])):
        leaves = vectors.clone().requires_grad_(), table.clone().requires_grad_()
        scores = fn(*leaves, candidates)
        by.append((scores.detach(), *torch.autograd.grad((weights * scores).sum(), leaves)))
    for a, b in zip(*by, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
