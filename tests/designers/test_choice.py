"""Estimators of a discrete choice against enumeration of every draw, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from metavpt.designers.choice import Choice, choose, expected_mean, gumbel

C, K = 4, 2
DRAWS = list(itertools.permutations(range(C), K))
LOGITS = torch.tensor([[0.3, -0.5, 0.8, 0.0], [-0.2, 0.4, 0.1, -0.9]], dtype=torch.float64)


def draw(logits: Tensor, first: tuple[tuple[int, ...], ...], estimator) -> Choice:
    """The choice in which image b takes first[b], by noise that leaves no other."""
    noise = -logits.detach().clone()
    for b, taken in enumerate(first):
        for rank, c in enumerate(taken):
            noise[b, c] += 10.0 * (K - rank)
    return choose(logits, noise, K, estimator)


def probability(logits: list[float], taken: tuple[int, ...]) -> float:
    """Drawing one after the other without putting back."""
    left, total = list(range(len(logits))), 1.0
    for c in taken:
        total *= math.exp(logits[c]) / sum(math.exp(logits[j]) for j in left)
        left.remove(c)
    return total


def table() -> dict[tuple[int, ...], float]:
    values = torch.randn(
        len(DRAWS), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).tolist()
    return dict(zip(DRAWS, values, strict=True))


def test_choice_splits_all_and_puts_the_most_wanted_first() -> None:
    choice = draw(LOGITS, ((2, 0), (3, 1)), "relaxed")
    assert choice.chosen.tolist() == [[2, 0], [3, 1]]
    assert (
        torch.cat([choice.chosen, choice.rest], dim=1).sort(dim=1).values.tolist()
        == [[0, 1, 2, 3]] * 2
    )


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed", "score"])
def test_equal_logits_weigh_exactly_1_and_leave_the_order_to_the_noise(estimator) -> None:
    noise = gumbel((5, 37), torch.Generator().manual_seed(0))
    for logits in (torch.zeros(5, 37), torch.full((5, 37), 0.7)):
        choice = choose(logits, noise, 9, estimator)
        assert choice.chosen_weight.eq(1).all()
        assert choice.rest_weight.eq(1).all()
    assert torch.equal(
        choose(torch.zeros(5, 37), noise, 9, estimator).chosen,
        noise.argsort(dim=1, descending=True)[:, :9],
    )


def test_relaxed_weights_are_shares_relative_to_uniform() -> None:
    choice = draw(LOGITS, ((2, 0), (3, 1)), "relaxed")
    torch.testing.assert_close(
        choice.chosen_weight, (C * LOGITS.softmax(1)).gather(1, choice.chosen), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(
        choice.rest_weight, (C * (-LOGITS).softmax(1)).gather(1, choice.rest), atol=1e-14, rtol=0
    )
    assert (
        choose(1e4 * LOGITS, torch.zeros_like(LOGITS), K, "relaxed").chosen_weight.isfinite().all()
    )


def test_straight_through_is_1_in_value_and_relaxed_in_derivative() -> None:
    gradients = []
    for estimator in ("straight_through", "relaxed"):
        logits = LOGITS.clone().requires_grad_()
        choice = draw(logits, ((2, 0), (3, 1)), estimator)
        value = (
            choice.chosen_weight @ torch.tensor([1.0, 3.0]).double()
            + choice.rest_weight @ torch.tensor([2.0, -1.0]).double()
        )
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
        if estimator == "straight_through":
            assert choice.chosen_weight.eq(1).all()
            assert choice.rest_weight.eq(1).all()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-14, rtol=0)


def test_log_prob_is_that_of_drawing_without_replacement() -> None:
    for taken in DRAWS:
        log_prob = draw(LOGITS, (taken, taken), "score").log_prob
        for b in range(2):
            assert log_prob[b].item() == pytest.approx(
                math.log(probability(LOGITS[b].tolist(), taken)), abs=1e-13
            )


def test_gumbel_noise_draws_with_those_probabilities() -> None:
    num_draws = 40_000
    noise = gumbel((num_draws, C), torch.Generator().manual_seed(0)).double()
    chosen = choose(LOGITS[:1].expand(num_draws, C), noise, K, "score").chosen
    for taken in DRAWS:
        p = probability(LOGITS[0].tolist(), taken)
        share = (chosen == torch.tensor(taken)).all(dim=1).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / num_draws)


def expectation(logits: Tensor) -> Tensor:
    """Mean over two images of the expected loss, each draw counted with its probability."""
    losses = table()
    total = logits.new_zeros(())
    for taken, b in itertools.product(DRAWS, range(2)):
        left, log_prob = list(range(C)), logits.new_zeros(())
        for c in taken:
            log_prob = log_prob + logits[b, c] - logits[b, left].logsumexp(0)
            left.remove(c)
        total = total + log_prob.exp() * losses[taken] / 2
    return total


def test_score_is_unbiased_over_all_draws_of_two_images() -> None:
    """E[d expected_mean / d logits] = d E[loss] / d logits, with the other image as baseline."""
    truth_at = LOGITS.clone().requires_grad_()
    (truth,) = torch.autograd.grad(expectation(truth_at), truth_at)
    losses, mean, plain = table(), torch.zeros_like(LOGITS), torch.zeros_like(LOGITS)
    for first, second in itertools.product(DRAWS, DRAWS):
        logits = LOGITS.clone().requires_grad_()
        log_prob = draw(logits, (first, second), "score").log_prob
        value = expected_mean(
            torch.tensor([losses[first], losses[second]], dtype=torch.float64), log_prob
        )
        assert value.item() == pytest.approx((losses[first] + losses[second]) / 2, abs=1e-14)
        p = probability(LOGITS[0].tolist(), first) * probability(LOGITS[1].tolist(), second)
        mean += p * torch.autograd.grad(value, logits)[0]
        plain += p
    torch.testing.assert_close(plain, torch.ones_like(plain), atol=1e-12, rtol=0)
    torch.testing.assert_close(mean, truth, atol=1e-12, rtol=0)


def test_expected_mean_of_a_certain_draw_is_the_mean_bit_for_bit() -> None:
    losses = torch.randn(7, requires_grad=True)
    expected, mean = expected_mean(losses, torch.zeros(7)), losses.mean()
    assert torch.equal(expected, mean)
    assert torch.equal(
        torch.autograd.grad(expected, losses)[0], torch.autograd.grad(mean, losses)[0]
    )
    assert expected_mean(losses[:1], torch.zeros(1)) == losses[0]
