"""A small image encoder for designers."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from metavpt.errors import MetaVPTError


class ImageEncoder(nn.Module):
    """Normalised images (B, 3, H, W) of any size -> features (B, width).

    Strided convolutions on a thumbnail, averaged over positions.

    Args:
        width: Of the features. The first convolution has width / 2^(depth - 1) channels.
        depth: Times that the thumbnail is halved.
        size: Side of the thumbnail in pixels.
    """

    def __init__(self, width: int = 32, depth: int = 3, size: int = 32) -> None:
        super().__init__()
        if depth < 1 or width % 2 ** (depth - 1) or size < 2**depth:
            raise MetaVPTError(
                f"ImageEncoder: {width=} must divide by 2^(depth - 1) and {size=} be at least "
                f"2^depth, {depth=}"
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
        """Compute features (B, width) of images (B, 3, H, W)."""
        return self.places(images).mean(dim=(2, 3))

    def places(self, images: Tensor) -> Tensor:
        """Return features of all positions of the thumbnail: (B, 3, H, W) -> (B, width, s, s)."""
        return self.layers(F.adaptive_avg_pool2d(images, self.size))


def zero_linear(num_inputs: int, num_outputs: int, bias: bool = True) -> nn.Linear:
    """Make a linear layer that starts at 0."""
    layer = nn.Linear(num_inputs, num_outputs, bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
