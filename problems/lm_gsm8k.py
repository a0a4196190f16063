"""Next-token pretraining on soft targets with feedback from word problems: `problem=lm_gsm8k`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from metavpt.data.tokens import TokenBatch
from metavpt.designers.states import StateDesigner
from metavpt.designers.targets import TargetDesigner, designer_body
from metavpt.designers.token_weights import TokenWeights
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.lm import LanguageModel
from metavpt.objectives.prediction import Prediction
from metavpt.objectives.target_task import (
    OneHot,
    OnRows,
    SoftTargets,
    TargetTask,
    Tilted,
    target_loss,
    target_loss_per_sample,
    target_tail,
)
from metavpt.strategies.learned import SharedTrunk
from metavpt.strategies.selection import SupportsSelection
from metavpt.strategies.tilted_targets import SupportsTilting
from metavpt.training.health import HealthMetric, gate_signs

from .language import LanguageProblem

LMDesigner = StateDesigner | TargetDesigner | TokenWeights


class LMGSM8K(LanguageProblem, SharedTrunk, SupportsSelection, SupportsTilting):
    """Cross-entropy to designed soft targets on the true token and the learner's own best guesses.

    With `TokenWeights` for a designer: to the true token, some tokens counting more than others.

    steered_domains   domains of the stream whose targets may be other than the true token, by any
    strategy; the rows of other domains keep
                      it, as under `fixed`. None: all
    """

    designer: LMDesigner

    def __init__(
        self,
        designer: Callable[[LanguageModel], LMDesigner],
        steered_domains: Sequence[str] | None = None,
        **language: Any,
    ) -> None:
        super().__init__(**language)
        self.designer = designer(self.learner)
        domains = self.data.domains
        unknown = [name for name in steered_domains or [] if name not in domains]
        if unknown or (steered_domains is not None and not len(steered_domains)):
            raise MetaVPTError(
                f"problem.steered_domains={list(steered_domains or [])}: name domains of the "
                f"stream, {', '.join(domains)}"
            )
        self._steered = (
            None
            if steered_domains is None
            else torch.tensor([name in steered_domains for name in domains])
        )

    def limited(self, task: TargetTask) -> TargetTask:
        """The task with its targets on the rows of `steered_domains` alone."""
        rows = self.steered_rows(task.batch)
        return (
            task
            if rows is None or isinstance(task.targets, OneHot)
            else task._replace(targets=OnRows(task.targets, rows))
        )

    def steered_rows(self, batch: TokenBatch) -> Tensor | None:
        """(B,) bool; None: all."""
        return (
            None if self._steered is None else self._steered.to(batch.domain.device)[batch.domain]
        )

    @override
    def recipe(self, batch: TokenBatch) -> TargetTask:
        return self.designer.recipe_task(batch)

    @property
    def candidates(self) -> Callable[[TokenBatch, int], list[TargetTask]]:
        """See `SupportsCandidates`, which only `TokenWeights` has."""
        if isinstance(self.designer, TokenWeights):
            return self.designer.random_tasks
        raise AttributeError(f"{type(self.designer).__name__} draws no random tasks")

    @override
    def regularizer(self, task: TargetTask) -> Tensor | None:
        return self.designer.regularizer(task)

    @override
    def pretrain_loss(self, theta: Params, task: TargetTask) -> Tensor:
        return target_loss(self.learner, theta, self.limited(task))

    @override
    def pretrain_tail(self, theta: Params, task: TargetTask) -> Callable[[Params], Tensor]:
        return target_tail(self.learner, theta, self.limited(task))

    @override
    def after_step(self, task: TargetTask, progress: float) -> None:
        self.last_task = self.limited(task)

    def health_metrics(self) -> dict[str, HealthMetric]:
        """Of the last task: nothing is run for them."""
        targets = self.last_task.targets if self.last_task else None
        targets = targets.targets if isinstance(targets, OnRows) else targets
        if not isinstance(targets, SoftTargets) or not isinstance(self.designer, TargetDesigner):
            return {}
        return gate_signs(torch.as_tensor(targets.gate), self.designer.max_gate)

    @override
    def tilt(
        self,
        theta: Params,
        task: TargetTask,
        w: Params,
        gate: float,
        tau: float,
        num_candidates: int,
        derivative: DirectionalDerivative,
    ) -> TargetTask:
        return task._replace(targets=Tilted(w, gate, tau, num_candidates, derivative))

    @property
    def replay_batch(
        self,
    ) -> Callable[[Params, TokenBatch, Params, DirectionalDerivative], dict[str, Tensor]]:
        """See `SupportsReplay`, which only `StateDesigner` has."""
        if not isinstance(designer := self.designer, StateDesigner):
            raise AttributeError(f"{type(designer).__name__} learns from no replay buffer")

        def replay_batch(
            theta: Params, batch: TokenBatch, w: Params, derivative: DirectionalDerivative
        ) -> dict[str, Tensor]:
            prediction = Prediction.of(self.learner, params.detach(theta), batch)
            return designer.replay_batch(prediction, w, derivative, self.steered_rows(batch))

        return replay_batch

    @property
    def designer_loss(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """See `SupportsReplay`, which only `StateDesigner` has."""
        if not isinstance(designer := self.designer, StateDesigner):
            raise AttributeError(f"{type(designer).__name__} learns from no replay buffer")
        return lambda replay: designer.loss(replay, self.learner.unembedding({}).detach())

    @override
    def per_sample_tail(self, theta: Params, task: TargetTask) -> Callable[[Params], Tensor]:
        return target_loss_per_sample(self.learner, theta, self.limited(task))


def target_designer(
    learner: LanguageModel,
    width: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    **targets: Any,
) -> TargetDesigner:
    """A `TargetDesigner` (options `targets`) with a body of its own."""
    return TargetDesigner(
        designer_body(learner.vocab_size, width, num_layers, num_heads), **targets
    )


def state_designer(learner: LanguageModel, **targets: Any) -> StateDesigner:
    """A `StateDesigner` (options `targets`) of the learner's width."""
    return StateDesigner(learner.width, **targets)


def token_weights(
    learner: LanguageModel, width: int = 64, num_layers: int = 2, num_heads: int = 4, **weights: Any
) -> TokenWeights:
    """A `TokenWeights` (options `weights`) with a body of its own."""
    return TokenWeights(designer_body(learner.vocab_size, width, num_layers, num_heads), **weights)
