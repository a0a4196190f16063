"""A dense task of one's own: surface normals, computed from depth maps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from metavpt.dense_tasks.task import DenseTask


@dataclass(frozen=True)
class Normals(DenseTask):
    """Unit normals (B, 3, H, W) in the camera's frame: x right, y down, z away from it.

    Args:
        focal: The focal length in widths of the image; 0.85 is a Kinect's.
    """

    name = "normals"
    prefix = "normals"
    focal: float = 0.85

    @property
    def num_outputs(self):
        return 3

    def target(self, batch):
        depth = batch.depth  # (B, H, W), or (H, W) of one frame
        height, width = depth.shape[-2:]
        x = (torch.arange(width).to(depth) + 0.5 - width / 2) / (self.focal * width)
        y = (torch.arange(height).to(depth) + 0.5 - height / 2) / (self.focal * width)
        y, x = torch.meshgrid(y, x, indexing="ij")
        points = depth.unsqueeze(-3) * torch.stack([x, y, torch.ones_like(x)])
        down, right = torch.gradient(points, dim=(-2, -1))
        normals = F.normalize(torch.linalg.cross(down, right, dim=-3), dim=-3)
        unknown = (depth <= 0).float().unsqueeze(-3)
        unknown = F.max_pool2d(unknown, kernel_size=3, stride=1, padding=1)  # or a neighbour
        return normals * (1 - unknown)

    def encode(self, target):
        return target, target.norm(dim=1) > 0.5

    def predict(self, output):
        return F.normalize(output, dim=1)

    def metrics(self):
        return Angles()


class Angles:
    """The angle between predicted and true normals, in degrees, over the pixels of a set."""

    directions = {"mean_angle": "lower", "within_11": "higher"}

    def __init__(self):
        self.total = self.close = 0.0
        self.count = 0

    def update(self, prediction, target):
        known = target.norm(dim=1) > 0.5
        cosine = (prediction * target).sum(dim=1)[known].double()
        angles = cosine.clamp(-1, 1).acos().rad2deg()
        self.total += float(angles.sum())
        self.close += float((angles < 11.25).sum())
        self.count += len(angles)

    def compute(self):
        return {"mean_angle": self.total / self.count, "within_11": self.close / self.count}
