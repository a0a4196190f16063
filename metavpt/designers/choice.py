"""A choice of K among C by chance, which a designer tilts, and what of its effect reaches the designer's gradient."""

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from metavpt.distributed import collectives

Estimator = Literal["relaxed", "straight_through", "score"]
ESTIMATORS = ("relaxed", "straight_through", "score")


class Choice(NamedTuple):
    """What was chosen. At uniform logits every weight is exactly 1."""

    chosen: Tensor  # (B, K) int64, the most wanted first
    rest: Tensor  # (B, C - K) int64
    chosen_weight: Tensor  # (B, K)
    rest_weight: Tensor  # (B, C - K)
    log_prob: Tensor  # (B,); 0 unless the estimator is "score"


def choose(logits: Tensor, noise: Tensor, num_chosen: int, estimator: Estimator) -> Choice:
    """The `num_chosen` highest of logits + noise, both (B, C).

    With Gumbel noise a draw without replacement from softmax(logits) (Gumbel-top-k, arXiv 1903.06059). It is a step function of the logits,
    so a derivative has to be told of its effect in another way:

    relaxed           what is chosen weighs C softmax(logits), what is not C softmax(-logits). The task is a differentiable function of
                      the logits almost everywhere and its derivative is exact; away from equal logits it is not the plain masked task.
    straight_through  those weights in the derivative, 1 in value (arXiv 1308.3432). The task stays plain, the derivative is biased: it
                      knows what more of the chosen would do, and not what another choice would.
    score             weights of 1, and the log-probability of the draw for `expected_mean`: unbiased for the expected loss, with the
                      variance of one draw for each image.
    """
    order = (logits + noise).argsort(dim=1, descending=True)
    chosen, rest = order.split([num_chosen, order.shape[1] - num_chosen], dim=1)
    ones, certain = torch.ones_like(logits), logits.new_zeros(len(logits))
    if estimator == "score":
        return Choice(
            chosen,
            rest,
            ones.gather(1, chosen),
            ones.gather(1, rest),
            _log_prob(logits.gather(1, order), num_chosen),
        )
    weights = _relative(logits).gather(1, chosen), _relative(-logits).gather(1, rest)
    if estimator == "straight_through":
        weights = tuple(1.0 + (weight - weight.detach()) for weight in weights)
    return Choice(chosen, rest, weights[0], weights[1], certain)


def expected_mean(losses: Tensor, log_prob: Tensor) -> Tensor:
    """The mean of the losses (B,) in value; its derivative by what `log_prob` (B,) depends on estimates that of the expectation.

    mean_b [loss_b r_b + (1 - r_b) baseline_b], r_b = exp(log_prob_b - its value) (DiCE, arXiv 1802.05098), baseline_b the mean of the other
    losses, which does not depend on draw b and so adds no bias. With a `log_prob` that depends on nothing it is the mean, bit for bit.
    """
    ratio = (log_prob - log_prob.detach()).exp()
    others = len(losses) - 1
    baseline = (losses.sum() - losses) / others if others else torch.zeros_like(losses)
    return (losses * ratio + (1.0 - ratio) * baseline).mean()


def gumbel(shape: tuple[int, ...], rng: Generator) -> Tensor:
    """Standard Gumbel noise, drawn on the CPU so that a seed gives the same numbers on every device."""
    return collectives.drawn(
        lambda shape: -torch.empty(shape).exponential_(generator=rng).log(), shape
    )


def _relative(logits: Tensor) -> Tensor:
    """C softmax(logits), (B, C): exactly 1 where all are alike, which scaling a softmax would miss by rounding."""
    odds = (logits - logits.detach().amax(dim=1, keepdim=True)).exp()
    return odds / odds.mean(dim=1, keepdim=True)


def _log_prob(in_order: Tensor, num_chosen: int) -> Tensor:
    """log of the probability to draw the first `num_chosen` in this order without replacement (Plackett-Luce): (B, C) -> (B,)."""
    remaining = in_order.flip(1).logcumsumexp(dim=1).flip(1)
    return (in_order - remaining)[:, :num_chosen].sum(dim=1)
