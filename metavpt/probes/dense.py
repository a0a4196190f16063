"""Dense prediction from frozen features: linear heads are fitted anew at every probe."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from metavpt.dense_tasks.task import DenseTask
from metavpt.errors import MetaVPTError
from metavpt.probes.features import Features, LabelledBatch, extract
from metavpt.probes.heads import Fit, LinearHead, Ridge
from metavpt.problem import Direction

Batches = Callable[[], Iterable[LabelledBatch]]  # called once a probe: a fresh pass over the set


class DenseProbe:
    """Linear heads fitted on the train set and measured on the validation set.

    `probe(features)` returns `{"ridge/depth_rmse": 0.61, "ridge/seg_miou": 0.34, ...}`. The
    features of each set are computed once for all heads and tasks.

    Args:
        train_batches: Returns one pass over the train set.
        val_batches: Returns one pass over the validation set.
        tasks: What to predict.
        heads: Ways to fit a head, by name. Default: one closed-form `Ridge`.
        device: Where features are kept and heads are fitted. None: the device that computes
            features.

    Attributes:
        class_metrics: The metrics of each class at the last measurement, such as `ridge/seg_iou`.

    Raises:
        MetaVPTError: There is nothing to probe.
    """

    def __init__(
        self,
        train_batches: Batches,
        val_batches: Batches,
        tasks: Sequence[DenseTask],
        heads: Mapping[str, Fit] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not tasks:
            raise MetaVPTError("DenseProbe: nothing to probe; name a task")
        self.train_batches, self.val_batches, self.device = train_batches, val_batches, device
        self.tasks = {task.name: task for task in tasks}
        self.heads = dict(heads) if heads else {"ridge": Ridge()}
        self.class_metrics: dict[str, list[tuple[str, float]]] = {}
        self._fitted: dict[str, dict[str, LinearHead]] = {}  # head -> task -> the head

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric."""
        return {
            f"{head}/{name}": direction
            for head in self.heads
            for task in self.tasks.values()
            for name, direction in task.directions.items()
        }

    @torch.no_grad()
    def __call__(self, features: Features) -> dict[str, float]:
        """Fit and measure every head. `predict` uses these heads until the next call."""
        tasks = list(self.tasks.values())
        train = extract(features, self.train_batches(), tasks, self.device)
        self._fitted = {
            head: {name: fit.fit(task, train[name]) for name, task in self.tasks.items()}
            for head, fit in self.heads.items()
        }
        del train  # two sets of features at a time may not fit
        val = extract(features, self.val_batches(), tasks, self.device)
        found: dict[str, float] = {}
        self.class_metrics.clear()
        for head, fitted in self._fitted.items():
            for name, task in self.tasks.items():
                metrics = task.metrics()
                for chunk in val[name].chunks():
                    output = fitted[name](chunk.features.float())
                    metrics.update(task.predict(output), chunk.target)
                for metric, value in task.prefixed(metrics.compute()).items():
                    found[f"{head}/{metric}"] = value
                for metric, values in task.prefixed(task.by_class(metrics)).items():
                    self.class_metrics[f"{head}/{metric}"] = values
        return found

    @torch.no_grad()
    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Score predictions that ignore the image, made from the labels of the train set.

        Returns:
            Name of the predictor to its metrics, under the names that every head has them.
        """
        scores: dict[str, dict[str, float]] = {}
        for task in self.tasks.values():
            guesses = task.trivial(task.target(batch) for batch in self.train_batches())
            metrics = {name: task.metrics() for name in guesses}
            for batch in self.val_batches():
                target = task.target(batch)
                for name, guess in guesses.items():
                    metrics[name].update(guess.to(target.device).expand_as(target), target)
            for name, measured in metrics.items():
                values = task.prefixed(measured.compute())
                scores[name] = {f"{head}/{k}": v for head in self.heads for k, v in values.items()}
        return scores

    @torch.no_grad()
    def predict(
        self, features: Features, images: Tensor, head: str | None = None
    ) -> dict[str, Tensor]:
        """Predict the maps of a few images, for pictures.

        Args:
            features: The frozen backbone.
            images: uint8 (B, 3, H, W).
            head: The name of a head that the last call fitted. Default: the first one.

        Returns:
            The prediction of each task, of the shape of its target.

        Raises:
            MetaVPTError: The head is not fitted.
        """
        name = head or next(iter(self.heads))
        if name not in self._fitted:
            known = ", ".join(self.heads)
            raise MetaVPTError(
                f"DenseProbe: head {name!r} is not fitted; call the probe first (heads: {known})"
            )
        grid = features(images).to(self.device).float()
        return {
            name: self.tasks[name].predict(fitted(grid))
            for name, fitted in self._fitted[name].items()
        }
