"""DINO pretraining with feedback from dense labels: `problem=dino_nyuv2`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from metavpt.data.loader import Batch
from metavpt.designers.designer import Designer
from metavpt.designers.mixer import mix_terms
from metavpt.designers.prototypes import reshape, reshape_patches, tilted
from metavpt.designers.selection import weigh
from metavpt.designers.views import MultiCrop, Views, pick_views
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.annealing import cosine
from metavpt.learners.projection import Learner, ProjectionHead
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import Backbone, Features
from metavpt.objectives.dino import center_update, centered_probs, sinkhorn_probs
from metavpt.objectives.distillation import active_terms, hidden_of, pack, term_losses, unpack
from metavpt.objectives.goal_loss import GoalLoss, goal_loss
from metavpt.profiling.timers import phase
from metavpt.strategies.learned import SharedTrunk
from metavpt.strategies.selection import SupportsCandidates, SupportsSelection
from metavpt.strategies.tilted_targets import SupportsTilting
from metavpt.training.engine import Splittable
from metavpt.training.health import HealthMetric, mask_signs, outcome_signs

from .dense import DenseProblem

CENTERS = {"dino": "center", "ibot": "patch_center"}
ANSWERS = (
    "scores",
    "gates",
    "patch_scores",
    "patch_gates",
)  # the parts of a task that only say what the teacher answers
DINO = MappingProxyType({"dino": 1.0})


@dataclass(frozen=True)
class Answers:
    """The teacher's logits of a task, by term. No state: without them it would be asked again, and answer the same."""

    task: Views | None
    logits: dict[str, Tensor]


class DinoDense(
    DenseProblem,
    SharedTrunk,
    SupportsCandidates,
    SupportsSelection,
    SupportsTilting,
    Splittable,
):
    """DINO: student and EMA teacher agree on the prototypes of an image across crops.

    The designer decides what the crops show, the weight of each image, the teacher's answers, or the weight of each term.

    terms            weights of the terms of the loss, see `objectives.distillation`; one of weight 0 costs nothing. dino is that of the
                     first line; ibot, koleo and gram make it DINOv2's and DINOv3's. The student sees the global crops with patches hidden
                     where ibot has a weight
    patch_head       head of ibot's patches: "shared" with the image's (iBOT), or "own" (DINOv2, DINOv3)
    gram_anchor      whose patches gram holds on to: the "teacher"'s, or those of the backbone as it was at first, "frozen"
    targets          "sinkhorn" (DINOv2, DINOv3; stateless) or "centering" (DINO)
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
        terms: Mapping[str, float] = DINO,
        patch_head: Literal["shared", "own"] = "shared",
        gram_anchor: Literal["teacher", "frozen"] = "teacher",
        targets: Literal["sinkhorn", "centering"] = "sinkhorn",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_momentum: float = 0.996,
        teacher_credit: bool = False,
        **dense: Any,
    ) -> None:
        check_known(targets, "problem.targets", "sinkhorn", "centering")
        check_known(patch_head, "problem.patch_head", "shared", "own")
        check_known(gram_anchor, "problem.gram_anchor", "teacher", "frozen")
        self.terms, self.num_prototypes = active_terms(terms), num_prototypes
        hides, own = "ibot" in self.terms, "ibot" in self.terms and patch_head == "own"
        sizes = (backbone.width, num_prototypes, head_hidden, head_bottleneck)
        self.learner = Learner(
            backbone, ProjectionHead(*sizes), pool, hides, ProjectionHead(*sizes) if own else None
        )
        self.patch_head = "patch_head" if own else "head"
        self.teacher = Teacher(self.learner)
        self.anchor = (
            Teacher(backbone) if "gram" in self.terms and gram_anchor == "frozen" else None
        )
        hiding = {"patch_size": backbone.patch_size} if hides else {}
        self.designer = designer(recipe(mean=backbone.mean, std=backbone.std, **hiding))
        self.targets, self.teacher_credit, self.teacher_momentum = (
            targets,
            teacher_credit,
            teacher_momentum,
        )
        self.student_temperature, self.teacher_temperature = (
            student_temperature,
            teacher_temperature,
        )
        names = ["center"] + ["patch_center"] * hides
        zeros = {
            name: torch.nn.Parameter(torch.zeros(num_prototypes), requires_grad=False)
            for name in names
        }
        self.center = torch.nn.ParameterDict(zeros)
        self._answered = Answers(None, {})
        super().__init__(backbone, **dense)

    def recipe(self, batch: Any) -> Views:
        return self.designer.recipe_task(batch)

    def regularizer(self, task: Views) -> Tensor:
        return self.designer.regularizer(task)

    def pretrain_loss(self, theta: Params, task: Views) -> Tensor:
        return self.pretrain_tail(theta, task)({})

    def pretrain_tail(self, theta: Params, task: Views) -> ComposedLoss:
        """A `GoalLoss` where a designer may change what the teacher answers, and nothing else."""
        outputs, criterion, goals = self._distillation(theta, task)
        others = (part for name, part in task._asdict().items() if name not in ANSWERS)
        if not len(goals) or any(
            isinstance(part, Tensor) and part.requires_grad for part in others
        ):
            return ComposedLoss(outputs, lambda packed: criterion(packed, goals).mean())
        return goal_loss(outputs, lambda packed, goals: criterion(packed, goals).mean(), goals)

    def per_sample_tail(self, theta: Params, task: Views) -> ComposedLoss:
        outputs, criterion, goals = self._distillation(theta, task)
        return ComposedLoss(outputs, lambda packed: criterion(packed, goals))

    def tilt(
        self,
        theta: Params,
        task: Views,
        w: Params,
        gate: float,
        tau: float,
        num_candidates: int,
        derivative: DirectionalDerivative,
    ) -> Views:
        """The teacher's probabilities tilted towards the prototypes of highest first-order value, see `prototypes.tilted`."""
        loss = self.pretrain_tail(theta, task)
        if not isinstance(loss, GoalLoss):
            raise MetaVPTError(
                f"strategy=tilt: no term of problem.terms={self.terms} has a target to tilt; give dino or ibot a weight"
            )
        slopes = loss.slopes({name: theta[name] for name in w}, w, derivative)
        shapes = self._goal_shapes(task)
        return tilted(
            task,
            unpack(-slopes[:-1], shapes),
            unpack(loss.targets[:-1], shapes),
            gate,
            tau,
            num_candidates,
        )

    def candidates(self, batch: Any, num_candidates: int) -> list[Views]:
        return self.designer.random_tasks(batch, num_candidates)

    def pick(self, tasks: Sequence[Views], which: Tensor, sample: Tensor) -> Views:
        return pick_views(tasks, which, sample)

    def microbatches(self, task: Views, num_parts: int) -> list[Views]:
        samples = torch.arange(task.global_crops.shape[1], device=task.global_crops.device).chunk(
            num_parts
        )
        return [pick_views([task], torch.zeros_like(own), own) for own in samples]

    def after_step(self, task: Views, progress: float) -> None:
        if self.targets == "centering":
            known = self._answered.task is task
            answers = (
                self._answered.logits
                if known
                else self._teacher_logits(self._teacher_features(task), task)
            )
            for term, logits in answers.items():
                if len(logits):  # no patch may be hidden
                    center = self.center[CENTERS[term]]
                    center.data = center_update(center, logits)
        self._answered = Answers(None, {})
        self.teacher.update(self.learner, cosine(self.teacher_momentum, 1.0, progress))

    @torch.no_grad()
    def health_metrics(self) -> dict[str, HealthMetric]:
        task = self.designer(Batch(self._watched(), seed=0))
        signs = {**super().health_metrics(), **mask_signs([task.masks, task.local_masks])}
        if "dino" in self.terms:
            logits = self._teacher_logits(self._teacher_features(task), task)["dino"].flatten(0, 1)
            signs |= outcome_signs(
                centered_probs(logits, self.center["center"], self.teacher_temperature)
            )
        return signs

    @torch.no_grad()
    def figures(self) -> dict[str, np.ndarray]:
        batch = next(iter(self.meta_batches(seed=0)))
        return {**self.designer.figures(batch, self.designer(batch)), **super().figures()}

    def _distillation(
        self, theta: Params, task: Views
    ) -> tuple[Callable[[Params], Tensor], Callable[[Tensor, Tensor], Tensor], Tensor]:
        """theta_S -> the student's outputs; these and the goals -> the loss of each image, (B,); the goals. Trunk and teacher run once."""
        student, goals, anchor = self._student(theta, task), *self._goals(task)
        shapes, goal_shapes = self._shapes(task), self._goal_shapes(task)

        def per_image(outputs: Tensor, goals: Tensor) -> Tensor:
            losses = term_losses(
                unpack(outputs, shapes),
                {**unpack(goals, goal_shapes), **anchor},
                task.hidden,
                self.student_temperature,
            )
            return weigh(mix_terms(losses, self.terms.values(), task.mix), task.weights)

        return (
            lambda theta_s: pack(student(theta_s)),
            per_image,
            pack(goals) if goals else task.global_crops.new_empty(0),
        )

    def _student(self, theta: Params, task: Views) -> Callable[[Params], dict[str, Tensor]]:
        """theta_S -> for each term what the student makes of the views."""
        backbone, summary, batch_size = (
            self.backbone,
            self.learner.summary,
            task.global_crops.shape[1],
        )
        trunk = params.subset(theta, "backbone.trunk.")
        hiding = (
            {"hidden": hidden_of(task.hidden).flatten(0, 1), "mask_token": theta["mask_token"]}
            if "ibot" in self.terms
            else {}
        )
        states = [
            functional_call(backbone.trunk, trunk, (task.global_crops.flatten(0, 1),), hiding)
        ]
        if "dino" in self.terms and len(task.local_crops):
            states.append(functional_call(backbone.trunk, trunk, (task.local_crops.flatten(0, 1),)))

        def outputs(theta_s: Params) -> dict[str, Tensor]:
            own = {**theta, **theta_s}
            tail = params.subset(own, "backbone.tail.")
            features = [functional_call(backbone.tail, tail, (state,)) for state in states]

            def logits(head: str, x: Tensor) -> Tensor:
                return functional_call(
                    getattr(self.learner, head), params.subset(own, f"{head}."), (x,)
                )

            made = {
                "dino": lambda: torch.cat(
                    [logits("head", summary(f)).unflatten(0, (-1, batch_size)) for f in features]
                ),
                "ibot": lambda: logits(
                    self.patch_head, _patches(features[0])[hidden_of(task.hidden)]
                ),
                "koleo": lambda: summary(features[0]).unflatten(0, (2, batch_size)),
                "gram": lambda: _patches(features[0]),
            }
            return {term: made[term]() for term in self.terms}

        return outputs

    def _shapes(self, task: Views) -> dict[str, tuple[int, ...]]:
        """Of what the student makes, by term."""
        (num_globals, batch_size), size = task.global_crops.shape[:2], task.global_crops.shape[-2:]
        num_patches, width = size.numel() // self.backbone.patch_size**2, self.backbone.width
        num_hidden = 0 if task.hidden is None else int(task.hidden.sum())
        shapes = {
            "dino": (num_globals + len(task.local_crops), batch_size, self.num_prototypes),
            "ibot": (num_hidden, self.num_prototypes),
            "koleo": (num_globals, batch_size, width),
            "gram": (num_globals, batch_size, num_patches, width),
        }
        return {term: shapes[term] for term in self.terms}

    def _goal_shapes(self, task: Views) -> dict[str, tuple[int, ...]]:
        """Of what the teacher answers, by term."""
        shapes = self._shapes(task)
        return {
            term: (2, *shapes[term][1:]) if term == "dino" else shapes[term]
            for term in shapes
            if term in CENTERS
        }

    def _goals(self, task: Views) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the student is to answer, by term, as the designer wants it; and what gram anchors it to."""
        with (
            phase("teacher"),
            torch.set_grad_enabled(self.teacher_credit and torch.is_grad_enabled()),
        ):
            features = self._teacher_features(task)
            logits = self._teacher_logits(features, task)
            # What the centre will be moved by, once the step on this task is taken: the teacher is not to be asked twice.
            if not any(isinstance(part, Tensor) and part.requires_grad for part in task):
                self._answered = Answers(task, logits)
            probs = {
                term: self._probs(of_term, self.center[CENTERS[term]])
                for term, of_term in logits.items()
            }
            anchor = {}
            if "gram" in self.terms:
                anchor = {
                    "gram": _patches(
                        self.anchor(task.global_crops.flatten(0, 1)) if self.anchor else features
                    )
                }
        reshaped = {"dino": reshape, "ibot": reshape_patches}
        return {term: reshaped[term](goal, task) for term, goal in probs.items()}, anchor

    def _teacher_features(self, task: Views) -> Features:
        return cast(Learner, self.teacher.learner).backbone(task.global_crops.flatten(0, 1))

    def _teacher_logits(self, features: Features, task: Views) -> dict[str, Tensor]:
        """dino (2,B,K), ibot (M,K), where they have a weight."""
        teacher, made = cast(Learner, self.teacher.learner), {}
        if "dino" in self.terms:
            made["dino"] = teacher.head(teacher.summary(features)).unflatten(
                0, task.global_crops.shape[:2]
            )
        if "ibot" in self.terms:
            made["ibot"] = getattr(teacher, self.patch_head)(
                _patches(features)[hidden_of(task.hidden)]
            )
        return made

    def _probs(self, logits: Tensor, center: Tensor) -> Tensor:
        if self.targets == "sinkhorn":
            return sinkhorn_probs(logits, self.teacher_temperature)
        return centered_probs(logits, center, self.teacher_temperature)


def _patches(features: Features) -> Tensor:
    """Of the two global crops, (2,B,N,D)."""
    return features.patches.flatten(2).transpose(1, 2).unflatten(0, (2, -1))
