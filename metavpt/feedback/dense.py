"""Feedback on dense labels: light heads on frozen patch features, and their losses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metavpt.dense_tasks.task import DenseTask
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import weighted_sum
from metavpt.probes.features import FeatureSet
from metavpt.probes.heads import LinearHead, Ridge, enlarge

SUFFIX = "_weight"


class DenseFeedback(nn.Module):
    """The losses of dense tasks through linear-BN heads.

    L_down = sum_j weight_j (mean of `feedback_loss` of task j over the known pixels), for example
    depth_weight * L1(depth in metres) + segmentation_weight * CE(classes). `fit` trains the heads
    on detached features of labelled train batches. `forward` returns the losses of features
    (B, D, h, w) by name, without those of weight 0. It is pure: it reads the batch statistics of
    `fit` and changes nothing (V-Pretraining, section 3: heads first, then g_down on separate
    batches).

    Args:
        width: D.
        tasks: The tasks of the labelled set.
        lr: The learning rate of the heads.
        weights: `<task>_weight` of each task. None, the default, is 1 for a task of the set.
    """

    fitted_by_steps = True

    def __init__(
        self,
        width: int,
        tasks: Sequence[DenseTask],
        lr: float = 1e-2,
        **weights: float | None,
    ) -> None:
        super().__init__()
        self.weights = feedback_weights(tasks, weights)
        self.tasks = {task.name: task for task in tasks}
        self.norm = nn.BatchNorm2d(width, affine=False)
        for task in tasks:
            head = nn.Conv2d(width, task.num_outputs, kernel_size=1)
            nn.init.zeros_(head.weight)
            self.add_module(task.name, head)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr)

    def forward(self, features: Tensor, frames: Any) -> dict[str, Tensor]:
        """Compute the losses of features (B, D, h, w) by name."""
        statistics = self.norm.running_mean, self.norm.running_var
        return self._losses(F.batch_norm(features, *statistics, eps=self.norm.eps), frames)

    def fit(self, features: Tensor, frames: Any) -> float:
        """One AdamW step of the heads on features (B,D,h,w); the loss before it."""
        with torch.enable_grad():
            loss = weighted_sum(
                self._losses(self.norm.train()(features.detach()), frames), self.weights
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _losses(self, normalized: Tensor, frames: Any) -> dict[str, Tensor]:
        losses = {}
        for name, task in self.tasks.items():
            if self.weights[name]:
                target = task.target(frames)
                output = enlarge(self.get_submodule(name)(normalized), target.shape[-2:])
                total, count = task.feedback_loss(task.activate(output), target)
                losses[name] = total / collectives.mean_count(count)
        return losses

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the heads' optimizer."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the heads' optimizer."""
        self.optimizer.load_state_dict(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Leave out heads of other tasks: older checkpoints have heads for absent labels, too."""
        saved = [key for key in state_dict if key.endswith((".weight", ".bias"))]  # in their order
        own = {prefix + name: k for k, name in enumerate(dict(self.named_parameters()))}
        if own.keys() < set(saved):
            extra = state_dict[f"{prefix}_extra_state"]
            state = {
                own[key]: extra["state"][k]
                for k, key in enumerate(saved)
                if key in own and k in extra["state"]
            }
            groups = [{**group, "params": list(own.values())} for group in extra["param_groups"]]
            state_dict[f"{prefix}_extra_state"] = {"state": state, "param_groups": groups}
            for key in set(saved) - own.keys():
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class RidgeFeedback(nn.Module):
    """The loss of ridge heads fitted to other frames: the value of a feature after a refit.

    L_down = sum_j weight_j (mean of `squared_error` of task j over the known pixels), for example
    depth_weight * squared error (m^2) + segmentation_weight * squared error to one-hot classes
    (Brier score).

    The frames of a labelled batch are split into `num_folds` parts. Each is scored with the heads
    that `Ridge`, the head of the probes, fits to the others in closed form. Scored features and,
    through the solve of the normal equations, fitted ones carry the gradient: g_down is the total
    derivative. It does not ask for changes that a refit absorbs: if `penalty` is small, an
    invertible linear map of the features changes neither the predictions nor the loss. A fixed head
    would ask for it. Weights are as in `DenseFeedback`.

    There is no state: `forward` is a pure function of features (B, D, h, w) and labels. It solves
    in float64. The folds are those of the whole batch: each of several processes solves all of
    them, on the features of all.
    """

    fitted_by_steps = False

    def __init__(
        self,
        width: int,
        tasks: Sequence[DenseTask],
        penalty: float = 1e-3,
        num_folds: int = 2,
        **weights: float | None,
    ) -> None:
        super().__init__()
        check_num_folds(num_folds)
        self.weights = feedback_weights(tasks, weights)
        self.ridge, self.num_folds = Ridge(penalty), num_folds
        self.tasks = {task.name: task for task in tasks if self.weights[task.name]}

    def forward(self, features: Tensor, frames: Any) -> dict[str, Tensor]:
        """Compute the losses of features (B, D, h, w) by name."""
        features = collectives.joined(features)
        frame = torch.arange(len(features), device=features.device)
        every = {
            name: FeatureSet(features, collectives.gather(task.target(frames)))
            for name, task in self.tasks.items()
        }
        errors: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.tasks}
        for part in folds(frame, self.num_folds):
            rest = frame[(frame < part[0]) | (frame > part[-1])]
            for name, task in self.tasks.items():
                head = self.ridge.fit(task, every[name].take(rest))
                for chunk in every[name].take(part).chunks():
                    errors[name].append(_squares(task, head, chunk))
        losses = {}
        for name, parts in errors.items():
            total, count = (torch.stack(values).sum() for values in zip(*parts, strict=True))
            losses[name] = total / count.clamp_min(1)
        return losses


def _squares(task: DenseTask, head: LinearHead, frames: FeatureSet) -> tuple[Tensor, Tensor]:
    """Sum the squared errors of a head, with recomputation in the backward pass.

    Outputs at full size of all frames of a large batch would not fit into memory.
    """

    def squares(weight: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        output = replace(head, weight=weight, bias=bias)(features)
        return task.squared_error(output, frames.target)

    return checkpoint(
        squares,
        head.weight,
        head.bias,
        frames.features,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def feedback_weights(tasks: Sequence[DenseTask], given: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each task.

    Args:
        tasks: The tasks of the labelled set.
        given: `<task>_weight` of any task; None is 1 for those of the set.

    Raises:
        MetaVPTError: A weight is negative, all are 0, or one is that of a task the set has not.
    """
    found = {task.name: 1.0 for task in tasks}
    for key, weight in given.items():
        name = key.removesuffix(SUFFIX)
        if not key.endswith(SUFFIX):
            raise MetaVPTError(f"feedback.{key}: no such key; a weight is called <task>{SUFFIX}")
        if not isinstance(weight, int | float | None):
            raise MetaVPTError(f"feedback.{key}={weight}: must be a number or null")
        if weight and name not in found:
            raise MetaVPTError(
                f"feedback.{key}={weight}: the labelled set is read without {name}; set it to 0"
            )
        if weight is not None and name in found:
            found[name] = float(weight)
    if min(found.values()) < 0 or not any(found.values()):
        listed = ", ".join(f"feedback.{name}{SUFFIX}={found[name]:g}" for name in found)
        raise MetaVPTError(f"{listed}: none may be negative and one must be positive")
    return found


def check_num_folds(num_folds: int) -> None:
    """Raise MetaVPTError for fewer than two folds: a head scores frames it was not fitted to."""
    if num_folds < 2:
        raise MetaVPTError(
            f"feedback.num_folds={num_folds} must be at least 2: "
            "a head scores frames that it was not fitted to"
        )


def folds(frame: Tensor, num_folds: int) -> Sequence[Tensor]:
    """Split the indices of the frames of a labelled batch into folds of neighbours.

    Args:
        frame: Indices, of shape (L,).
        num_folds: Folds.

    Raises:
        MetaVPTError: There are fewer frames than folds.
    """
    if len(frame) < num_folds:
        raise MetaVPTError(
            f"feedback.num_folds={num_folds} needs as many labelled frames, and a batch "
            f"has {len(frame)}; raise problem.feedback_batch_size"
        )
    return frame.tensor_split(num_folds)
