"""How far the values of candidates differ: the scale of a trust region on a choice among them."""

from torch import Tensor

from metavpt.distributed import collectives


def spread(values: Tensor, log_probs: Tensor) -> Tensor:
    """Return the root mean variance of `values` under softmax(log_probs), a scalar.

    The mean is over all tokens of the whole batch. Both arguments have shape (..., K).
    """
    base = log_probs.softmax(dim=-1)
    centred = values - (base * values).sum(dim=-1, keepdim=True)
    variance = (base * centred.square()).sum(dim=-1)
    return collectives.leave(collectives.weighed(variance.mean(), variance.numel())).sqrt()
