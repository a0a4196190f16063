"""data2vec with feedback from dense labels: `problem=data2vec_nyuv2`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from metavpt.dense_tasks import colours
from metavpt.designers import figures
from metavpt.designers.crop import RandomCrop, WholeFrames
from metavpt.designers.feature_targets import FeatureDesigner, FeatureTask, moved, tilted
from metavpt.distributed import collectives
from metavpt.errors import check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import Backbone, Hidden
from metavpt.objectives.data2vec import data2vec_loss
from metavpt.objectives.goal_loss import goal_loss
from metavpt.objectives.ijepa import normalized_features
from metavpt.profiling import phase
from metavpt.strategies.amortized import SupportsReplay
from metavpt.strategies.learned import SharedTrunk
from metavpt.strategies.selection import SupportsCandidates, SupportsSelection
from metavpt.strategies.tilted_targets import SupportsTilting
from metavpt.training.engine import Splittable

from .dense import NUM_PICTURES, DenseProblem


class HidingLearner(nn.Module):
    """Features of all patches of an image of which the student does not see some.

    Args:
        backbone: Of the features.
        hidden_at: Where patches are hidden. "input": a learned mask token stands for them before
            the first block. "tail": after the trunk, the states of a blank image stand for them.
            Then student and teacher can share the states of a frozen trunk, and nothing is new to
            pretrained blocks.
    """

    def __init__(self, backbone: Backbone, hidden_at: Literal["input", "tail"]) -> None:
        super().__init__()
        self.backbone, self.hidden_at = backbone, hidden_at
        if hidden_at == "input":
            self.mask_token = nn.Parameter(torch.zeros(backbone.width))


class Data2VecDense(
    DenseProblem,
    SharedTrunk,
    SupportsCandidates,
    SupportsSelection,
    SupportsTilting,
    SupportsReplay,
    Splittable,
):
    """data2vec: the student predicts its EMA teacher's features of masked patches.

    There is no regression head: released backbones have none. The designer says how features should
    move, and moves the targets or decides which of them count, see `FeatureDesigner`.

    Args:
        backbone: Of student and teacher.
        recipe: Makes the images.
        designer: Makes the designer of recipe, patch size, width and `num_outputs`.
        teacher_momentum: At the start. It rises linearly to 1.
        hidden_at: Where patches are hidden, see `HidingLearner`.
        dense: See `DenseProblem`.
    """

    learner: HidingLearner
    designer: FeatureDesigner

    def __init__(
        self,
        backbone: Backbone,
        recipe: Callable[..., RandomCrop | WholeFrames],
        designer: Callable[..., FeatureDesigner],
        teacher_momentum: float = 0.996,
        hidden_at: Literal["input", "tail"] = "input",
        **dense: Any,
    ) -> None:
        check_known(hidden_at, "problem.hidden_at", "input", "tail")
        self.learner = HidingLearner(backbone, hidden_at)
        self.teacher = Teacher(backbone)
        self.teacher_momentum = teacher_momentum
        super().__init__(backbone, **dense)
        self.designer = designer(
            recipe(mean=backbone.mean, std=backbone.std),
            backbone.patch_size,
            backbone.width,
            num_outputs=self.num_outputs,
        )

    @override
    def recipe(self, batch: Any) -> FeatureTask:
        return self.designer.recipe_task(batch)

    @override
    def regularizer(self, task: FeatureTask) -> Tensor | None:
        return self.designer.regularizer(task)

    @override
    def candidates(self, batch: Any, num_candidates: int) -> list[FeatureTask]:
        return self.designer.random_tasks(batch, num_candidates)

    def microbatches(self, task: FeatureTask, num_parts: int) -> list[FeatureTask]:
        """The network is no part of the batch, whatever its shape."""
        return [
            collectives.cut(task._replace(phi={}), k, num_parts)._replace(phi=task.phi)
            for k in range(num_parts)
        ]

    def hardest_task(self, batch: Any) -> FeatureTask:
        """Make the task of highest loss, for the adversarial control."""
        return self.designer.hardest_task(batch)

    @override
    def pretrain_loss(self, theta: Params, task: FeatureTask) -> Tensor:
        step = self._step(theta, task)
        predictions = step.student({})
        return data2vec_loss(predictions, step.targets, weights=step.weights(predictions.detach()))

    def pretrain_tail(self, theta: Params, task: FeatureTask) -> ComposedLoss:
        """Weights are those of the student at theta. They are held, as in the step itself."""
        step = self._step(theta, task)
        if self.designer.surface == "targets":
            return goal_loss(
                step.student,
                lambda told, goals: data2vec_loss(told, goals.view_as(step.targets)),
                step.targets.flatten(),
            )
        return step.loss(step.weights_now(), "mean")

    @override
    def per_sample_tail(self, theta: Params, task: FeatureTask) -> ComposedLoss:
        step = self._step(theta, task)
        return step.loss(step.weights_now(), "none")

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
        """Tilt targets by how fast the student's own features move towards them along w."""
        return tilted(task, self._values(theta, task, w, derivative), gate, tau)

    def replay_batch(
        self, theta: Params, batch: Any, w: Params, derivative: DirectionalDerivative
    ) -> dict[str, Tensor]:
        """Compute the teacher's features of the patches and the values of moves, both (B, N, D)."""
        task = self.recipe(batch)
        return self._replay(
            *self._described(task.images),
            self._values(theta, task, w, derivative),
            self.designer.grid,
        )

    @override
    def after_step(self, task: FeatureTask, progress: float) -> None:
        self.teacher.update(
            self.backbone, self.teacher_momentum + (1.0 - self.teacher_momentum) * progress
        )

    @torch.no_grad()
    def figures(self) -> dict[str, np.ndarray]:
        """Draw images, what the student sees of them, and what the designer made of their patches.

        That is the RMS shift of the targets, or the mean weight of a patch's features in the loss.
        """
        task = self.designer(next(iter(self.meta_batches(seed=0))))
        patch, theta = self.backbone.patch_size, params.detach(params.named(self.learner))
        if self.designer.surface == "targets":
            name, column, most = "targets", "shift of the targets", max(self.designer.gate, 1e-3)
            top = f"{most:g}"
            shifts = self._step(theta, task).targets - self._described(task.images)[1]
            made = shifts.square().mean(dim=-1).sqrt()
        else:
            name, column, most, top = "weights", "weight in the loss", 2.0, "2 and more"
            weights = self._step(theta, task).weights_now()
            made = torch.ones(task.hidden.shape) if weights is None else weights.mean(dim=-1)
        rows = []
        for image, *maps in zip(
            task.images[:NUM_PICTURES].cpu() * self.std + self.mean,
            ~task.hidden.cpu(),
            made.cpu(),
            strict=False,
        ):
            seen, shown = (
                m.view(self.designer.grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
                for m in maps
            )
            rows.append(
                [
                    figures.photo(image),
                    figures.photo(image * seen),
                    colours.colour(shown.clamp(max=most), 0.0, most),
                ]
            )
        columns = ["image", "what the student sees", column]
        legend = colours.scale("0", top)
        return {
            name: figures.with_legend(figures.titled(figures.grid(rows), columns), legend),
            **super().figures(),
        }

    def _step(self, theta: Params, task: FeatureTask) -> "_Step":
        """What a step on `task` needs. Trunk and teacher run once."""
        trunk = params.subset(theta, "backbone.trunk.")
        seen: Hidden | None = None
        if self.learner.hidden_at == "tail":
            seen = cast(Hidden, functional_call(self.backbone.trunk, trunk, (task.images,)))
            state = self.hidden_states(theta, task.images, seen, task.hidden)
        else:
            hiding = {"hidden": task.hidden, "mask_token": theta["mask_token"]}
            state = functional_call(self.backbone.trunk, trunk, (task.images,), hiding)

        def student(theta_s: Params) -> Tensor:
            tail = params.subset({**theta, **theta_s}, "backbone.tail.")
            return normalized_features(functional_call(self.backbone.tail, tail, (state,)).patches)

        shared = seen if self.frozen_trunk else None
        states, features = self._described(task.images, shared)
        moves = moved(features, task) - features
        if task.phi:
            moves = moves + self.designer.moves(task, states, features)
        if self.designer.surface == "targets":
            return _Step(student, features + moves, lambda _: None)
        return _Step(
            student, features, lambda told: self.designer.weights(task, features - told, moves)
        )

    def _values(
        self, theta: Params, task: FeatureTask, w: Params, derivative: DirectionalDerivative
    ) -> Tensor:
        with torch.no_grad():
            student = self._step(params.detach(theta), task).student
        return -derivative(student, {name: theta[name] for name in w}, w)

    @phase("teacher")
    @torch.no_grad()
    def _described(self, images: Tensor, seen: Hidden | None = None) -> tuple[Tensor, Tensor]:
        """The teacher's trunk states and normalised features of patches, (B, N, D) each.

        Args:
            images: (B, 3, H, W).
            seen: Their trunk states, where the student's trunk is the teacher's.
        """
        teacher = cast(Backbone, self.teacher.learner)

        def answer() -> tuple[Tensor, Tensor]:
            hidden = teacher.trunk(images) if seen is None else seen
            features = normalized_features(teacher.tail(hidden).patches)
            return hidden.tokens[:, -features.shape[1] :], features

        return self.teacher.once([images], answer)

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


class _Step(NamedTuple):
    """A step of the student.

    Attributes:
        student: theta_S -> its normalised features (B, N, D).
        targets: (B, N, D).
        weights: Features of the student -> weights in the loss, None where all count alike.
    """

    student: Callable[[Params], Tensor]
    targets: Tensor
    weights: Callable[[Tensor], Tensor | None]

    def weights_now(self) -> Tensor | None:
        """The weights at theta."""
        with torch.no_grad():
            told = self.student({})
        return self.weights(told)

    def loss(self, weights: Tensor | None, reduction: Literal["mean", "none"]) -> ComposedLoss:
        """theta_S -> the loss with these weights, its mean or that of each image."""

        def at(theta_s: Params) -> ComposedLoss:
            return self.loss(self.weights(self.student(theta_s)), reduction)

        return ComposedLoss(
            self.student,
            lambda told: data2vec_loss(told, self.targets, reduction, weights),
            at=None if weights is None else at,
        )


def to_unit_size(values: Tensor) -> Tensor:
    """Scaled to a mean square of 1 over the whole batch; zeros stay zeros."""
    return values / collectives.leave(values.square().mean()).sqrt().clamp_min(
        torch.finfo(values.dtype).tiny
    )
