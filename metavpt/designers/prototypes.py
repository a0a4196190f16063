"""A target designer for self-distillation: what the student should answer, beside what the teacher answers."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from metavpt.designers.designer import Designer
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.histograms import histograms
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError


class PrototypeDesigner(Designer):
    """Scores of the prototypes and a gate for each global crop, with which `reshape` changes the teacher's probabilities inside the loss.

    scores = max_score * tanh(<query(crop), key_k> / sqrt(rank)), gate = max_gate * tanh(network(crop)), which is exactly 0 at first. Scores
    start at random: were they 0 as well, neither would have a gradient. support: how many of the teacher's most probable prototypes may
    change. gate_weight: weight of the mean squared gate, the trust region.
    """

    def __init__(
        self,
        recipe: MultiCrop,
        encoder: ImageEncoder,
        num_prototypes: int,
        rank: int = 16,
        support: int = 64,
        max_gate: float = 0.5,
        max_score: float = 2.0,
        gate_weight: float = 0.01,
    ) -> None:
        super().__init__(recipe)
        if not 0 < max_gate <= 1:
            raise MetaVPTError(f"PrototypeDesigner: max_gate must lie in (0, 1], got {max_gate}")
        if not 2 <= support <= num_prototypes:
            raise MetaVPTError(f"PrototypeDesigner: support={support} must lie between 2 and the {num_prototypes} prototypes")
        self.encoder, self.support = encoder, support
        self.max_gate, self.max_score, self.gate_weight = max_gate, max_score, gate_weight
        self.query = nn.Linear(encoder.width, rank)
        self.keys = nn.Parameter(torch.randn(num_prototypes, rank))
        self.gate = zero_linear(encoder.width, 1)

    def refine(self, views: Views, batch: Any) -> Views:
        features = self.encoder(views.global_crops.flatten(0, 1)).unflatten(0, views.global_crops.shape[:2])
        scores = self.max_score * (F.linear(self.query(features), self.keys) / self.keys.shape[1] ** 0.5).tanh()
        return views._replace(scores=scores, gates=self.max_gate * self.gate(features)[..., 0].tanh(), support=self.support)

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Scores and gates uniform within their bounds."""
        shape = (*views.global_crops.shape[:2], len(self.keys) + 1)
        *scores, gates = (2 * torch.rand(shape, generator=rng) - 1).to(views.global_crops).split([len(self.keys), 1], dim=-1)
        return views._replace(scores=self.max_score * scores[0], gates=self.max_gate * gates[..., 0], support=self.support)

    def regularizer(self, task: Views) -> Tensor:
        """gate_weight * mean gate^2."""
        return self.gate_weight * _gates(task).square().mean()

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """The distribution of the gates, and of the scores."""
        gates = _gates(task)
        pairs = {"gate": (torch.zeros_like(gates), gates)}
        if task.scores is not None:
            pairs["score"] = (gates.new_empty(0), task.scores)
        return {"prototypes": histograms({"": pairs})}


def reshape(probs: Tensor, task: Views) -> Tensor:
    """q = (1 - a) p + a * softmax(log p + r) on the support, p elsewhere: the teacher's probabilities p (2, B, K) as `task` wants them.

    a = |gate|, r = scores with the sign of the gate. The softmax shares out what mass p has on the support, so q sums to 1 as p does.
    Linear in a; q = p bit for bit where the gate is 0. A task without gates leaves p as it is.
    """
    if task.scores is None or task.gates is None or task.support is None:
        return probs
    if task.scores.shape != probs.shape:
        raise MetaVPTError(
            f"PrototypeDesigner: scores {tuple(task.scores.shape)} do not fit the teacher's {tuple(probs.shape)}; "
            "designer.num_prototypes must be the problem's"
        )
    top, index = probs.topk(task.support, dim=-1)
    gates, scores = (x.to(probs.dtype) for x in (task.gates[..., None], task.scores.gather(-1, index)))
    # A gate that could only open would stay shut for ever wherever the scores it starts with are worth less than nothing. With the sign
    # passed on to the scores, q is to first order the same function on both sides of 0.
    sign = torch.where(gates < 0, -1.0, 1.0)
    logits = top.clamp_min(torch.finfo(top.dtype).tiny).log() + sign * scores
    moved = top.sum(dim=-1, keepdim=True) * logits.softmax(dim=-1)
    return probs.scatter_add(-1, index, sign * gates * (moved - top))


def _gates(task: Views) -> Tensor:
    if task.gates is None:
        raise MetaVPTError("PrototypeDesigner: the task has no gates; it must come from the designer, not from recipe_task")
    return task.gates
