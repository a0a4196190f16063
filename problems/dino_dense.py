"""DINO pretraining with feedback from dense labels: `problem=dino_nyuv2`, `problem=dino_masks`."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from typing_extensions import override

from metavpt.data.loader import Batch
from metavpt.designers.designer import Designer
from metavpt.designers.mixer import mix_terms
from metavpt.designers.prototypes import reshape, reshape_patches, tilted
from metavpt.designers.selection import weigh
from metavpt.designers.view_policy import ViewPolicy
from metavpt.designers.views import MultiCrop, Views, pick_views
from metavpt.errors import MetaVPTError, check_known
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import ComposedLoss
from metavpt.hypergradients.linear_targets import DirectionalDerivative
from metavpt.hypergradients.params import Params
from metavpt.learners.annealing import cosine
from metavpt.learners.projection import Learner, ProjectionHead
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import Backbone, Features, Hidden
from metavpt.objectives.dino import center_update, centered_probs, sinkhorn_probs
from metavpt.objectives.distillation import active_terms, hidden_of, pack, term_losses, unpack
from metavpt.objectives.goal_loss import GoalLoss, goal_loss
from metavpt.objectives.ijepa import normalized_features
from metavpt.profiling import phase
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


class Answers(NamedTuple):
    """What the teacher makes of the global crops.

    Attributes:
        logits: By term, dino (2, B, K) and ibot (M, K).
        fixed: What the student is to answer and no designer changes, by term.
        states: Trunk states of patches, (2, B, N, D).
    """

    logits: dict[str, Tensor]
    fixed: dict[str, Tensor]
    states: Tensor


class DinoDense(
    DenseProblem,
    SharedTrunk,
    SupportsCandidates,
    SupportsSelection,
    SupportsTilting,
    Splittable,
):
    """DINO: student and EMA teacher agree on the prototypes of an image across crops.

    The designer decides the content of the crops, the weight of each image, the teacher's answers,
    or the weight of each term.

    Args:
        backbone: The ViT.
        recipe: Makes the crops.
        designer: Makes the task.
        pool: The image feature: "cls" or "mean".
        num_prototypes: K.
        head_hidden: The width of the head.
        head_bottleneck: The width of its bottleneck.
        terms: Weights of the loss terms, see `objectives.distillation`. A term of weight 0 costs
            nothing. dino is the loss above; ibot, koleo and gram make it the loss of DINOv2 and
            DINOv3. If ibot has a weight, patches of the student's global crops are masked.
        patch_head: The head of ibot's patches: "shared" with the image's (iBOT), or "own" (DINOv2,
            DINOv3).
        gram_anchor: The patches that gram compares with: the "teacher"'s, or those of the initial
            backbone, "frozen".
        targets: "sinkhorn" (DINOv2, DINOv3; stateless) or "centering" (DINO).
        student_temperature: The temperature of the student's softmax.
        teacher_temperature: The temperature of the teacher's.
        teacher_momentum: The momentum of the EMA at the start.
        hidden_at: Where patches are masked for the student: "input", by a learned mask token;
            "tail", by the states of a blank image.
        teacher_credit: Whether the designer's gradient also passes through the teacher's view of
            the crops. The learner's never does.
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
        hidden_at: Literal["input", "tail"] = "input",
        **dense: Any,
    ) -> None:
        check_known(hidden_at, "problem.hidden_at", "input", "tail")
        check_known(targets, "problem.targets", "sinkhorn", "centering")
        check_known(patch_head, "problem.patch_head", "shared", "own")
        check_known(gram_anchor, "problem.gram_anchor", "teacher", "frozen")
        self.terms, self.num_prototypes = active_terms(terms), num_prototypes
        own = "ibot" in self.terms and patch_head == "own"
        self.hides, self.hidden_at = bool({"ibot", "features"} & set(self.terms)), hidden_at
        sizes = (backbone.width, num_prototypes, head_hidden, head_bottleneck)
        self.learner = Learner(
            backbone,
            ProjectionHead(*sizes),
            pool,
            self.hides and hidden_at == "input",
            ProjectionHead(*sizes) if own else None,
        )
        self.patch_head = "patch_head" if own else "head"
        self.teacher = Teacher(self.learner)
        self.anchor = (
            Teacher(backbone) if "gram" in self.terms and gram_anchor == "frozen" else None
        )
        hiding = {"patch_size": backbone.patch_size} if self.hides else {}
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
        names = ["center"] + ["patch_center"] * ("ibot" in self.terms)
        zeros = {
            name: torch.nn.Parameter(torch.zeros(num_prototypes), requires_grad=False)
            for name in names
        }
        self.center = torch.nn.ParameterDict(zeros)
        super().__init__(backbone, **dense)
        if isinstance(self.designer, ViewPolicy):
            if "features" not in self.terms:
                raise MetaVPTError("designer=view_policy needs problem.terms.features above 0")
            self.designer.build(backbone.width, backbone.patch_size, self.num_outputs)

    @override
    def recipe(self, batch: Any) -> Views:
        return self.designer.recipe_task(batch)

    @override
    def regularizer(self, task: Views) -> Tensor | None:
        return self.designer.regularizer(task)

    @property
    def hardest_task(self) -> Callable[[Any], Views]:
        """The designer's, see `SupportsHardest`. An AttributeError where it makes none."""
        return cast(Any, self.designer).hardest_task

    @override
    def pretrain_loss(self, theta: Params, task: Views) -> Tensor:
        step = self._distillation(theta, task)
        packed = step.outputs({})
        weights = step.weights(packed.detach()) if step.weights else None
        return step.per_image(packed, step.goals, weights).mean()

    def pretrain_tail(self, theta: Params, task: Views) -> ComposedLoss:
        """A `GoalLoss` where a designer may change what the teacher answers, and nothing else.

        The weights of a policy are those of the student at theta. They are held, as in the step.
        """
        step = self._distillation(theta, task)
        weights = step.weights_now()
        others = (part for name, part in task._asdict().items() if name not in ANSWERS)
        if (
            weights is not None
            or not len(step.goals)
            or any(isinstance(part, Tensor) and part.requires_grad for part in others)
        ):
            return step.loss(weights, "mean")
        return goal_loss(
            step.outputs,
            lambda packed, goals: step.per_image(packed, goals, None).mean(),
            step.goals,
        )

    @override
    def per_sample_tail(self, theta: Params, task: Views) -> ComposedLoss:
        step = self._distillation(theta, task)
        return step.loss(step.weights_now(), "none")

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
        """Tilt the teacher's probabilities by first-order value, see `prototypes.tilted`."""
        loss = self.pretrain_tail(theta, task)
        if not isinstance(loss, GoalLoss):
            raise MetaVPTError(
                f"strategy=tilt: no term of problem.terms={self.terms} has a target to tilt; "
                "give dino or ibot a weight"
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

    @override
    def candidates(self, batch: Any, num_candidates: int) -> list[Views]:
        return self.designer.random_tasks(batch, num_candidates)

    def pick(self, tasks: Sequence[Views], which: Tensor, sample: Tensor) -> Views:
        """Make one task of samples of several: sample `sample[i]` of task `which[i]`."""
        return pick_views(tasks, which, sample)

    def microbatches(self, task: Views, num_parts: int) -> list[Views]:
        """Split a task by images."""
        samples = torch.arange(task.global_crops.shape[1], device=task.global_crops.device).chunk(
            num_parts
        )
        return [pick_views([task], torch.zeros_like(own), own) for own in samples]

    @override
    def after_step(self, task: Views, progress: float) -> None:
        if self.targets == "centering":
            for term, logits in self._answers(task).logits.items():
                if len(logits):  # no patch may be hidden
                    center = self.center[CENTERS[term]]
                    center.data = center_update(center, logits)
        self.teacher.update(self.learner, cosine(self.teacher_momentum, 1.0, progress))

    @override
    @torch.no_grad()
    def health_metrics(self) -> dict[str, HealthMetric]:
        task = self.designer(Batch(self._watched(), seed=0))
        signs = {**super().health_metrics(), **mask_signs([task.masks, task.local_masks])}
        if "dino" in self.terms:
            logits = self._answers(task).logits["dino"].flatten(0, 1)
            signs |= outcome_signs(
                centered_probs(logits, self.center["center"], self.teacher_temperature)
            )
        return signs

    @override
    @torch.no_grad()
    def figures(self) -> dict[str, np.ndarray]:
        batch = next(iter(self.meta_batches(seed=0)))
        task = self.designer(batch)
        if isinstance(self.designer, ViewPolicy):
            theta = params.detach(params.named(self.learner))
            weights = self._distillation(theta, task).weights_now()
            made = self.designer.figures(batch, task, weights)
        else:
            made = self.designer.figures(batch, task)
        return {**made, **super().figures()}

    def _distillation(self, theta: Params, task: Views) -> "_Step":
        """What a step on `task` needs. Trunk and teacher run once."""
        seen: Hidden | None = None
        if self.hides and self.hidden_at == "tail":
            trunk = params.subset(theta, "backbone.trunk.")
            crops = task.global_crops.flatten(0, 1)
            seen = cast(Hidden, functional_call(self.backbone.trunk, trunk, (crops,)))
        student = self._student(theta, task, seen)
        goals, fixed, states = self._goals(task, seen if self.frozen_trunk else None)
        shapes, goal_shapes = self._shapes(task), self._goal_shapes(task)

        def per_image(outputs: Tensor, goals: Tensor, weights: Tensor | None) -> Tensor:
            losses = term_losses(
                unpack(outputs, shapes),
                {**unpack(goals, goal_shapes), **fixed},
                task.hidden,
                self.student_temperature,
                weights,
            )
            return weigh(mix_terms(losses, self.terms.values(), task.mix), task.weights)

        def weights(policy: ViewPolicy, outputs: Tensor) -> Tensor | None:
            told, targets = unpack(outputs, shapes)["features"], fixed["features"]
            return policy.weights(task, targets - told, states, targets)

        return _Step(
            lambda theta_s: pack(student(theta_s)),
            per_image,
            pack(goals) if goals else task.global_crops.new_empty(0),
            partial(weights, self.designer) if isinstance(self.designer, ViewPolicy) else None,
        )

    def _student(
        self, theta: Params, task: Views, seen: Hidden | None = None
    ) -> Callable[[Params], dict[str, Tensor]]:
        """theta_S -> for each term what the student makes of the views.

        Args:
            theta: Of the learner.
            task: The views.
            seen: Trunk states of the global crops, where patches are hidden from the tail.
        """
        backbone, summary, batch_size = (
            self.backbone,
            self.learner.summary,
            task.global_crops.shape[1],
        )
        trunk = params.subset(theta, "backbone.trunk.")
        crops = task.global_crops.flatten(0, 1)
        if seen is not None:
            hidden = hidden_of(task.hidden).flatten(0, 1)
            states = [self.hidden_states(theta, crops, seen, hidden)]
        else:
            hiding = (
                {"hidden": hidden_of(task.hidden).flatten(0, 1), "mask_token": theta["mask_token"]}
                if self.hides
                else {}
            )
            states = [functional_call(backbone.trunk, trunk, (crops,), hiding)]
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
                "features": lambda: normalized_features(features[0].patches).unflatten(0, (2, -1)),
            }
            return {term: made[term]() for term in self.terms}

        return outputs

    def _shapes(self, task: Views) -> dict[str, tuple[int, ...]]:
        """Of what the student makes, by term."""
        (num_globals, batch_size), size = task.global_crops.shape[:2], task.global_crops.shape[-2:]
        num_patches, width = size.numel() // self.backbone.patch_size**2, self.backbone.width
        num_hidden = int(hidden_of(task.hidden).sum()) if "ibot" in self.terms else 0
        shapes = {
            "dino": (num_globals + len(task.local_crops), batch_size, self.num_prototypes),
            "ibot": (num_hidden, self.num_prototypes),
            "koleo": (num_globals, batch_size, width),
            "gram": (num_globals, batch_size, num_patches, width),
            "features": (num_globals, batch_size, num_patches, width),
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

    def _goals(
        self, task: Views, seen: Hidden | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The teacher's part of a step.

        Args:
            task: The views.
            seen: Trunk states of the global crops, where the student's trunk is the teacher's.

        Returns:
            What the student is to answer, by term, as the designer wants it; what no designer
            changes, by term; the trunk states of patches, (2, B, N, D).
        """
        with (
            phase("teacher"),
            torch.set_grad_enabled(self.teacher_credit and torch.is_grad_enabled()),
        ):
            answers = self._answers(task, seen)
            probs = {
                term: self._probs(logits, self.center[CENTERS[term]])
                for term, logits in answers.logits.items()
            }
        reshaped = {"dino": reshape, "ibot": reshape_patches}
        goals = {term: reshaped[term](goal, task) for term, goal in probs.items()}
        return goals, answers.fixed, answers.states

    def _answers(self, task: Views, seen: Hidden | None = None) -> Answers:
        """Ask the teacher about the global crops of `task`, see `_goals`."""
        crops = task.global_crops.flatten(0, 1)

        def answers() -> Answers:
            hidden = self.reference.trunk(crops) if seen is None else seen
            features = self.reference.tail(hidden)
            fixed = {}
            if "gram" in self.terms:
                fixed["gram"] = _patches(self.anchor(crops) if self.anchor else features)
            if "features" in self.terms:
                fixed["features"] = normalized_features(features.patches).unflatten(0, (2, -1))
            states = hidden.tokens[:, -math.prod(hidden.grid) :].unflatten(0, (2, -1))
            return Answers(self._teacher_logits(features, task), fixed, states)

        inputs = [task.global_crops] if task.hidden is None else [task.global_crops, task.hidden]
        return self.teacher.once(inputs, answers)

    def _teacher_logits(self, features: Features, task: Views) -> dict[str, Tensor]:
        """Compute the teacher's logits by term, see `Answers`."""
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


class _Step(NamedTuple):
    """A step of the student.

    Attributes:
        outputs: theta_S -> the student's outputs, packed.
        per_image: (outputs, goals, weights) -> the loss of each image, (B,).
        goals: What the student is to answer, packed.
        weights: Outputs -> weights of the term `features`, None where all are 1; None where there
            is no policy.
    """

    outputs: Callable[[Params], Tensor]
    per_image: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    goals: Tensor
    weights: Callable[[Tensor], Tensor | None] | None

    def weights_now(self) -> Tensor | None:
        """The weights at theta; the student runs where there is a policy."""
        if self.weights is None:
            return None
        with torch.no_grad():
            outputs = self.outputs({})
        return self.weights(outputs)

    def loss(self, weights: Tensor | None, reduction: Literal["mean", "none"]) -> ComposedLoss:
        """theta_S -> the loss with these weights, its mean or that of each image."""

        def criterion(packed: Tensor) -> Tensor:
            losses = self.per_image(packed, self.goals, weights)
            return losses.mean() if reduction == "mean" else losses

        def at(theta_s: Params) -> ComposedLoss:
            return self.loss(self.weights and self.weights(self.outputs(theta_s)), reduction)

        return ComposedLoss(self.outputs, criterion, at=None if weights is None else at)


def _patches(features: Features) -> Tensor:
    """Of the two global crops, (2,B,N,D)."""
    return features.patches.flatten(2).transpose(1, 2).unflatten(0, (2, -1))
