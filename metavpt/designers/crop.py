"""The augmentation of masked pretraining: one random crop, the whole recipe of MAE (arXiv 2111.06377) and I-JEPA (arXiv 2301.08243)."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from metavpt.designers.views import Range, random_crop
from metavpt.errors import MetaVPTError


class RandomCrop(nn.Module):
    """Images and a seed -> (B, 3, size, size): random resized crop, flip, normalisation. A deterministic function of its arguments.

    mean, std: the backbone's normalisation. size in pixels. scale: shares of the image's area, 0.2 to 1 in MAE, 0.3 to 1
    in I-JEPA. flip: its probability.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int = 224, scale: Range = (0.2, 1.0), flip: float = 0.5) -> None:
        super().__init__()
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 <= flip <= 1:
            raise MetaVPTError(f"RandomCrop: needs size >= 1, 0 < scale <= 1 in order and flip in [0, 1], got {size=}, {scale=}, {flip=}")
        self.mean, self.std, self.size, self.scale, self.flip = tuple(mean), tuple(std), size, (scale[0], scale[1]), flip

    def forward(self, images: Tensor, seed: int) -> Tensor:
        """images (B, 3, H, W): uint8, or float in [0, 1]. Raises MetaVPTError for anything else."""
        if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise MetaVPTError(f"RandomCrop: images must be (B, 3, H, W), uint8 or float, got {tuple(images.shape)} {images.dtype}")
        images = images / 255 if images.dtype == torch.uint8 else images
        crops = random_crop(images, self.size, self.scale, self.flip, Generator().manual_seed(seed))
        mean, std = (crops.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (crops - mean) / std
