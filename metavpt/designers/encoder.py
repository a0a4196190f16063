"""What a light designer sees of an image."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError


class ImageEncoder(nn.Module):
    """Normalised images (B, 3, H, W), any size -> features (B, width): strided convolutions on a thumbnail, averaged over its places.

    size: side of the thumbnail in pixels, halved `depth` times; the first convolution has width / 2^(depth - 1) channels.
    """

    def __init__(self, width: int = 32, depth: int = 3, size: int = 32) -> None:
        super().__init__()
        if depth < 1 or width % 2 ** (depth - 1) or size < 2**depth:
            raise MetaVPTError(
                f"ImageEncoder: {width=} must divide by 2^(depth - 1) and {size=} be at least 2^depth, {depth=}"
            )
        self.width, self.size = width, size
        widths = [3, *(width // 2 ** (depth - 1 - level) for level in range(depth))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1),
                nn.GroupNorm(math.gcd(4, after), after),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.places(images).mean(dim=(2, 3))

    def places(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> features of the places of the thumbnail, (B, width, s, s)."""
        return self.layers(F.adaptive_avg_pool2d(images, self.size))


def zero_linear(num_inputs: int, num_outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer that starts at 0, so that what it steers starts where it would be without."""
    layer = nn.Linear(num_inputs, num_outputs, bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
