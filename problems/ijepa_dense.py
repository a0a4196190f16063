"""I-JEPA with feedback from dense labels: `problem=ijepa_dense`."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from metavpt.designers.patches import MaskedImages
from metavpt.learners.predictor import Predictor
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import Backbone
from metavpt.objectives.ijepa import ijepa_loss, normalized_features
from metavpt.profiling import phase

from .masked_dense import MaskedDense


class IJEPADense(MaskedDense):
    """I-JEPA: a predictor regresses on an EMA teacher's features of blocks, given a context.

    The designer chooses the blocks.

    Args:
        distance: "smooth_l1" as in the released code, or "l2" as in the paper.
        teacher_momentum: The momentum at the start. It rises linearly to 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        predictor: Callable[[int, int], Predictor],
        distance: Literal["l2", "smooth_l1"] = "smooth_l1",
        teacher_momentum: float = 0.996,
        **masked: Any,
    ) -> None:
        super().__init__(backbone, predictor=predictor, target_width=backbone.width, **masked)
        self.teacher = Teacher(backbone)
        self.distance: Literal["l2", "smooth_l1"] = distance
        self.teacher_momentum = teacher_momentum

    @override
    @phase("teacher")
    def patch_targets(self, images: Tensor) -> Tensor:
        return self.teacher.once(
            [images], lambda: normalized_features(self.teacher(images).patches)
        )

    @override
    def loss(self, predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return ijepa_loss(predictions, targets, weights, self.distance, "none")

    @override
    def after_step(self, task: MaskedImages, progress: float) -> None:
        self.teacher.update(
            self.backbone, self.teacher_momentum + (1.0 - self.teacher_momentum) * progress
        )
