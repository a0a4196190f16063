"""data2vec with feedback from dense labels: `problem=data2vec_nyuv2`."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metavpt.designers import figures
from metavpt.designers.crop import RandomCrop
from metavpt.designers.feature_targets import FeatureDesigner, FeatureTask, moved, tilted
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import Backbone
from metavpt.objectives.data2vec import data2vec_loss
from metavpt.objectives.goal_loss import goal_loss
from metavpt.objectives.ijepa import normalized_features
from metavpt.profiling.timers import phase
from metavpt.strategies.amortized import SupportsReplay
from metavpt.strategies.function_space import SupportsFunctionSpace
from metavpt.strategies.learned import SharedTrunk
from metavpt.strategies.selection import SupportsCandidates, SupportsSelection
from metavpt.strategies.tilted_targets import SupportsTilting
from metavpt.training.engine import Splittable

from .dense import NUM_PICTURES, DenseProblem


class HidingLearner(nn.Module):
    """Normalised images (B, 3, H, W) -> features (B, D, h, w) of all patches, those `hidden` (B, N) replaced by one mask token."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(backbone.width))

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        return self.backbone.tail(
            self.backbone.trunk(images, hidden=hidden, mask_token=self.mask_token)
        ).patches


class Data2VecDense(
    DenseProblem,
    SharedTrunk,
    SupportsCandidates,
    SupportsSelection,
    SupportsTilting,
    SupportsReplay,
    SupportsFunctionSpace,
    Splittable,
):
    """data2vec: the student predicts its EMA teacher's features of masked patches.

    There is no regression head: released backbones have none. The designer, or the tilt, modifies the targets.

    teacher_momentum   at the start; it rises linearly to 1
    """

    learner: HidingLearner
    designer: FeatureDesigner

    def __init__(
        self,
        backbone: Backbone,
        recipe: Callable[..., RandomCrop],
        designer: Callable[[RandomCrop, int, int], FeatureDesigner],
        teacher_momentum: float = 0.996,
        **dense: Any,
    ) -> None:
        self.learner = HidingLearner(backbone)
        self.teacher = Teacher(backbone)
        self.designer = designer(
            recipe(mean=backbone.mean, std=backbone.std), backbone.patch_size, backbone.width
        )
        self.teacher_momentum = teacher_momentum
        super().__init__(backbone, **dense)

    def recipe(self, batch: Any) -> FeatureTask:
        return self.designer.recipe_task(batch)

    def regularizer(self, task: FeatureTask) -> Tensor | None:
        return self.designer.regularizer(task)

    def candidates(self, batch: Any, num_candidates: int) -> list[FeatureTask]:
        return self.designer.random_tasks(batch, num_candidates)

    def microbatches(self, task: FeatureTask, num_parts: int) -> list[FeatureTask]:
        """The network is no part of the batch, whatever its shape."""
        return [
            collectives.cut(task._replace(phi={}), k, num_parts)._replace(phi=task.phi)
            for k in range(num_parts)
        ]

    def pretrain_loss(self, theta: Params, task: FeatureTask) -> Tensor:
        return self.pretrain_tail(theta, task)({})

    def pretrain_tail(self, theta: Params, task: FeatureTask) -> ComposedLoss:
        targets = self._targets(task)
        return goal_loss(
            self._student(theta, task),
            lambda told, goals: data2vec_loss(told, goals.view_as(targets)),
            targets.flatten(),
        )

    def per_sample_tail(self, theta: Params, task: FeatureTask) -> ComposedLoss:
        targets = self._targets(task)
        return ComposedLoss(
            self._student(theta, task), lambda told: data2vec_loss(told, targets, "none")
        )

    def tilt(
        self,
        theta: Params,
        task: FeatureTask,
        w: Params,
        gate: float,
        tau: float,
        num_candidates: int,
        derivative: DirectionalDerivative,
    ) -> FeatureTask:
        """The value of a target is how fast the student's own feature moves its way as the learner descends along w."""
        return tilted(task, self._values(theta, task, w, derivative), gate, tau)

    def replay_batch(
        self, theta: Params, batch: Any, w: Params, derivative: DirectionalDerivative
    ) -> dict[str, Tensor]:
        """What the teacher says of the patches and the values of their targets, both (B, N, D)."""
        task = self.recipe(batch)
        return self._replay(
            *self._described(task.images),
            self._values(theta, task, w, derivative),
            self.designer.grid,
        )

    def output_values(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """The same for labelled frames, with the values of the features themselves.

        Feedbacks are scaled to one norm before they are weighted, so that the weights do not depend on units.
        """
        values = []
        for name, frames in batch.items():
            images = self.normalize(frames.image, self.feature_size)
            described = [self._described(part) for part in images.split(self.batch_size)]
            states, features = (torch.cat(parts) for parts in zip(*described, strict=True))
            grid = (
                images.shape[-2] // self.backbone.patch_size,
                images.shape[-1] // self.backbone.patch_size,
            )
            values.append(
                (states, features, self._feedback_values(name, features, grid, frames), grid)
            )
        if len({grid for *_, grid in values}) > 1:
            raise MetaVPTError(
                "labelled sets whose frames differ in size make no lesson together; set problem.feature_size"
            )
        replays = [self._replay(*parts) for parts in values]
        return {key: torch.cat([replay[key] for replay in replays]) for key in replays[0]}

    def designer_loss(self, replay: dict[str, Tensor]) -> Tensor:
        return self.designer.loss(replay)

    def after_step(self, task: FeatureTask, progress: float) -> None:
        self.teacher.update(
            self.backbone, self.teacher_momentum + (1.0 - self.teacher_momentum) * progress
        )

    @torch.no_grad()
    def figures(self) -> dict[str, np.ndarray]:
        """An image, what the student sees of it, and the root mean square of its targets' shifts, 0 to the gate."""
        task = self.designer(next(iter(self.meta_batches(seed=0))))
        features, patch = self._described(task.images)[1], self.backbone.patch_size
        lengths = (self._targets(task) - features).square().mean(dim=-1).sqrt()
        rows = []
        for image, *maps in zip(
            task.images[:NUM_PICTURES].cpu() * self.std + self.mean,
            ~task.hidden.cpu(),
            lengths.cpu(),
            strict=False,
        ):
            seen, length = (
                m.view(self.designer.grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
                for m in maps
            )
            rows.append(
                [
                    figures.photo(image),
                    figures.photo(image * seen),
                    figures.colour(length, 0.0, max(self.designer.gate, 1e-3)),
                ]
            )
        return {"targets": figures.grid(rows), **super().figures()}

    def _student(self, theta: Params, task: FeatureTask) -> Callable[[Params], Tensor]:
        """theta_S -> the student's normalised features (B, N, D). The trunk runs once."""
        hiding = {"hidden": task.hidden, "mask_token": theta["mask_token"]}
        state = functional_call(
            self.backbone.trunk, params.subset(theta, "backbone.trunk."), (task.images,), hiding
        )

        def predictions(theta_s: Params) -> Tensor:
            tail = params.subset({**theta, **theta_s}, "backbone.tail.")
            return normalized_features(functional_call(self.backbone.tail, tail, (state,)).patches)

        return predictions

    def _values(
        self, theta: Params, task: FeatureTask, w: Params, derivative: DirectionalDerivative
    ) -> Tensor:
        with torch.no_grad():
            predictions = self._student(params.detach(theta), task)
        return -derivative(predictions, {name: theta[name] for name in w}, w)

    def _targets(self, task: FeatureTask) -> Tensor:
        states, features = self._described(task.images)
        targets = moved(features, task)
        return targets + self.designer.moves(task, states, features) if task.phi else targets

    @phase("teacher")
    @torch.no_grad()
    def _described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher's trunk and, normalised, its tail say of the patches, (B, N, D) each."""
        teacher = cast(Backbone, self.teacher.learner)
        hidden = teacher.trunk(images)
        features = normalized_features(teacher.tail(hidden).patches)
        return hidden.tokens[:, -features.shape[1] :], features

    def _feedback_values(
        self, name: str, features: Tensor, grid: tuple[int, int], frames: Any
    ) -> Tensor:
        """sum_j weight_j A_j / |A_j|, A_j minus the derivative by the features (B, N, D) of the j-th feedback of a labelled set."""
        features = features.clone().requires_grad_()
        with torch.enable_grad():
            losses = self._feedback[name](features.transpose(1, 2).unflatten(2, grid), frames)
        weights = self._feedback[name].weights
        values = {
            task: -torch.autograd.grad(loss, features, retain_graph=True)[0]
            for task, loss in losses.items()
        }
        return torch.stack(
            [weights[task] * to_unit_size(value) for task, value in values.items()]
        ).sum(dim=0)

    def _replay(
        self, states: Tensor, features: Tensor, values: Tensor, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        where = torch.tensor(grid, device=values.device).expand(len(values), 2)
        return {
            "states": states,
            "features": features,
            "values": to_unit_size(values),
            "grid": where,
        }


def to_unit_size(values: Tensor) -> Tensor:
    """Scaled to a mean square of 1 over the whole batch; zeros stay zeros."""
    return values / collectives.leave(values.square().mean()).sqrt().clamp_min(
        torch.finfo(values.dtype).tiny
    )
