"""Image classification from frozen features: classifiers are fitted anew at every probe."""

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
from metavpt.probes.features import FeatureSet
from metavpt.probes.heads import HeadTask
from metavpt.probes.knn import KNN
from metavpt.probes.summaries import Describe, Pool, check_pool, stack, summarise
from metavpt.problem import Direction


class Classifier(Protocol):
    """A classifier: `KNN`, `Ridge` (on one-hot targets) or `LinearBN`.

    `Ridge` and `LinearBN` treat an image as a frame of one patch.
    """

    def fit(self, task: HeadTask, train: FeatureSet) -> Callable[[Tensor], Tensor]:
        """Fit on `train`.

        Returns:
            A function from features (M, D, 1, 1) to scores (M, C, 1, 1).
        """
        ...


@dataclass(frozen=True)
class ClassTask:
    """One output per class, for frames of one patch and one pixel.

    Args:
        num_classes: C.
        lr: The peak learning rate of a head trained by gradient steps.
    """

    num_classes: int
    lr: float = 1e-3

    @property
    def num_outputs(self) -> int:
        """Return C."""
        return self.num_classes

    def patch_targets(self, target: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return one-hot targets (B, C, 1, 1) and weights 1 (B, 1, 1, 1)."""
        onehot = F.one_hot(target.long(), self.num_classes).movedim(-1, 1).float()
        return onehot, torch.ones_like(onehot[:, :1])

    def activate(self, output: Tensor) -> Tensor:
        """Return the scores unchanged."""
        return output

    def probe_loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies, and count the images."""
        total = F.cross_entropy(prediction, target.long(), reduction="sum")
        return total, torch.tensor(target.numel())


class ClassificationProbe:
    """Top-1 accuracy on the validation images, for each classifier: `{"knn/accuracy": 0.31, ...}`.

    Args:
        path: Classified images, see `open_classified`.
        size: (H, W) of the crops. The backbone gets the nearest size that its patches divide.
        heads: Classifiers by name. Default: the weighted k-NN of DINO.
        num_train: Number of training images, drawn by `seed`. None: all. Each image costs one
            forward pass per probe.
        num_val: The same for validation images.
        pool: "mean" of the patches, or the "cls" token.
        batch_size: Images per forward pass.
        cache_bytes: The limit on decoded images kept in memory, in bytes, for each of the two sets.
        seed: The seed of the subsets.

    Raises:
        MetaVPTError: The folder cannot be read, or an argument is out of range.
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
        self.train = _Part(train, num_train, seed, cache_bytes)
        self.val = _Part(val, num_val, seed, cache_bytes)

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric."""
        return {f"{name}/accuracy": "higher" for name in self.heads}

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Fit every classifier and return its accuracy. `images` is not used."""
        train, val = (self._features(describe, part) for part in (self.train, self.val))
        metrics = {}
        for name, classifier in self.heads.items():
            head = classifier.fit(self.task, train)
            guess = torch.cat([head(chunk.features).argmax(1) for chunk in val.chunks(1024)])
            metrics[f"{name}/accuracy"] = float((guess == val.target).double().mean())
        return metrics

    def _features(self, describe: Describe, part: "_Part") -> FeatureSet:
        vectors = summarise(describe, stack(part.images, part.indices, self.batch_size), self.pool)
        label = part.labels.to(vectors.device)[:, None, None]
        return FeatureSet(vectors[:, :, None, None], label)


class _Part:
    """A subset of classified images, drawn by `seed`. Each image is decoded once."""

    def __init__(
        self, part: ClassifiedImages, count: int | None, seed: int, cache_bytes: int
    ) -> None:
        if count is not None and count < 1:
            raise MetaVPTError(f"num_train, num_val: {count} must be at least 1, or null for all")
        shuffled = torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(seed))
        order = shuffled[:count].sort().values
        self.images = CachedImages(part.images, cache_bytes)
        self.indices, self.labels = order.tolist(), part.labels[order]
