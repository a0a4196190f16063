"""Masked autoencoding with feedback from dense labels: `problem=mae_nyuv2`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from metavpt.learners.predictor import Predictor
from metavpt.learners.vit import Backbone
from metavpt.objectives.mae import mae_loss, normalized_pixels

from .masked_dense import MaskedDense


class MAEDense(MaskedDense):
    """MAE: a decoder predicts the pixels of masked patches. The designer chooses visible ones."""

    def __init__(
        self, backbone: Backbone, decoder: Callable[[int, int], Predictor], **masked: Any
    ) -> None:
        super().__init__(
            backbone, predictor=decoder, target_width=3 * backbone.patch_size**2, **masked
        )

    @override
    def patch_targets(self, images: Tensor) -> Tensor:
        return normalized_pixels(images, self.backbone.patch_size)

    @override
    def loss(self, predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return mae_loss(predictions, targets, weights, "none")
