"""A target designer for self-distillation, which changes the teacher's probabilities."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.designers.designer import Designer
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.histograms import histograms
from metavpt.designers.views import MultiCrop, Views
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.objectives.spread import spread

GREEDY_TAU = (
    1e-4  # log p is no less than -88 in float32: beside scores divided by this it does not count
)


class PrototypeDesigner(Designer):
    """Scores of prototypes and a gate for each global crop, for `reshape` inside the loss.

    scores = max_score * tanh(<query(crop), key_k> / sqrt(rank)) and gate = max_gate *
    tanh(network(crop)), which is exactly 0 at first. Scores start at random: if they were 0 too,
    neither would have a gradient. `support` is the number of the teacher's most probable prototypes
    that may change. `gate_weight` is the weight of the mean squared gate, the trust region.

    With `patches`, each patch has scores and a gate too, by its own queries and keys on the
    encoder's features at its place. This is for an objective with a patch term (iBOT). The task
    then holds as many scores as the teacher has patch logits.
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
        patches: bool = False,
    ) -> None:
        super().__init__(recipe)
        if not 0 < max_gate <= 1:
            raise MetaVPTError(f"PrototypeDesigner: max_gate must lie in (0, 1], got {max_gate}")
        if not 2 <= support <= num_prototypes:
            raise MetaVPTError(
                f"PrototypeDesigner: support={support} must lie between 2 and the "
                f"{num_prototypes} prototypes"
            )
        self.encoder, self.support = encoder, support
        self.max_gate, self.max_score, self.gate_weight = max_gate, max_score, gate_weight
        self.query = nn.Linear(encoder.width, rank)
        self.keys = nn.Parameter(torch.randn(num_prototypes, rank))
        self.gate = zero_linear(encoder.width, 1)
        self.patches = PatchScorer(encoder.width, num_prototypes, rank) if patches else None

    @override
    def refine(self, views: Views, batch: Any) -> Views:
        crops = views.global_crops.flatten(0, 1)
        places = self.encoder.places(crops)
        features = places.mean(dim=(2, 3)).unflatten(0, views.global_crops.shape[:2])
        views = self._with(
            views, _scores(self.query(features), self.keys), self.gate(features)[..., 0].tanh()
        )
        if self.patches is None:
            return views
        grid = self._grid(views)
        patches = (
            F.interpolate(places, grid, mode="bilinear")
            .flatten(2)
            .transpose(1, 2)
            .unflatten(0, views.global_crops.shape[:2])
        )
        return self._with_patches(views, *self.patches(patches))

    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        """Draw scores and gates uniformly within their bounds."""
        shape = views.global_crops.shape[:2]
        views = self._with(views, *self._uniform(views, shape, rng))
        if self.patches is None:
            return views
        return self._with_patches(
            views, *self._uniform(views, (*shape, math.prod(self._grid(views))), rng)
        )

    def regularizer(self, task: Views) -> Tensor:
        """Compute gate_weight * mean gate^2 of the crops, plus that of the patches."""
        squares = _gates(task).square().mean()
        return self.gate_weight * (
            squares if task.patch_gates is None else squares + task.patch_gates.square().mean()
        )

    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        """Show the distributions of gates and scores."""
        gates = _gates(task)
        parts = {
            "gate": gates,
            "score": task.scores,
            "patch gate": task.patch_gates,
            "patch score": task.patch_scores,
        }
        none = gates.new_empty(0)
        return {
            "prototypes": histograms(
                {
                    "": {
                        name: (none if "score" in name else torch.zeros_like(x), x)
                        for name, x in parts.items()
                        if x is not None
                    }
                }
            )
        }

    def _with(self, views: Views, scores: Tensor, gates: Tensor) -> Views:
        return views._replace(
            scores=self.max_score * scores, gates=self.max_gate * gates, support=self.support
        )

    def _with_patches(self, views: Views, scores: Tensor, gates: Tensor) -> Views:
        return views._replace(
            patch_scores=self.max_score * scores, patch_gates=self.max_gate * gates
        )

    def _uniform(self, views: Views, shape: Sequence[int], rng: Generator) -> tuple[Tensor, Tensor]:
        """Draw numbers in [-1, 1] for scores (*shape, K) and gates (*shape)."""
        scores, gates = (
            (
                2
                * collectives.drawn(
                    lambda shape: torch.rand(shape, generator=rng),
                    (*shape, len(self.keys) + 1),
                    dim=1,
                )
                - 1
            )
            .to(views.global_crops)
            .split([len(self.keys), 1], -1)
        )
        return scores, gates[..., 0]

    def _grid(self, views: Views) -> tuple[int, int]:
        """Return (h, w), the patches of a global crop."""
        if self.recipe.patch_size is None:
            raise MetaVPTError(
                "PrototypeDesigner: designer.patches needs an objective with a patch term; give "
                "problem.terms.ibot a weight"
            )
        height, width = views.global_crops.shape[-2:]
        return height // self.recipe.patch_size, width // self.recipe.patch_size


