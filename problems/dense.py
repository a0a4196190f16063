"""What every dense vision problem shares: the unlabelled stream, feedback from labelled frames, probes, pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from metavpt import params, pictures
from metavpt.data.dense import DenseData
from metavpt.data.loader import FrameLoader, ImageLoader
from metavpt.feedback import DenseFeedback
from metavpt.learners.vit import Backbone
from metavpt.params import Params
from metavpt.probes.dense import DenseProbe
from metavpt.probes.heads import Fit
from metavpt.problem import Problem
from metavpt.stream import Stream

NUM_PICTURES = 4


class DenseProblem(Problem):
    """A ViT (`learner.backbone`) pretrained for depth and segmentation; a subclass adds the learner's head, the designer and the loss.

    feature_size      (H, W) that labelled frames are resized to before the backbone; labels keep their own size. None: no resizing
    meta_batch_size   unlabelled images of a designer update
    head_steps        fitting steps of the feedback heads before each designer update, `first_head_steps` before the first one
    probe_heads       heads by name that the probes fit; None: ridge alone
    """

    def __init__(
        self,
        backbone: Backbone,
        data: DenseData,
        feedback: Callable[..., DenseFeedback],
        batch_size: int = 32,
        meta_batch_size: int = 16,
        feedback_batch_size: int = 16,
        head_steps: int = 4,
        first_head_steps: int = 100,
        feature_size: Sequence[int] | None = None,
        probe_heads: Mapping[str, Fit] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.data, self.num_workers = data, num_workers
        self.batch_size, self.meta_batch_size, self.feedback_batch_size = batch_size, meta_batch_size, feedback_batch_size
        self.head_steps, self.first_head_steps = head_steps, first_head_steps
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
        self.feature_size = (int(feature_size[0]), int(feature_size[1])) if feature_size else data.frames.size
        with torch.no_grad():
            backbone(torch.zeros(1, 3, *self.feature_size))  # a size that the patch does not divide fails here, before any training
        num_classes = data.frames.num_classes
        self.feedback = feedback(backbone.width, num_classes)
        self.feedback_weights = self.feedback.weights
        self.head_batches = Stream(lambda s: self._labelled(data.heads, s), seed, "feedback heads")
        self.probe = DenseProbe(lambda: self._in_order(data.train), lambda: self._in_order(data.val), num_classes, probe_heads)

    @property
    def backbone(self) -> Backbone:
        return cast(Backbone, self.learner.backbone)

    @property
    def device(self) -> torch.device:
        return next(self.learner.parameters()).device

    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        return ImageLoader(self.data.unlabelled, self.batch_size, seed, self.num_workers, self.device)

    def meta_batches(self, seed: int) -> Iterable[Any]:
        return ImageLoader(self.data.unlabelled, self.meta_batch_size, seed, self.num_workers, self.device)

    def feedback_batches(self, seed: int) -> Iterable[Any]:
        return self._labelled(self.data.meta, seed)

    def held_out_batches(self, seed: int) -> Iterable[Any]:
        return self._labelled(self.data.held_out, seed)

    def aligned_parameters(self) -> list[str]:
        """The last blocks and the final norm: what depth and segmentation share with pretraining and lies nearest to both."""
        return [name for name in params.named(self.learner) if name.startswith("backbone.tail.")]

    def warm_up_parameters(self) -> list[str]:
        return [name for name in params.named(self.learner) if not name.startswith("backbone.")]

    def feedback_losses(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        return self.feedback(self.patch_features(theta, batch.image), batch)

    def heads(self) -> list[str]:
        return ["feedback", "head_batches"]

    def is_steered(self, metric: str) -> bool:
        prefixes = {"depth": "depth_", "segmentation": "seg_"}
        return any(weight and f"/{prefixes[name]}" in metric for name, weight in self.feedback_weights.items())

    def fit_heads(self) -> None:
        num_steps = self.head_steps if self.head_batches.has_begun else self.first_head_steps
        theta = params.detach(params.named(self.learner))
        for _ in range(num_steps):
            batch = next(self.head_batches)
            with torch.no_grad():
                features = self.patch_features(theta, batch.image)
            self.feedback.fit(features, batch)

    def evaluate(self) -> dict[str, float]:
        return self.probe(self._frozen_features)

    def patch_features(self, theta: Params, images: Tensor) -> Tensor:
        """Features (B,D,h,w) of images uint8 (B,3,H,W) under the learner's parameters `theta`."""
        return functional_call(self.backbone, params.subset(theta, "backbone."), (self.normalize(images),)).patches

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> what the backbone reads, at `feature_size`."""
        images = images.to(next(self.learner.parameters())) / 255
        if images.shape[-2:] != self.feature_size:
            images = F.interpolate(images, self.feature_size, mode="bilinear", antialias=True, align_corners=False)
        return (images - self.mean.to(images)) / self.std.to(images)

    def figures(self) -> dict[str, np.ndarray]:
        """Depth and classes of a few validation frames, predicted beside true, by the probe's last head."""
        frames = [self.data.frames[i] for i in self.data.val[:: max(1, len(self.data.val) // NUM_PICTURES)][:NUM_PICTURES]]
        depths, labels = self.probe.predict(self._frozen_features, torch.stack([frame.image for frame in frames]))
        if depths is None or labels is None:
            return {}
        rows = []
        for frame, depth, label in zip(frames, depths, labels, strict=True):
            low, high = float(frame.depth[frame.depth > 0].min()), float(frame.depth.max())
            maps = [pictures.colour(metres, low, high) for metres in (frame.depth, depth)]
            maps += [pictures.classes(classes, self.data.frames.num_classes) for classes in (frame.label, label)]
            rows.append([pictures.photo(frame.image), *maps])
        return {"predictions": pictures.grid(rows)}

    @torch.no_grad()
    def _frozen_features(self, images: Tensor) -> Tensor:
        return self.patch_features(params.named(self.learner), images)

    def _labelled(self, indices: list[int], seed: int) -> FrameLoader:
        return FrameLoader(self.data.frames, indices, self.feedback_batch_size, seed, self.num_workers, self.device)

    def _in_order(self, indices: list[int]) -> Iterable[Any]:
        return FrameLoader.in_order(self.data.frames, indices, self.feedback_batch_size, self.device)
