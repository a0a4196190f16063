"""Negative log-likelihood and perplexity of held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch

from metavpt.data.tokens import TokenBatch
from metavpt.distributed import collectives
from metavpt.hypergradients import params
from metavpt.learners.lm import LanguageModel
from metavpt.objectives.target_task import OneHot, TargetTask, own_target_loss
from metavpt.problem import Directions

MAX_NLL = 709.0  # nats: what float64 can raise e to


@torch.no_grad()
def mean_nll(learner: LanguageModel, batches: Iterable[TokenBatch]) -> float:
    """Compute the mean negative log-likelihood of a target token in nats. Ranks share the work."""
    theta = params.named(learner)

    def nll(batch: TokenBatch) -> tuple[float, int]:
        loss, num_tokens = own_target_loss(learner, theta, TargetTask(batch, OneHot()))
        return num_tokens * float(loss), num_tokens

    totals, counts = zip(*collectives.share_out(nll, batches), strict=True)
    return sum(totals) / sum(counts)


class PerplexityProbe:
    """exp(mean NLL of a token) on one pass over a set: `{"perplexity": 12.3}`.

    For questions with answers, only the tokens of the answers count.

    Args:
        batches: Returns one pass over the set.
    """

    directions: ClassVar[Directions] = {"perplexity": "lower"}

    def __init__(self, batches: Callable[[], Iterable[TokenBatch]]) -> None:
        self.batches = batches

    def __call__(self, learner: LanguageModel) -> dict[str, float]:
        """Measure the learner."""
        nll = mean_nll(learner, self.batches())
        # math.exp raises where the result overflows
        return {"perplexity": math.exp(nll) if nll < MAX_NLL else math.inf}
