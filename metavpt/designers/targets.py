"""The target designer: how much each next-token target moves, and to which candidates."""

import torch
from torch import Tensor, nn

from metavpt.data.tokens import TokenBatch
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.objectives.target_task import OneHot, SoftTargets, TargetTask


class TargetDesigner(nn.Module):
    """q_t = (1 - alpha_t) onehot + alpha_t softmax over C_t of (residual * log p_t(c) + u_t . E_c).

    See method.md, section 4. A causal transformer reads the tokens up to and including the
    predicted one and computes u_t and the gate alpha_t in [0, max_gate]; E is its own embedding.
    Gates start at exactly 0, so a new designer is plain next-token prediction bit for bit, and r_t
    starts at the learner's own prediction. The gradient passes at the edge of the gate, so the
    designer can leave it.

    Args:
        body: See `designer_body`. Its vocabulary must be the learner's.
        num_candidates: K.
        max_gate: The largest alpha_t.
        excess_weight: See `regularizer`.
    """

    def __init__(
        self,
        body: LanguageModel,
        num_candidates: int = 64,
        max_gate: float = 0.5,
        excess_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < max_gate <= 1:
            raise MetaVPTError(f"TargetDesigner: max_gate={max_gate} must be in (0, 1]")
        if not 2 <= num_candidates <= body.vocab_size:
            raise MetaVPTError(
                f"TargetDesigner: num_candidates={num_candidates}: choose from 2 to "
                f"{body.vocab_size}, the size of the vocabulary"
            )
        if not body.tied:
            raise MetaVPTError(
                "TargetDesigner: the body scores candidates by its embedding; build it with "
                "tie_word_embeddings=True"
            )
        self.body, self.num_candidates, self.max_gate, self.excess_weight = (
            body,
            num_candidates,
            max_gate,
            excess_weight,
        )
        self.vectors = nn.Linear(body.width, body.width, bias=False)
        self.gate = nn.Linear(body.width, 1)
        self.residual = nn.Parameter(torch.ones(()))
        for parameter in (*self.vectors.parameters(), *self.gate.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, batch: TokenBatch) -> TargetTask:
        """Make the task of a batch."""
        states = self.body(batch)  # (B, T, d): those at t have read token t
        logits = self.gate(states).squeeze(2)
        # Not clamp alone: at the edge, where a new designer stands, it may pass no gradient (see
        # MaskDesigner).
        share = torch.where(
            (logits >= 0.0) & (logits <= 1.0), logits, logits.detach().clamp(0.0, 1.0)
        )
        excess = (logits - 1.0).relu() + (-logits).relu()
        table, residual = self.body.trunk.embed_tokens.weight, self.residual
        if not torch.is_grad_enabled():
            # The parameters themselves would require a gradient in the learner's loss.
            table, residual = table.detach(), residual.detach()
        return TargetTask(
            batch,
            SoftTargets(
                self.max_gate * share,
                self.num_candidates,
                residual,
                self.vectors(states),
                table,
                excess,
            ),
        )

    def recipe_task(self, batch: TokenBatch) -> TargetTask:
        """Plain next-token prediction; no network runs."""
        return TargetTask(batch, OneHot())

    def regularizer(self, task: TargetTask) -> Tensor:
        """Compute excess_weight * mean_t (relu(z_t - 1) + relu(-z_t)) for the gate's logits z.

        Outside its range a gate has no other gradient.
        """
        excess = getattr(task.targets, "excess", None)
        if excess is None:
            raise MetaVPTError(
                "TargetDesigner.regularizer: the task has no gates; it must come from the "
                "designer, not from recipe_task"
            )
        return self.excess_weight * excess.mean()


def designer_body(
    vocab_size: int,
    width: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    max_length: int = 2048,
) -> LanguageModel:
    """Build a Llama of the paper's size with random weights.

    (128, 2, 4) is enough for a learner of a few million parameters.
    """
    return random_language_model(
        "llama",
        tail_layers=1,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )
