"""Weighted nearest neighbours on frozen features."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.probes.features import FeatureSet
from metavpt.probes.heads import HeadTask

CHUNK = 256  # queries at a time: all similarities at once may not fit


@dataclass(frozen=True)
class KNN:
    """The k nearest training images vote for their class with weight exp(cosine / temperature).

    The protocol of DINO (arXiv 2104.14294, section 4.1) after Wu et al. (arXiv 1805.01978, section
    3.4).

    Args:
        k: Number of neighbours, by cosine similarity.
        temperature: The temperature of the votes.

    Raises:
        MetaVPTError: An argument is out of range.
    """

    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise MetaVPTError(
                f"KNN: k={self.k} must be at least 1 and temperature={self.temperature} positive"
            )

    def fit(self, task: HeadTask, train: FeatureSet) -> "Neighbours":
        """Store the training images: features (N, D, 1, 1) and labels (N, 1, 1).

        Raises:
            MetaVPTError: There are fewer than k training images.
        """
        if len(train.features) < self.k:
            raise MetaVPTError(
                f"KNN: k={self.k} is more than the {len(train.features)} training images; lower it"
            )
        return Neighbours(
            self,
            F.normalize(train.features.flatten(1).float(), dim=1),
            train.target.flatten().long(),
            task.num_outputs,
        )


@dataclass(frozen=True)
class Neighbours:
    """A fitted k-NN classifier, from queries (M, D, 1, 1) to votes (M, C, 1, 1).

    Attributes:
        knn: k and temperature.
        features: (N, D), of unit length.
        label: (N,) int64.
        num_classes: C.
    """

    knn: KNN
    features: Tensor
    label: Tensor
    num_classes: int

    def __call__(self, queries: Tensor) -> Tensor:
        """Return the votes for each query."""
        votes = [
            self._votes(F.normalize(chunk.flatten(1).float(), dim=1))
            for chunk in queries.split(CHUNK)
        ]
        return torch.cat(votes)[:, :, None, None]

    def _votes(self, queries: Tensor) -> Tensor:
        cosine, index = (queries @ self.features.T).topk(self.knn.k, dim=1)
        # Subtracting 1 keeps the order and avoids an overflow at a small temperature.
        weight = ((cosine - 1) / self.knn.temperature).exp()
        return torch.zeros(len(queries), self.num_classes, device=queries.device).scatter_add_(
            1, self.label[index], weight
        )
