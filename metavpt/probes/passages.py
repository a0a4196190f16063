"""Tokens of a batch with their designed targets or weights, for the report."""

from collections.abc import Iterator
from typing import Any

import torch

from metavpt.data.tokens import PADDING
from metavpt.hypergradients import params
from metavpt.learners.lm import LanguageModel
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import TargetTask, target_tail
from metavpt.probes.samples import Candidate, Token

NUM_CANDIDATES = 6


@torch.no_grad()
def passages(
    learner: LanguageModel, tokenizer: Any, task: TargetTask, num_rows: int = 3
) -> list[list[Token]]:
    """Return the first rows of the task's batch, with the targets for the learner as it is now.

    Args:
        learner: The language model.
        tokenizer: Decodes single tokens.
        task: The designed task.
        num_rows: Number of rows.
    """
    tail = target_tail(learner, params.detach(params.named(learner)), task)
    predicted = predicted_tokens(task.batch)
    # The index of a predicted token among all predicted tokens.
    number = predicted.flatten().cumsum(0).view_as(predicted) - 1
    shares, order = tail.targets.sort(dim=1, descending=True)
    candidates = tail.candidates.gather(1, order)[:, :NUM_CANDIDATES]
    weights = None if task.targets.sums_to_one else tail.targets[:, 0].tolist()
    gates = (1 - tail.targets[:, 0]).tolist()

    def row(b: int) -> Iterator[Token]:
        for t, token in enumerate(task.batch.tokens[b].tolist()):
            if task.batch.documents[b, t] == PADDING:
                return
            if not predicted[b, t]:
                yield Token(tokenizer.decode([token]))
                continue
            n, text = int(number[b, t]), tokenizer.decode([token])
            if weights is not None:
                yield Token(text, 0.0, weight=round(weights[n], 4))
                continue
            best = zip(candidates[n].tolist(), shares[n].tolist(), strict=False)
            yield Token(
                text,
                gates[n],
                [Candidate(tokenizer.decode([c]), round(q, 4)) for c, q in best if q > 0],
            )

    return [list(row(b)) for b in range(min(num_rows, len(task.batch.tokens)))]
