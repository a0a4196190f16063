"""A two-block ViT in float64 under DINO, MAE-like and cross-entropy losses, to test estimators."""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from metavpt.hypergradients import params
from metavpt.hypergradients.optimizer_updates import Update
from metavpt.learners.vit import create_backbone
from metavpt.objectives.dino import dino_loss

B, SIDE, WIDTH = 3, 16, 16


class TwoBlockViT:
    """The designer scales and shifts the pixels, so every loss sees phi. S is the last block."""

    def __init__(self, objective: str) -> None:
        torch.manual_seed(0)
        backbone = create_backbone(
            "vit_tiny_dinov3",
            1,
            depth=2,
            embed_dim=WIDTH,
            num_heads=2,
            patch_size=8,
            img_size=SIDE,
            init_values=1.0,
        )
        self.backbone = backbone.double()
        g = torch.Generator().manual_seed(1)
        self.images, self.other = (
            torch.randn(B, 3, SIDE, SIDE, generator=g, dtype=torch.float64) for _ in range(2)
        )
        self.head = 0.2 * torch.randn(WIDTH, 7, generator=g, dtype=torch.float64)
        self.decoder = torch.randn(WIDTH, 192, generator=g, dtype=torch.float64)
        self.goal = torch.randn(B, WIDTH, generator=g, dtype=torch.float64)
        self.labels = torch.tensor([0, 3, 6])
        self.theta = params.clone(params.subset(params.named(self.backbone), "tail."))
        self.phi = {
            "scale": torch.rand(3, 1, 1, generator=g, dtype=torch.float64) + 0.5,
            "shift": torch.zeros(3, SIDE, SIDE, dtype=torch.float64),
        }
        self.loss = getattr(self, objective)

    def tail(self, theta, hidden):
        return functional_call(self.backbone.tail, theta, (hidden,))

    def view(self, phi, images):
        return phi["scale"] * images + phi["shift"]

    def dino(self, phi):
        hidden = [
            self.backbone.trunk(self.view(phi, x)) for x in (self.images, self.images.flip(-1))
        ]
        targets = (
            (self.backbone(self.other).cls @ self.head / 0.5).softmax(-1).detach().expand(2, -1, -1)
        )
        return lambda theta: dino_loss(
            [self.tail(theta, h).cls @ self.head for h in hidden], targets, temperature=0.5
        )

    def mae(self, phi):
        """Reconstruct the pixels of patches from an image whose other half is blank."""
        blank = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
        blank[..., SIDE // 2 :] = 0
        hidden = self.backbone.trunk(self.view(phi, self.images) * blank)
        pixels = F.unfold(self.images, 8, stride=8).transpose(1, 2)
        return lambda theta: (
            (
                self.tail(theta, hidden).patches.flatten(2).transpose(1, 2) @ self.decoder / 8
                - pixels
            )
            .square()
            .mean()
        )

    def cross_entropy(self, phi):
        hidden = self.backbone.trunk(self.view(phi, self.images))
        return lambda theta: F.cross_entropy(self.tail(theta, hidden).cls @ self.head, self.labels)

    def outer(self, theta):
        return (self.tail(theta, self.backbone.trunk(self.other)).cls - self.goal).square().mean()


def relative(a, b) -> float:
    return float(params.norm(params.add(a, b, alpha=-1.0)) / params.norm(b))


def warm(toy, rule) -> Update:
    """`rule` after a step on some gradient.

    Adam's very first step is the gradient's sign, which finite differences cannot see through.
    """
    g = torch.Generator().manual_seed(5)
    gradient = params.zip_with(
        lambda p: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype), toy.theta
    )
    return Update(rule, toy.theta, rule.step(toy.theta, rule.init(toy.theta), gradient)[1])
