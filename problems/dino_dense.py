"""DINO pretraining with feedback from dense labels: `problem=dino_nyuv2`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from metavpt import params
from metavpt.curvature import ComposedLoss
from metavpt.designers.designer import Designer
from metavpt.designers.prototypes import reshape
from metavpt.designers.selection import weigh
from metavpt.designers.views import MultiCrop, Views, pick_views
from metavpt.errors import MetaVPTError
from metavpt.learners.teacher import Teacher, cosine_momentum
from metavpt.learners.vit import Backbone, Learner, ProjectionHead
from metavpt.objectives.dino import center_update, centered_probs, dino_loss, sinkhorn_probs
from metavpt.params import Params

from .dense import DenseProblem


class DinoDense(DenseProblem):
    """Student and EMA teacher agree on the prototypes of an image across crops (DINO); the designer decides what the crops
    show, how much each image counts, or what the teacher answers.

    targets          "sinkhorn" (DINOv2, DINOv3; stateless) or "centering" (DINO; costs one more teacher pass a step)
    teacher_credit   whether the designer is credited for what the teacher sees of its views as well; the learner never is
    """

    learner: Learner
    designer: Designer

    def __init__(
        self,
        backbone: Backbone,
        recipe: Callable[..., MultiCrop],
        designer: Callable[[MultiCrop], Designer],
        pool: Literal["cls", "mean"] = "cls",
        num_prototypes: int = 8192,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        targets: Literal["sinkhorn", "centering"] = "sinkhorn",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_momentum: float = 0.996,
        teacher_credit: bool = False,
        **dense: Any,
    ) -> None:
        if targets not in ("sinkhorn", "centering"):
            raise MetaVPTError(f"problem.targets={targets}: known are sinkhorn, centering")
        self.learner = Learner(backbone, ProjectionHead(backbone.width, num_prototypes, head_hidden, head_bottleneck), pool)
        self.teacher = Teacher(self.learner)
        self.designer = designer(recipe(mean=backbone.mean, std=backbone.std))
        self.targets, self.teacher_credit, self.teacher_momentum = targets, teacher_credit, teacher_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center = torch.nn.ParameterDict({"center": torch.nn.Parameter(torch.zeros(num_prototypes), requires_grad=False)})
        super().__init__(backbone, **dense)

    def recipe(self, batch: Any) -> Views:
        return self.designer.recipe_task(batch)

    def regularizer(self, task: Views) -> Tensor:
        return self.designer.regularizer(task)

    def pretrain_loss(self, theta: Params, task: Views) -> Tensor:
        return self.pretrain_tail(theta, task)({})

    def pretrain_tail(self, theta: Params, task: Views) -> Callable[[Params], Tensor]:
        per_image = self.per_sample_tail(theta, task)
        return ComposedLoss(per_image.outputs, lambda logits: per_image.criterion(logits).mean())

    def per_sample_tail(self, theta: Params, task: Views) -> ComposedLoss:
        """The trunk and the teacher run once; the function returned runs the tail and the head."""
        backbone, head = self.backbone, self.learner.head
        targets = reshape(self._targets(task), task)
        crops = [flat for flat in (task.global_crops.flatten(0, 1), task.local_crops.flatten(0, 1)) if len(flat)]
        hidden = [functional_call(backbone.trunk, params.subset(theta, "backbone.trunk."), (crop,)) for crop in crops]
        batch_size = task.global_crops.shape[1]

        def student_logits(theta_s: Params) -> Tensor:
            """(V,B,K), the global views first."""
            own = {**theta, **theta_s}
            tail_parameters, head_parameters = params.subset(own, "backbone.tail."), params.subset(own, "head.")
            features = [functional_call(backbone.tail, tail_parameters, (h,)) for h in hidden]
            logits = [functional_call(head, head_parameters, (self.learner.summary(f),)) for f in features]
            return torch.cat([group.unflatten(0, (-1, batch_size)) for group in logits])

        def per_image(logits: Tensor) -> Tensor:
            return weigh(dino_loss(list(logits), targets, self.student_temperature, "none"), task.weights)

        return ComposedLoss(student_logits, per_image)

    def candidates(self, batch: Any, num_candidates: int) -> list[Views]:
        return self.designer.random_tasks(batch, num_candidates)

    def pick(self, tasks: Sequence[Views], which: Tensor, sample: Tensor) -> Views:
        return pick_views(tasks, which, sample)

    def after_step(self, task: Views, progress: float) -> None:
        if self.targets == "centering":
            self.center["center"].data = center_update(self.center["center"], self._teacher_logits(task))
        self.teacher.update(self.learner, cosine_momentum(progress, 1.0, self.teacher_momentum))

    @torch.no_grad()
    def figures(self) -> dict[str, np.ndarray]:
        batch = next(iter(self.meta_batches(seed=0)))
        return {**self.designer.figures(batch, self.designer(batch)), **super().figures()}

    def _targets(self, task: Views) -> Tensor:
        with torch.set_grad_enabled(self.teacher_credit and torch.is_grad_enabled()):
            logits = self._teacher_logits(task)
            if self.targets == "sinkhorn":
                return sinkhorn_probs(logits, self.teacher_temperature)
            return centered_probs(logits, self.center["center"], self.teacher_temperature)

    def _teacher_logits(self, task: Views) -> Tensor:
        """(2,B,K)"""
        return self.teacher(task.global_crops.flatten(0, 1)).unflatten(0, task.global_crops.shape[:2])