class PatchScorer(nn.Module):
    """Patch features (..., width) -> scores (..., K) and gates (...), both in [-1, 1].

    Gates are exactly 0 at first.
    """

    def __init__(self, width: int, num_prototypes: int, rank: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, rank)
        self.keys = nn.Parameter(torch.randn(num_prototypes, rank))
        self.gate = zero_linear(width, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores (..., K) and gates (...) of features (..., width)."""
        return _scores(self.query(features), self.keys), self.gate(features)[..., 0].tanh()


def reshape(probs: Tensor, task: Views) -> Tensor:
    """Change the teacher's probabilities p (2, B, K) as `task` asks.

    q = (1 - a) p + a softmax(log p + r) on the support, and p elsewhere, with a = |gate| and r the
    scores with the sign of the gate. The softmax distributes the mass of p on the support, so q
    sums to 1. q is linear in a and equals p bit for bit for gate 0. A task without gates leaves p
    as it is.
    """
    if task.scores is None or task.gates is None or task.support is None:
        return probs
    return _reshape(probs, task.scores, task.gates, task.support)


def reshape_patches(probs: Tensor, task: Views) -> Tensor:
    """Change the probabilities (M, K) of the masked patches in the same way."""
    if (
        task.patch_scores is None
        or task.patch_gates is None
        or task.support is None
        or task.hidden is None
    ):
        return probs
    return _reshape(
        probs, task.patch_scores[task.hidden], task.patch_gates[task.hidden], task.support
    )


def tilted(
    task: Views,
    values: Mapping[str, Tensor],
    probs: Mapping[str, Tensor],
    gate: float,
    tau: float,
    num_candidates: int,
) -> Views:
    """Return `task` with the best targets in closed form (method.md, section 6).

    Every gate is `gate` and the scores are values / tau. On the `num_candidates` most probable
    prototypes, q = (1 - gate) p + gate softmax(log p + A / tau) maximises <q, A> within a trust
    region: A / tau has mean square 1 / tau^2 about its mean under p, so the mean KL is about 1 / (2
    tau^2) before the gate. With tau 0 the best candidate takes all.

    Args:
        task: The views.
        values: The value A of each prototype by term: dino (2, B, K), ibot (M, K).
        probs: The teacher's probabilities, in the same shapes.
        gate: The share that is taken from the teacher's probabilities.
        tau: The temperature.
        num_candidates: Prototypes that may receive it.
    """
    scores = {term: _scaled(values[term], probs[term], tau, num_candidates) for term in values}
    task = task._replace(support=num_candidates)
    if "dino" in scores:
        task = task._replace(
            scores=scores["dino"], gates=torch.full_like(scores["dino"][..., 0], gate)
        )
    if "ibot" in scores and task.hidden is not None:
        placed = scores["ibot"].new_zeros(*task.hidden.shape, scores["ibot"].shape[-1])
        placed[task.hidden] = scores["ibot"]
        task = task._replace(patch_scores=placed, patch_gates=torch.full_like(placed[..., 0], gate))
    return task


def _scaled(values: Tensor, probs: Tensor, tau: float, num_candidates: int) -> Tensor:
    if num_candidates > probs.shape[-1]:
        raise MetaVPTError(
            f"strategy.num_candidates={num_candidates} is more than the {probs.shape[-1]} "
            "prototypes"
        )
    top, index = probs.topk(num_candidates, dim=-1)
    tiny = torch.finfo(values.dtype).tiny
    scale = spread(values.gather(-1, index), top.clamp_min(tiny).log())
    return values / (max(tau, GREEDY_TAU) * scale).clamp_min(tiny)


def _reshape(probs: Tensor, all_scores: Tensor, gates: Tensor, support: int) -> Tensor:
    """Change probs (..., K) by all_scores (..., K) and gates (...)."""
    if all_scores.shape != probs.shape:
        raise MetaVPTError(
            f"PrototypeDesigner: scores {tuple(all_scores.shape)} do not fit the teacher's "
            f"{tuple(probs.shape)}; "
            "designer.num_prototypes must be the problem's"
        )
    top, index = probs.topk(support, dim=-1)
    gates, scores = (x.to(probs.dtype) for x in (gates[..., None], all_scores.gather(-1, index)))
    # A gate that could only open would stay shut for ever wherever the scores it starts with are
    # worth less than nothing. With the sign
    # passed on to the scores, q is to first order the same function on both sides of 0.
    sign = torch.where(gates < 0, -1.0, 1.0)
    logits = top.clamp_min(torch.finfo(top.dtype).tiny).log() + sign * scores
    moved = top.sum(dim=-1, keepdim=True) * logits.softmax(dim=-1)
    return probs.scatter_add(-1, index, sign * gates * (moved - top))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    return (F.linear(query, keys) / keys.shape[1] ** 0.5).tanh()


def _gates(task: Views) -> Tensor:
    if task.gates is None:
        raise MetaVPTError(
            "PrototypeDesigner: the task has no gates; it must come from the designer, not from "
            "recipe_task"
        )
    return task.gates
