"""What frozen features are worth for recognition: classifiers fitted afresh at every probe on one vector an image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.cache import CachedImages
from metavpt.data.classified import ClassifiedImages, open_classified
from metavpt.errors import MetaVPTError
from metavpt.metrics import Direction
from metavpt.probes.features import FeatureSet
from metavpt.probes.heads import DenseTask
from metavpt.probes.knn import KNN
from metavpt.probes.summaries import Describe, Pool, check_pool, stack, summarise


class Classifier(Protocol):
    """A way to classify: `KNN`, `Ridge` (to one-hot targets), `LinearBN`.

    To the last two an image is a frame of one patch.
    """

    def fit(self, task: DenseTask, train: FeatureSet) -> Callable[[Tensor], Tensor]:
        """(M, D, 1, 1) -> scores (M, C, 1, 1)."""
        ...


@dataclass(frozen=True)
class ClassTask:
    """One output a class, of frames of one patch and one pixel."""

    num_classes: int
    lr: float = 1e-3

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def patch_targets(self, batch: FeatureSet) -> tuple[Tensor, Tensor]:
        onehot = F.one_hot(batch.label.long(), self.num_classes).movedim(-1, 1).float()
        return onehot, torch.ones_like(onehot[:, :1])

    def activate(self, output: Tensor) -> Tensor:
        return output

    def loss(self, prediction: Tensor, batch: FeatureSet) -> Tensor:
        return F.cross_entropy(prediction, batch.label.long())


class ClassificationProbe:
    """`{"knn/accuracy": 0.31, ...}`: the share of validation images that each classifier gets right.

    path                 classified images, see `open_classified`
    size                 (H, W) that images are cut to; the backbone sees the nearest size that its
    patches divide heads                name to classifier; the weighted k-NN of DINO unless told
    num_train, num_val   at most so many images, drawn by `seed`; None: all. Each costs one forward
    pass a probe pool                 "mean" of the patches, or the "cls" token cache_bytes
    how much of the images may stay decoded in memory
    """

    def __init__(
        self,
        path: str,
        size: Sequence[int] = (224, 224),
        heads: Mapping[str, Classifier] | None = None,
        num_train: int | None = None,
        num_val: int | None = None,
        pool: Pool = "mean",
        batch_size: int = 64,
        cache_bytes: int = 500_000_000,
        seed: int = 0,
    ) -> None:
        check_pool(pool)
        self.heads: dict[str, Classifier] = dict(heads) if heads else {"knn": KNN()}
        self.pool: Pool = pool
        self.batch_size = batch_size
        train, val, num_classes = open_classified(Path(path), (int(size[0]), int(size[1])))
        self.task = ClassTask(num_classes)
        self.train, self.val = (
            _Part(train, num_train, seed, cache_bytes),
            _Part(val, num_val, seed, cache_bytes),
        )

    @property
    def directions(self) -> dict[str, Direction]:
        return {f"{name}/accuracy": "higher" for name in self.heads}

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        train, val = (self._features(describe, part) for part in (self.train, self.val))
        metrics = {}
        for name, classifier in self.heads.items():
            head = classifier.fit(self.task, train)
            guess = torch.cat([head(chunk.features).argmax(1) for chunk in val.chunks(1024)])
            metrics[f"{name}/accuracy"] = float((guess == val.label).double().mean())
        return metrics

    def _features(self, describe: Describe, part: "_Part") -> FeatureSet:
        vectors = summarise(describe, stack(part.images, part.indices, self.batch_size), self.pool)
        label = part.labels.to(vectors.device)[:, None, None]
        return FeatureSet(
            vectors[:, :, None, None], torch.zeros(label.shape, device=label.device), label
        )


class _Part:
    """A subset of classified images, drawn by `seed`, decoded once."""

    def __init__(
        self, part: ClassifiedImages, count: int | None, seed: int, cache_bytes: int
    ) -> None:
        if count is not None and count < 1:
            raise MetaVPTError(f"num_train, num_val={count}: at least one image, or null for all")
        order = (
            torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(seed))[:count]
            .sort()
            .values
        )
        self.images, self.indices, self.labels = (
            CachedImages(part.images, cache_bytes),
            order.tolist(),
            part.labels[order],
        )
