"""Token selection: how much each token, or each row, counts in the next-token loss."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from metavpt.data.tokens import TokenBatch
from metavpt.designers.choice import balanced
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, check_known
from metavpt.learners.lm import LanguageModel
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import OneHot, TargetTask, Weighted


class TokenWeights(nn.Module):
    """Weights of the N tokens to predict: N * softmax(z), mean 1.

    All weights are exactly 1 at first, which is plain next-token prediction. A causal transformer
    reads the tokens up to and including the predicted one and computes z.

    Args:
        body: See `designer_body`.
        per: "token" weighs tokens; "row" takes the mean of z over the predicted tokens of each row.
        kl_weight: Weight of the divergence from equal weights, see `regularizer`.
    """

    def __init__(
        self, body: LanguageModel, per: Literal["token", "row"] = "token", kl_weight: float = 0.1
    ) -> None:
        super().__init__()
        check_known(per, "TokenWeights: per", "token", "row")
        self.body, self.per, self.kl_weight = body, per, kl_weight
        self.head = nn.Linear(body.width, 1, bias=False)  # a bias would cancel in the softmax
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: TokenBatch) -> TargetTask:
        """Make the task of a batch."""
        return self._weighted(batch, self.head(self.body(batch)).squeeze(2))

    def recipe_task(self, batch: TokenBatch) -> TargetTask:
        """Plain next-token prediction; no network runs."""
        return TargetTask(batch, OneHot())

    def random_tasks(self, batch: TokenBatch, num_tasks: int) -> list[TargetTask]:
        """Draw weights from standard normal logits, by the batch's seed."""
        rng = Generator().manual_seed(batch.seed ^ 0x77656967)
        shape = batch.tokens.shape if self.per == "token" else (len(batch.tokens), 1)
        draws = (
            collectives.drawn(lambda whole: torch.randn(whole, generator=rng), shape)
            for _ in range(num_tasks)
        )
        return [
            self._weighted(batch, logits.to(batch.tokens.device).expand(batch.tokens.shape))
            for logits in draws
        ]

    def regularizer(self, task: TargetTask) -> Tensor:
        """Compute kl_weight * KL(weights / N || uniform) = kl_weight * mean w log w.

        The mean lies between 0 and log N.
        """
        if not isinstance(task.targets, Weighted):
            raise MetaVPTError(
                "TokenWeights.regularizer: the task has no weights; it must come from the "
                "designer, not from recipe_task"
            )
        weights = task.targets.weights[predicted_tokens(task.batch)]
        divergence = (weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).mean()
        return self.kl_weight * collectives.weighed(divergence, len(weights))

    def _weighted(self, batch: TokenBatch, logits: Tensor) -> TargetTask:
        predicted = predicted_tokens(batch)
        if self.per == "row":
            mean = (logits * predicted).sum(dim=1) / predicted.sum(dim=1).clamp_min(1)
            logits = mean[:, None].expand_as(logits)
        weights = torch.zeros_like(logits).masked_scatter(predicted, balanced(logits[predicted]))
        return TargetTask(batch, Weighted(weights))
