"""A random choice of K among C items with designed logits, and its gradient estimators."""

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from metavpt.distributed import collectives

Estimator = Literal["relaxed", "straight_through", "score"]
ESTIMATORS = ("relaxed", "straight_through", "score")


class Choice(NamedTuple):
    """The chosen items. With equal logits every weight is exactly 1."""

    chosen: Tensor  # (B, K) int64, the most wanted first
    rest: Tensor  # (B, C - K) int64
    chosen_weight: Tensor  # (B, K)
    rest_weight: Tensor  # (B, C - K)
    log_prob: Tensor  # (B,); 0 unless the estimator is "score"


def choose(logits: Tensor, noise: Tensor, num_chosen: int, estimator: Estimator) -> Choice:
    """Choose the `num_chosen` highest of logits + noise, both (B, C).

    With Gumbel noise this draws without replacement from softmax(logits) (Gumbel-top-k, arXiv
    1903.06059). It is a step function of the logits, so the estimator defines its derivative:

    relaxed           Chosen items have the weight C softmax(logits), others C softmax(-logits). The
                      derivative of the task is exact. With unequal logits it is not the plain
                      masked task.
    straight_through  These weights in the derivative, 1 in value (arXiv 1308.3432). The task stays
                      plain and the derivative is biased: it does not know other choices.
    score             Weights of 1, and the log-probability of the draw for `expected_mean`:
    unbiased
                      for the expected loss, with the variance of one draw per image.
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
    """Return the mean of the losses (B,), with the derivative of the expected mean.

    mean_b [loss_b r_b + (1 - r_b) baseline_b] with r_b = exp(log_prob_b - its value) (DiCE, arXiv
    1802.05098). baseline_b is the mean of the other losses; it does not depend on draw b and adds
    no bias. If `log_prob` (B,) depends on nothing, this is the mean, bit for bit.
    """
    ratio = (log_prob - log_prob.detach()).exp()
    others = len(losses) - 1
    baseline = (losses.sum() - losses) / others if others else torch.zeros_like(losses)
    return (losses * ratio + (1.0 - ratio) * baseline).mean()


def gumbel(shape: tuple[int, ...], rng: Generator) -> Tensor:
    """Draw standard Gumbel noise on the CPU, so that a seed gives equal numbers on every device."""
    return collectives.drawn(
        lambda shape: -torch.empty(shape).exponential_(generator=rng).log(), shape
    )


def _relative(logits: Tensor) -> Tensor:
    """Return C softmax(logits), (B, C), exactly 1 if all logits are equal."""
    odds = (logits - logits.detach().amax(dim=1, keepdim=True)).exp()
    return odds / odds.mean(dim=1, keepdim=True)


def _log_prob(in_order: Tensor, num_chosen: int) -> Tensor:
    """Return the log-probability (B,) of drawing the first `num_chosen` in order."""
    remaining = in_order.flip(1).logcumsumexp(dim=1).flip(1)
    return (in_order - remaining)[:, :num_chosen].sum(dim=1)


def balanced(logits: Tensor) -> Tensor:
    """Compute B * softmax(logits), (B,), over the global batch; exactly 1 for equal logits."""
    odds = (logits - collectives.leave(logits.detach().max())).exp()
    return odds / collectives.mean(collectives.weighed(odds.mean(), len(odds)))
