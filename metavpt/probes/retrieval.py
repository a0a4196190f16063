"""Instance retrieval on Revisited Oxford and Paris: images of the same landmark come first."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.lazy import Lazy
from metavpt.data.photo import decode
from metavpt.data.revisited import Query, open_revisited
from metavpt.errors import MetaVPTError
from metavpt.probes.summaries import Describe, summarise
from metavpt.problem import Direction

# level -> kinds that count as right, kinds that are left out (arXiv 1803.11285, section 3.3)
LEVELS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def average_precision(ranking: np.ndarray, right: np.ndarray, junk: np.ndarray) -> float:
    """Compute the area under the precision-recall curve by trapezoids, as the official code does.

    Args:
        ranking: All rows, nearest first.
        right: The right rows, at least one. A right row that `ranking` lacks counts as not found.
        junk: Rows that are removed from `ranking` first.
    """
    kept = ranking[~np.isin(ranking, junk)]
    rank = np.flatnonzero(np.isin(kept, right))
    found = np.arange(len(rank))
    before = np.where(rank == 0, 1.0, found / np.maximum(rank, 1))
    after = (found + 1) / (rank + 1)
    return float((before + after).sum() / 2 / len(right))


def mean_average_precision(
    rankings: Sequence[np.ndarray], queries: Sequence[Query]
) -> dict[str, float]:
    """Compute `map_easy`, `map_medium` and `map_hard`, in [0, 1].

    Each is the mean over the queries that have a right image at that level. A level without such
    queries has no entry.
    """
    metrics = {}
    for level, (kinds, left_out) in LEVELS.items():
        values = []
        for ranking, query in zip(rankings, queries, strict=True):
            right, junk = (
                np.concatenate([getattr(query, kind) for kind in group])
                for group in (kinds, left_out)
            )
            if len(right):
                values.append(average_precision(ranking, right, junk))
        if values:
            metrics[f"map_{level}"] = float(np.mean(values))
    return metrics


class RetrievalProbe:
    """Retrieval by the cosine of mean patches: `{"roxford5k/map_easy": 0.53}`. Nothing is trained.

    Args:
        path: A folder in the official layout, see `open_revisited`.
        size: The longer side of an image, in pixels. The aspect ratio is kept, up to the nearest
            size that the patches divide.

    Raises:
        MetaVPTError: `size` is not positive, or the folder cannot be read.
    """

    def __init__(self, path: str, size: int = 224) -> None:
        if size < 1:
            raise MetaVPTError(f"RetrievalProbe: size={size} must be positive")
        self.truth, self.size = open_revisited(Path(path)), size

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric."""
        return {f"{self.truth.name}/map_{level}": "higher" for level in LEVELS}

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Return the mean average precision of each level. `images` is not used."""
        listed = F.normalize(summarise(describe, self._listed()), dim=1)
        queries = F.normalize(summarise(describe, self._queries()), dim=1)
        rankings = list(
            (queries @ listed.T).argsort(dim=1, descending=True, stable=True).cpu().numpy()
        )
        return {
            f"{self.truth.name}/{name}": value
            for name, value in mean_average_precision(rankings, self.truth.queries).items()
        }

    def _listed(self) -> Iterable[Tensor]:
        return Lazy(lambda name: self._scaled(self._read(name)), self.truth.images)

    def _queries(self) -> Iterable[Tensor]:
        return Lazy(lambda query: self._scaled(self._landmark(query)), self.truth.queries)

    def _landmark(self, query: Query) -> Tensor:
        """Read the query image and crop it to the box of the landmark."""
        image = self._read(query.name)
        if query.box is not None:
            x1, y1, x2, y2 = (max(0, round(value)) for value in query.box)
            image = image[:, y1:y2, x1:x2]
            if not image.numel():
                raise MetaVPTError(
                    f"{self.truth.folder}: query {query.name} has the empty box {query.box}"
                )
        return image

    def _read(self, name: str) -> Tensor:
        file = self.truth.folder / f"{name}.jpg"
        if not file.is_file():
            raise MetaVPTError(f"{file}: is in the ground truth but not there; get all images")
        # as the official code reads them: the boxes count pixels as stored
        return decode(file.read_bytes(), str(file), upright=False)

    def _scaled(self, image: Tensor) -> Tensor:
        """Resize to the longer side `size`, (1, 3, H, W) uint8."""
        factor = self.size / max(image.shape[1:])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        resized = F.interpolate(
            image[None].float(), size, mode="bilinear", antialias=True, align_corners=False
        )
        return resized.round().clamp(0, 255).to(torch.uint8)
