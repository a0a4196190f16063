"""Next-token pretraining on designed soft targets, with feedback from answered word problems: `problem=lm_gsm8k`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metavpt.data.tokens import TokenBatch
from metavpt.designers.targets import TargetDesigner, designer_body
from metavpt.designers.token_weights import TokenWeights
from metavpt.linear_product import DirectionalDerivative
from metavpt.objectives.target_task import SoftTargets, TargetTask, Tilted, target_loss, target_loss_per_sample, target_tail
from metavpt.params import Params
from metavpt.watch import Sign, gate_signs

from .language import LanguageProblem


class LMGSM8K(LanguageProblem):
    """Cross-entropy to soft targets on the true token and the learner's own best guesses; the designer says how soft and which.

    With `TokenWeights` for a designer: to the true token, some tokens counting more than others.
    """

    designer: TargetDesigner | TokenWeights

    def __init__(self, designer: Callable[[int], TargetDesigner | TokenWeights], **language: Any) -> None:
        super().__init__(**language)
        self.designer = designer(self.learner.vocab_size)

    def recipe(self, batch: TokenBatch) -> TargetTask:
        return self.designer.recipe_task(batch)

    def candidates(self, batch: TokenBatch, num_candidates: int) -> list[TargetTask]:
        if not isinstance(self.designer, TokenWeights):
            return super().candidates(batch, num_candidates)
        return self.designer.random_tasks(batch, num_candidates)

    def regularizer(self, task: TargetTask) -> Tensor:
        return self.designer.regularizer(task)

    def pretrain_loss(self, theta: Params, task: TargetTask) -> Tensor:
        return target_loss(self.learner, theta, task)

    def pretrain_tail(self, theta: Params, task: TargetTask) -> Callable[[Params], Tensor]:
        return target_tail(self.learner, theta, task)

    def vital_signs(self) -> dict[str, Sign]:
        """Of the last task: nothing is run for them."""
        targets = self.last_task.targets if self.last_task else None
        if not isinstance(targets, SoftTargets) or not isinstance(self.designer, TargetDesigner):
            return {}
        return gate_signs(torch.as_tensor(targets.gate), self.designer.max_gate)

    def tilt(
        self, theta: Params, task: TargetTask, w: Params, gate: float, tau: float, num_candidates: int, derivative: DirectionalDerivative
    ) -> TargetTask:
        return task._replace(targets=Tilted(w, gate, tau, num_candidates, derivative))

    def per_sample_tail(self, theta: Params, task: TargetTask) -> Callable[[Params], Tensor]:
        return target_loss_per_sample(self.learner, theta, task)


def target_designer(vocab_size: int, width: int = 256, num_layers: int = 6, num_heads: int = 4, **targets: Any) -> TargetDesigner:
    """A `TargetDesigner` (options `targets`) with a body of its own."""
    return TargetDesigner(designer_body(vocab_size, width, num_layers, num_heads), **targets)


def token_weights(vocab_size: int, width: int = 64, num_layers: int = 2, num_heads: int = 4, **weights: Any) -> TokenWeights:
    """A `TokenWeights` (options `weights`) with a body of its own."""
    return TokenWeights(designer_body(vocab_size, width, num_layers, num_heads), **weights)
