"""A language model of a few thousand parameters, packed batches, and a minimal problem for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metavpt.data.tokens import TokenBatch
from metavpt.designers.targets import TargetDesigner, designer_body
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.objectives.target_task import OneHot, TargetTask, Tilted, target_loss, target_tail
from metavpt.problem import Problem

VOCAB = 40


def tiny_lm(
    kind: str = "llama", tail_layers: int = 1, seed: int = 0, **config: Any
) -> LanguageModel:
    """float64; wide initial weights, so that predictions differ from token to token."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": kind != "qwen2",
    }  # fmt: skip
    torch.manual_seed(seed)
    return random_language_model(kind, tail_layers, **(shape | config)).double()


def packed(lengths: Sequence[Sequence[int]], seed: int = 0, num_prompt: int = 1) -> TokenBatch:
    """Rows of documents of these lengths, padded on the right; targets from `num_prompt` on."""
    width = max(sum(row) for row in lengths)
    tokens = torch.randint(
        VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed)
    )
    positions = torch.zeros_like(tokens)
    documents, loss_mask = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
    for b, row in enumerate(lengths):
        start = 0
        for index, length in enumerate(row):
            positions[b, start : start + length] = torch.arange(length)
            documents[b, start : start + length] = index
            loss_mask[b, start + num_prompt : start + length] = True
            start += length
    return TokenBatch(
        tokens, positions, documents, loss_mask, seed, torch.zeros(len(lengths), dtype=torch.int64)
    )


def tiny_designer(num_candidates: int = 6, seed: int = 1, moved: float = 0.0) -> TargetDesigner:
    """float64; `moved` away from the identity at which it starts, its gates open."""
    torch.manual_seed(seed)
    designer = TargetDesigner(
        designer_body(VOCAB, width=8, num_layers=2, num_heads=2), num_candidates
    ).double()
    if moved:
        with torch.no_grad():
            for p in designer.parameters():
                p.add_(moved * torch.randn_like(p))
            designer.gate.bias.fill_(0.5)
    return designer


class TinyLanguage(Problem):
    """Random documents; feedback is the likelihood of others."""

    learner: LanguageModel
    designer: TargetDesigner

    def __init__(
        self, learner: LanguageModel | None = None, designer: TargetDesigner | None = None
    ) -> None:
        self.learner = learner or tiny_lm()
        self.designer = designer or tiny_designer()

    def pretrain_batches(self, seed: int) -> Iterator[TokenBatch]:
        for k in range(1000):
            yield packed([[5, 7], [9]], seed=seed + k)

    def feedback_batches(self, seed: int) -> Iterator[TokenBatch]:
        for k in range(1000):
            yield packed([[8], [6]], seed=seed + k + 7_000_000, num_prompt=3)

    def recipe(self, batch: TokenBatch) -> TargetTask:
        return self.designer.recipe_task(batch)

    def aligned_parameters(self) -> list[str]:
        return self.learner.aligned_parameters()

    def pretrain_loss(self, theta: Params, task: TargetTask) -> Tensor:
        return target_loss(self.learner, theta, task)

    def pretrain_tail(self, theta: Params, task: TargetTask) -> Callable[[Params], Tensor]:
        return target_tail(self.learner, theta, task)

    def tilt(self, theta: Params, task: TargetTask, w: Params, *how: Any) -> TargetTask:
        return task._replace(targets=Tilted(w, *how))

    def feedback_loss(self, theta: Params, batch: TokenBatch) -> Tensor:
        return target_loss(self.learner, theta, TargetTask(batch, OneHot()))

    def regularizer(self, task: TargetTask) -> Tensor:
        return self.designer.regularizer(task)

    def evaluate(self) -> dict[str, float]:
        theta = params.detach(params.named(self.learner))
        return {"nll": float(self.feedback_loss(theta, next(self.feedback_batches(5))))}


def dense_log_probs(learner: LanguageModel, theta: Params, batch: TokenBatch) -> Tensor:
    """log p (N, V) of the tokens to predict, without any of the shortcuts."""
    states = learner.states(theta, learner.hidden(theta, batch))
    log_probs = (states @ learner.unembedding(theta).T).log_softmax(dim=-1)
    return torch.stack([log_probs[b, t - 1] for b, t in batch.loss_mask.nonzero().tolist()])
