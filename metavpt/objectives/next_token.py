"""Next-token cross-entropy to soft targets on a few candidates, in chunks of tokens.

Log-probabilities of the whole vocabulary exist for one chunk only. Letters: N tokens to predict,
V vocabulary, K candidates, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params

CHUNK = 256  # tokens: 50 MB of float32 at a vocabulary of 49,152

# (log p of the candidates (n, K), candidates (n, K), which of the N tokens) -> targets q (n, K);
# the true token is candidate 0
Rule = Callable[[Tensor, Tensor, slice], Tensor]


def select_candidates(log_probs: Tensor, tokens: Tensor, num_candidates: int) -> Tensor:
    """Return the true token and the K - 1 other tokens of highest probability, the true one first.

    Args:
        log_probs: (N, V).
        tokens: The true tokens, (N,).
        num_candidates: K.

    Returns:
        (N, K).
    """
    check_num_candidates(num_candidates, log_probs.shape[1])
    if num_candidates == 1:  # plain next-token prediction searches for none
        return tokens[:, None]
    true, top = tokens[:, None], log_probs.topk(num_candidates, dim=1).indices
    # Removes the true token without a copy of log_probs.
    others = torch.where(top == true, top[:, -1:], top)
    return torch.cat([true, others[:, :-1]], dim=1)


def check_num_candidates(num_candidates: int, vocab_size: int) -> None:
    """Raise MetaVPTError unless 1 <= num_candidates <= vocab_size."""
    if not 1 <= num_candidates <= vocab_size:
        raise MetaVPTError(
            f"num_candidates={num_candidates}: choose from 1 to {vocab_size}, the size of the "
            "vocabulary"
        )


class Scores(NamedTuple):
    """The predictions of a learner for N tokens at one theta, without a graph."""

    candidates: Tensor  # (N, K) int64
    log_probs: Tensor  # (N, K), normalised over the whole vocabulary


@torch.no_grad()
def score(states: Tensor, unembedding: Tensor, tokens: Tensor, num_candidates: int) -> Scores:
    """Return candidates and their log-probabilities.

    Args:
        states: (N, D).
        unembedding: (V, D).
        tokens: The true tokens, (N,).
        num_candidates: K.
    """
    parts = []
    for rows, log_probs in _chunks(states, unembedding):
        candidates = select_candidates(log_probs, tokens[rows], num_candidates)
        parts.append((candidates, log_probs.gather(1, candidates)))
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def next_token_loss(
    states: Tensor, unembedding: Tensor, tokens: Tensor, num_candidates: int, rule: Rule
) -> Tensor:
    """Compute mean_t -sum_c q_t(c) log p_t(c), with candidates and targets q from the same logits.

    Candidates and q are constants: there is no gradient through `rule`.

    Args:
        states: (N, D).
        unembedding: (V, D).
        tokens: The true tokens, (N,).
        num_candidates: K.
        rule: Makes q of the candidates' log-probabilities.
    """

    def choose(log_probs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        candidates = select_candidates(log_probs, tokens[rows], num_candidates)
        return candidates, rule(log_probs.gather(1, candidates), candidates, rows)

    return _SoftCrossEntropy.apply(  # type: ignore[return-value]
        states, unembedding, None, choose, torch.is_grad_enabled()
    )


def soft_cross_entropy(
    states: Tensor, unembedding: Tensor, candidates: Tensor, targets: Tensor
) -> Tensor:
    """Compute mean_t -sum_c targets_t(c) log p_t(candidates_t(c)), a scalar.

    It is differentiable twice by states, unembedding and targets. Candidates and targets have shape
    (N, K).
    """

    def choose(log_probs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return candidates[rows], targets[rows]

    return _SoftCrossEntropy.apply(  # type: ignore[return-value]
        states, unembedding, targets, choose, torch.is_grad_enabled()
    )


@torch.no_grad()
def token_losses(
    states: Tensor, unembedding: Tensor, candidates: Tensor, targets: Tensor
) -> Tensor:
    """Compute the loss of each token, (N,), without a graph."""
    chunks = _chunks(states, unembedding)
    return torch.cat(
        [
            -(targets[rows] * log_probs.gather(1, candidates[rows])).sum(dim=1)
            for rows, log_probs in chunks
        ]
    )


@dataclass(frozen=True)
class NextTokenLoss:
    """theta -> mean_t -sum_c q_t(c) log p_t(c; theta), a `LinearLoss`.

    Candidates and q are fixed. Only q holds a graph to phi.

    Attributes:
        states: theta -> (N, D).
        unembedding: (V, D), does not depend on theta.
        candidates, targets: (N, K).
        sums_to_one: Whether phi leaves sum_c q_t(c) at 1 for every token.
    """

    states: Callable[[Params], Tensor]
    unembedding: Tensor
    candidates: Tensor
    targets: Tensor
    sums_to_one: bool = True

    def __call__(self, theta: Params) -> Tensor:
        """Compute the loss at theta, a scalar."""
        return collectives.weighed(
            soft_cross_entropy(self.states(theta), self.unembedding, self.candidates, self.targets),
            len(self.targets),
        )

    @torch.no_grad()
    def slopes(
        self, theta: Params, w: Params, derivative: DirectionalDerivative, absolute: bool = True
    ) -> Tensor:
        """Compute -d log p_t(c)[w] / N, of shape (N, K).

        Logits are linear in the states h, so only dh is differentiated:
        d log p(c) = dh . (W_c - sum_v p(v) W_v). The sum over v is the same for all candidates of a
        token. If targets sum to 1, phi cannot change its contribution. With `absolute=False` the
        true token's W then replaces it, and no logits are computed.
        """
        moved = derivative(self.states, theta, w)
        logits = candidate_scores(moved, self.unembedding, self.candidates)
        mean = self._mean_slope(theta, moved) if absolute or not self.sums_to_one else logits[:, :1]
        return collectives.weighed((mean - logits) / len(moved), len(moved))

    def _mean_slope(self, theta: Params, moved: Tensor) -> Tensor:
        """Compute sum_v p_t(v) dh_t . W_v, of shape (N, 1)."""
        chunks = _chunks(self.states(theta), self.unembedding)
        return torch.cat(
            [
                (log_probs.exp() * (moved[rows] @ self.unembedding.T)).sum(dim=1, keepdim=True)
                for rows, log_probs in chunks
            ]
        )


def candidate_scores(vectors: Tensor, table: Tensor, candidates: Tensor) -> Tensor:
    """Compute vectors_t . table[candidates_t(c)], of shape (N, K).

    Args:
        vectors: (N, D).
        table: (V, D). The rows are gathered again in the backward pass.
        candidates: (N, K).
    """
    parts = []
    for start in range(0, len(vectors), CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(
            checkpoint(
                _gathered_dot,
                vectors[rows],
                table,
                candidates[rows],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(parts)


def _gathered_dot(vectors: Tensor, table: Tensor, candidates: Tensor) -> Tensor:
    # A matrix product with the whole table is cheaper than many gathered rows.
    if 8 * candidates.shape[1] > len(table):
        return (vectors @ table.T).gather(1, candidates)
    return (F.embedding(candidates, table) @ vectors[:, :, None]).squeeze(2)


def _log_probs(states: Tensor, unembedding: Tensor) -> Tensor:
    logits = states @ unembedding.T
    return F.log_softmax(
        logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=1
    )


def _chunks(states: Tensor, unembedding: Tensor) -> Iterator[tuple[slice, Tensor]]:
    if not len(states):
        raise MetaVPTError(
            "next-token loss: the batch has no token to predict; its loss_mask leaves none that "
            "has a context"
        )
    for start in range(0, len(states), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, _log_probs(states[rows], unembedding)


class _SoftCrossEntropy(torch.autograd.Function):
    """The loss and its gradient in one pass, so that no chunk's logits are kept or computed twice.

    A backward pass that is differentiated again recomputes the loss from its arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        unembedding: Tensor,
        targets: Tensor | None,
        choose: Any,
        with_gradient: bool,
    ) -> Tensor:
        num_tokens = len(states)
        by_states = torch.empty_like(states) if with_gradient and ctx.needs_input_grad[0] else None
        by_unembedding = None
        if with_gradient and ctx.needs_input_grad[1]:
            by_unembedding = torch.zeros_like(
                unembedding, dtype=torch.promote_types(unembedding.dtype, torch.float32)
            )
        losses, kept = [], []
        for rows, log_probs in _chunks(states, unembedding):
            candidates, q = choose(log_probs, rows)
            picked = log_probs.gather(1, candidates)
            # Adds tokens in one order, for any number of candidates.
            losses.append(-(q * picked).sum(dim=1).sum())
            kept.append((candidates, q, picked))
            if by_states is None and by_unembedding is None:
                continue
            # d loss / d logits; in place, for a chunk of them is the largest thing there is
            slope = (
                log_probs.exp_()
                .mul_(q.sum(dim=1, keepdim=True))
                .scatter_add_(1, candidates, -q)
                .div_(num_tokens)
                .to(states.dtype)
            )
            if by_states is not None:
                by_states[rows] = slope @ unembedding
            if by_unembedding is not None:
                by_unembedding += slope.T @ states[rows]
        candidates, q, picked = (torch.cat(parts) for parts in zip(*kept, strict=True))
        if by_unembedding is not None:
            by_unembedding = by_unembedding.to(unembedding.dtype)
        ctx.save_for_backward(
            states, unembedding, targets, candidates, q, picked, by_states, by_unembedding
        )
        return torch.stack(losses).sum() / num_tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        states, unembedding, targets, candidates, q, picked, by_states, by_unembedding = (
            ctx.saved_tensors
        )
        if torch.is_grad_enabled():
            return _again(grad, (states, unembedding, targets), candidates, q, ctx.needs_input_grad)
        by_targets = (
            None if targets is None or not ctx.needs_input_grad[2] else -grad * picked / len(states)
        )
        return _times(grad, by_states), _times(grad, by_unembedding), by_targets, None, None


def _again(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    candidates: Tensor,
    q: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradient with a graph, by torch's own operations, in recomputed chunks."""
    states, unembedding, targets = inputs
    q = q if targets is None else targets
    parts = [
        checkpoint(
            _chunk_loss,
            states[rows],
            unembedding,
            candidates[rows],
            q[rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for rows in (slice(start, start + CHUNK) for start in range(0, len(states), CHUNK))
    ]
    loss = torch.stack(parts).sum() / len(states)
    wanted = [
        tensor for tensor, need in zip(inputs, needed, strict=False) if need and tensor is not None
    ]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return (
        *(
            next(found) if need and tensor is not None else None
            for tensor, need in zip(inputs, needed, strict=False)
        ),
        None,
        None,
    )


def _chunk_loss(states: Tensor, unembedding: Tensor, candidates: Tensor, q: Tensor) -> Tensor:
    return -(q * _log_probs(states, unembedding).gather(1, candidates)).sum()


def _times(grad: Tensor, by: Tensor | None) -> Tensor | None:
    return None if by is None else grad * by
