"""DINO pretraining with feedback from dense labels: `problem=dino_nyuv2`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from metavpt import params, pictures
from metavpt.curvature import ComposedLoss
from metavpt.designers.masks import MaskDesigner
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError
from metavpt.learners.teacher import Teacher, cosine_momentum
from metavpt.learners.vit import Backbone, Learner, ProjectionHead
from metavpt.objectives.dino import center_update, centered_probs, dino_loss, sinkhorn_probs
from metavpt.params import Params

from .dense import NUM_PICTURES, DenseProblem


class DinoDense(DenseProblem):
    """Student and EMA teacher agree on the prototypes of an image across crops (DINO); the designer decides what the crops show.

    targets          "sinkhorn" (DINOv2, DINOv3; stateless) or "centering" (DINO; costs one more teacher pass a step)
    teacher_credit   whether the designer is credited for what the teacher sees of its views as well; the learner never is
    """

    learner: Learner
    designer: MaskDesigner

    def __init__(
        self,
        backbone: Backbone,
        recipe: Callable[..., MultiCrop],
        designer: Callable[[MultiCrop], MaskDesigner],
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
        return self._tail(theta, task, "mean")

    def per_sample_tail(self, theta: Params, task: Views) -> Callable[[Params], Tensor]:
        return self._tail(theta, task, "none")

    def candidates(self, batch: Any, num_candidates: int) -> list[Views]:
        return self.designer.random_tasks(batch, num_candidates)

    def pick(self, tasks: Sequence[Views], which: Tensor, sample: Tensor) -> Views:
        """Views hold the samples in their second dimension."""
        fields = (None if parts[0] is None else torch.stack(parts)[which, :, sample].transpose(0, 1) for parts in zip(*tasks, strict=True))
        return Views._make(fields)

    def _tail(self, theta: Params, task: Views, reduction: Literal["mean", "none"]) -> Callable[[Params], Tensor]:
        """The trunk and the teacher run once; the function returned runs the tail and the head."""
        backbone, head = self.backbone, self.learner.head
        targets = self._targets(task)
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

        return ComposedLoss(student_logits, lambda logits: dino_loss(list(logits), targets, self.student_temperature, reduction))

    def after_step(self, task: Views, progress: float) -> None:
        if self.targets == "centering":
            self.center["center"].data = center_update(self.center["center"], self._teacher_logits(task))
        self.teacher.update(self.learner, cosine_momentum(progress, 1.0, self.teacher_momentum))

    def figures(self) -> dict[str, np.ndarray]:
        return {"masks": self._mask_figure(), **super().figures()}

    def _targets(self, task: Views) -> Tensor:
        with torch.set_grad_enabled(self.teacher_credit and torch.is_grad_enabled()):
            logits = self._teacher_logits(task)
            if self.targets == "sinkhorn":
                return sinkhorn_probs(logits, self.teacher_temperature)
            return centered_probs(logits, self.center["center"], self.teacher_temperature)

    def _teacher_logits(self, task: Views) -> Tensor:
        """(2,B,K)"""
        return self.teacher(task.global_crops.flatten(0, 1)).unflatten(0, task.global_crops.shape[:2])

    @torch.no_grad()
    def _mask_figure(self) -> np.ndarray:
        """A global crop by the recipe, the designer's mask on it, and the view that the learner trains on."""
        batch = next(iter(self.meta_batches(seed=0)))
        recipe, task = self.recipe(batch), self.designer(batch)
        rows = []
        for i in range(min(NUM_PICTURES, recipe.global_crops.shape[1])):
            before, after = (self._denormalize(crops[0, i]) for crops in (recipe.global_crops, task.global_crops))
            rows.append([before, pictures.colour(task.masks[0, i, 0], 0.0, 1.0, "gray"), after])
        return pictures.grid(rows)

    def _denormalize(self, view: Tensor) -> np.ndarray:
        return pictures.photo(view.cpu() * self.std + self.mean)
