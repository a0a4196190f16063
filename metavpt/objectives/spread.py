"""How far values of candidates differ, which is what a trust region on a choice among them is measured by."""

from torch import Tensor

from metavpt.distributed import collectives


def spread(values: Tensor, log_probs: Tensor) -> Tensor:
    """The root of the mean over the tokens of the whole batch of the variance of `values` (..., K) under softmax(log_probs), a scalar."""
    base = log_probs.softmax(dim=-1)
    centred = values - (base * values).sum(dim=-1, keepdim=True)
    variance = (base * centred.square()).sum(dim=-1)
    return collectives.leave(collectives.weighed(variance.mean(), variance.numel())).sqrt()
