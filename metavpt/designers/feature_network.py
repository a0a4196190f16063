"""A target designer for regression on features that also reads the teacher's middle layers.

It can express moves that a linear map of the features cannot. Letters: B batch, N patches, D width
of the features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from metavpt.designers.crop import RandomCrop, WholeFrames
from metavpt.designers.feature_targets import FeatureDesigner, FeatureTask
from metavpt.hypergradients.params import Params


class FeatureNetwork(FeatureDesigner):
    """Moves features by gate * network(states, features), which reads a patch and its neighbours.

    The states are those of the teacher's middle layer. If heads are fitted in closed form, the
    value is their residual, and a linear map of the features cannot predict a residual. Moves start
    at 0, so the targets are the teacher's features bit for bit.

    Args:
        recipe: Makes the images.
        patch_size: The patch size of the backbone, in pixels.
        width: D.
        hidden_width: The channels of the network.
        options: See `FeatureDesigner`.
    """

    def __init__(
        self,
        recipe: RandomCrop | WholeFrames,
        patch_size: int,
        width: int,
        hidden_width: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(recipe, patch_size, width, **options)
        self.network: nn.Module = PatchNetwork(width, hidden_width)

    def forward(self, batch: Any) -> FeatureTask:
        """Make the task, with the network's parameters in it."""
        phi: Params = dict(self.network.named_parameters())
        if not torch.is_grad_enabled():
            # The parameters themselves would require a gradient in the learner's loss, and the task
            # would follow later steps of phi.
            phi = {name: p.detach().clone() for name, p in phi.items()}
        return self.recipe_task(batch)._replace(phi=phi)

    @override
    def moves(self, task: FeatureTask, states: Tensor, features: Tensor) -> Tensor:
        return task.gate[:, None, None] * functional_call(
            self.network, task.phi, (states, features, self.grid)
        )

    def loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute -mean (<y, A> - |y|^2 / 2) of moves y and values A (B, N, D).

        It is least where y is the expected A. The values have mean square 1, so a gate of 1 is the
        tilt with tau 1 (`feature_targets.tilted`).
        """
        height, width = (int(side) for side in replay["grid"][0])
        y = self.network(replay["states"], replay["features"], (height, width))
        return -(y * replay["values"]).mean() + y.square().mean() / 2


class PatchNetwork(nn.Module):
    """A 1x1 convolution, a residual 3x3 one and a 1x1 one on a grid (h, w) of patches.

    It maps states and features (B, N, D) to (B, N, D).
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(2 * width, hidden_width, 1)
        self.mix = nn.Conv2d(hidden_width, hidden_width, 3, padding=1)
        self.write = nn.Conv2d(hidden_width, width, 1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, states: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute moves (B, N, D) of states and features (B, N, D)."""
        seen = torch.cat([F.layer_norm(states, states.shape[-1:]), features], dim=-1)
        x = F.gelu(self.read(seen.transpose(1, 2).unflatten(2, grid)))
        return self.write(x + F.gelu(self.mix(x))).flatten(2).transpose(1, 2)


class ResidualNetwork(FeatureNetwork):
    """Predicts the residual of the feedback's heads, one number per output, to move features by it.

    A_n = sum_c e_nc w_c: the value of a feature has the rank of the tasks. For heads that are
    fitted in closed form, the direction w_c of an output is known. How far a feature should move
    along it is the head's residual e_nc, which the network predicts for images without labels. The
    network starts at 0, which is the recipe.

    Args:
        recipe: Makes the images.
        patch_size: The patch size of the backbone, in pixels.
        width: D.
        num_outputs: C.
        hidden_width: The channels of the network.
        options: See `FeatureDesigner`.
    """

    directions: Tensor

    def __init__(
        self,
        recipe: RandomCrop | WholeFrames,
        patch_size: int,
        width: int,
        num_outputs: int,
        hidden_width: int = 128,
        **options: Any,
    ) -> None:
        FeatureDesigner.__init__(self, recipe, patch_size, width, num_outputs, **options)
        self.network = OutputNetwork(width, hidden_width, num_outputs)
        self.register_buffer("directions", torch.zeros(num_outputs, width))

    def forward(self, batch: Any) -> FeatureTask:
        """Make the task, with the network's parameters and the directions in it."""
        task = super().forward(batch)
        return task._replace(phi={**task.phi, "directions": self.directions.clone()})

    def moves(self, task: FeatureTask, states: Tensor, features: Tensor) -> Tensor:
        """Predict the moves A (B, N, D), see `FeatureDesigner.moves`."""
        phi = dict(task.phi)
        directions = phi.pop("directions")
        residuals = functional_call(self.network, phi, (states, features, self.grid))
        return task.gate[:, None, None] * (residuals @ directions.to(residuals))

    def loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute the mean squared error of the predicted residuals over labelled pixels."""
        return residual_loss(self.network, replay)


def residual_loss(network: nn.Module, replay: dict[str, Tensor]) -> Tensor:
    """Compute the mean squared error of predicted residuals over labelled pixels, a scalar."""
    height, width = (int(side) for side in replay["grid"][0])
    residuals = network(replay["states"], replay["features"], (height, width))
    squares = replay["share"] * (residuals - replay["values"]).square()
    return squares.sum() / replay["share"].sum().clamp_min(1)


class OutputNetwork(nn.Module):
    """states and features (B, N, D) of patches on a grid (h, w) -> outputs (B, N, C).

    A patch reads itself, its neighbours, the mean of the image and its position.
    """

    POSITIONS = (8, 8)  # of the learned bias, which is resampled to the grid

    def __init__(self, width: int, hidden_width: int, num_outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.read = nn.Linear(2 * width, hidden_width)
        self.near = nn.Conv2d(hidden_width, hidden_width, 3, padding=1)
        self.whole = nn.Linear(hidden_width, hidden_width)
        self.write = nn.Linear(hidden_width, num_outputs)
        self.position = nn.Parameter(torch.zeros(1, num_outputs, *self.POSITIONS))
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, states: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute outputs (B, N, C) of states and features (B, N, D)."""
        seen = torch.cat([F.layer_norm(states, states.shape[-1:]), features], dim=-1)
        x = F.gelu(self.read(self.norm(seen)))
        near = self.near(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        x = x + F.gelu(near)
        x = x + F.gelu(self.whole(x.mean(dim=1, keepdim=True)))
        bias = F.interpolate(self.position, grid, mode="bilinear", align_corners=False)
        return self.write(x) + bias.flatten(2).transpose(1, 2)
