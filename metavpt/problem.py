"""The class that a user subclasses: a learner, a task designer, and the two losses that join them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.feedback.dense import weighted_sum
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.probes.samples import Texts
from metavpt.training.collapse import Sign


class Problem(ABC):
    """What is pretrained, on which tasks, and for whose benefit.

    learner            theta: trained only by `pretrain_loss` on detached tasks
    designer           phi: forward(batch) -> task; trained only by the value of the learner's update for `feedback_loss`
    feedback_weights   name -> weight of each of `feedback_losses`; needed by a problem that defines those

    Both losses are pure: same arguments, same value, nothing written. Estimators evaluate them many times a step, so a batch
    carries its own randomness (seeds, noise) and all state moves in `after_step`. Every attribute with a `state_dict` is part of
    a checkpoint.
    """

    learner: nn.Module
    designer: nn.Module
    feedback_weights: Mapping[str, float] = MappingProxyType({"feedback": 1.0})

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if (
            cls.feedback_loss is Problem.feedback_loss
            and cls.feedback_losses is Problem.feedback_losses
        ):
            raise MetaVPTError(
                f"{cls.__name__} has no feedback; define feedback_loss, or feedback_losses with feedback_weights"
            )
        return super().__new__(cls)

    @abstractmethod
    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        """Unlabelled batches in an order set by `seed`; begun again with another seed when it ends."""

    @abstractmethod
    def feedback_batches(self, seed: int) -> Iterable[Any]:
        """Labelled batches in an order set by `seed`; they reach the learner only through the designer."""

    @abstractmethod
    def pretrain_loss(self, theta: Params, task: Any) -> Tensor:
        """L_pre(theta; task), a scalar; theta names the learner's parameters, see `torch.func.functional_call`."""

    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        """L_down(theta; batch), a scalar. Define this, or `feedback_losses`, of which it is then the weighted sum."""
        return weighted_sum(self.feedback_losses(theta, batch), self.feedback_weights)

    def feedback_losses(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """Several feedbacks: a scalar for each name in `feedback_weights`; one of weight 0 may be left out. Default: `feedback_loss`."""
        return {"feedback": self.feedback_loss(theta, batch)}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the learner as it is, on data that neither loop sees."""

    # What follows has a default that suits most problems.

    def recipe(self, batch: Any) -> Any:
        """The task of the ordinary recipe, which `strategy=fixed` trains on. Default: the designer, never trained."""
        return self.designer(batch)

    def held_out_batches(self, seed: int) -> Iterable[Any]:
        """Labelled batches that no designer update sees, to measure on them what it predicts. Default: as `feedback_batches`."""
        return self.feedback_batches(seed)

    def meta_batches(self, seed: int) -> Iterable[Any]:
        """Unlabelled batches that only the designer's updates see. Default: as `pretrain_batches`."""
        return self.pretrain_batches(seed)

    def by_domain(self, batch: Any) -> dict[str, Any]:
        """An unlabelled meta batch split by the names in `feedback_weights`. For the combination `DomainMatched`."""
        raise MetaVPTError(
            f"{type(self).__name__} has no by_domain, which strategy.combination=DomainMatched needs; define it"
        )

    def aligned_parameters(self) -> Sequence[str]:
        """Names of theta_S, the parameters through which value is measured. Default: all."""
        return list(params.named(self.learner))

    def pretrain_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        """theta_S -> L_pre. What does not depend on theta_S is best computed once, before the function is returned."""
        return lambda theta_s: self.pretrain_loss({**theta, **theta_s}, task)

    def per_sample_tail(self, theta: Params, task: Any) -> Callable[[Params], Tensor]:
        """theta_S -> the pretraining loss of each sample, (B,). For strategies that select: greedy, selection, hardest."""
        raise MetaVPTError(
            f"{type(self).__name__} has no per_sample_tail, which strategies that select samples or tasks need; define it"
        )

    def candidates(self, batch: Any, num_candidates: int) -> list[Any]:
        """Tasks for `batch` drawn at random from the designer's space by the batch's own randomness. For greedy, hardest, uniform."""
        raise MetaVPTError(
            f"{type(self).__name__} has no candidates, which strategies that draw tasks at random need; define it"
        )

    def pick(self, tasks: Sequence[Any], which: Tensor, sample: Tensor) -> Any:
        """The task whose k-th sample is sample[k] of tasks[which[k]]; both (n,) int64. Default: every tensor has the samples first."""
        return tree_map(
            lambda *parts: torch.stack(parts)[
                which.to(parts[0].device), sample.to(parts[0].device)
            ],
            *tasks,
        )

    def tilt(
        self,
        theta: Params,
        task: Any,
        w: Params,
        gate: float,
        tau: float,
        num_candidates: int,
        derivative: DirectionalDerivative,
    ) -> Any:
        """`task` with the share `gate` of its targets tilted towards those of highest value along w. For `Tilt`, which says how far."""
        raise MetaVPTError(
            f"{type(self).__name__} has no tilt, which strategies that tilt targets need; define it"
        )

    def lesson(
        self, theta: Params, batch: Any, w: Params, derivative: DirectionalDerivative
    ) -> dict[str, Tensor]:
        """What value along w says of the targets of an unlabelled batch, and what `taught` needs beside it, detached. For `Amortized`."""
        raise MetaVPTError(
            f"{type(self).__name__} has no lesson, which strategy=amortized needs; define it and taught"
        )

    def functional_lesson(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """What feedback says of the learner's outputs themselves on a labelled batch: `values` of the targets they are told, minus the
        derivative of the feedback loss by the outputs, and what `taught` needs beside them, rows by sample, detached. For `Functional`.
        """
        raise MetaVPTError(
            f"{type(self).__name__} has no functional_lesson, which strategy=functional needs; define it and taught"
        )

    def taught(self, lesson: dict[str, Tensor]) -> Tensor:
        """Minus the value of the designer's targets on a lesson, with its trust region: a scalar, by phi alone; no learner runs."""
        raise MetaVPTError(
            f"{type(self).__name__} has no taught, which strategies that teach the designer lessons need; define it"
        )

    def regularizer(self, task: Any) -> Tensor | None:
        """R(phi), added to the designer's loss through the task that it made. Default: none."""
        return None

    def fit_heads(self) -> None:  # noqa: B027 - a hook that may stay empty
        """Called before each designer update: fit what `feedback_loss` reads the learner with, the learner frozen."""

    def heads(self) -> Sequence[str]:
        """Names of the attributes that `fit_heads` writes, so that a measurement can fit heads of its own. Default: none."""
        return ()

    def is_steered(self, metric: str) -> bool:
        """Whether the feedback is about this metric of `evaluate`; the others are side effects. Default: all are."""
        return True

    def warm_up_parameters(self) -> Sequence[str]:
        """Names trained during the trainer's head warm-up, the rest frozen: a fresh SSL head on a released backbone. Default: all."""
        return [name for name, p in self.learner.named_parameters() if p.requires_grad]

    def parts(self, task: Any, num_parts: int) -> list[Any]:
        """A task in `num_parts` equal ones, for trainer.accumulate. Default: what is as long as the first tensor has the samples first."""
        return [collectives.cut(task, k, num_parts) for k in range(num_parts)]

    def trunks(self) -> Sequence[nn.Module]:
        """Modules that parallel=fsdp shards over the processes: run by their forward alone, no aligned parameter inside. Default: none."""
        return []

    def whole_parameters(self) -> Sequence[str]:
        """Names, within a trunk, of parameters that losses also read outside its forward, so that they stay whole. Default: none."""
        return []

    def after_step(self, task: Any, progress: float) -> None:  # noqa: B027
        """State that moves with the learner's step: EMA teacher, centre. `progress` in [0, 1] is the share of the budget spent."""

    def figures(self) -> dict[str, np.ndarray]:
        """Pictures for the report by name, uint8 arrays (H, W, 3)."""
        return {}

    def texts(self) -> Texts:
        """Answers, and tokens with their targets, for the report."""
        return Texts([], [])

    def num_samples(self, batch: Any) -> int:
        """Samples in an unlabelled batch. Default: the first dimension of its first tensor."""
        tensor = next(
            (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None
        )
        if tensor is None:
            raise MetaVPTError(
                f"{type(self).__name__}.num_samples: the batch holds no tensor; override num_samples to count its samples"
            )
        return len(tensor)

    def vital_signs(self) -> dict[str, Sign]:
        """Numbers that tell a collapse, cheap enough for every probe. Default: none."""
        return {}

    def counters(self) -> dict[str, float]:
        """Totals for the log that grow beside the steps: images passed over. Default: none."""
        return {}

    def to(self, device: torch.device | str) -> None:
        """Move every module to `device`."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: value.state_dict()
            for name, value in vars(self).items()
            if hasattr(value, "state_dict")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)
