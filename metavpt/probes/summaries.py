"""Probes of side effects: their interface, several at once, and features of whole images."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.lazy import Lazy, runs
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.learners.vit import Features
from metavpt.problem import Direction

# Images uint8 (B, 3, H, W) of any size -> cls (B, D), patches (B, D, h, w).
Describe = Callable[[Tensor], Features]
Pool = Literal["mean", "cls"]


class Probe(Protocol):
    """A measurement of frozen features, with metric names of its own, such as `knn/accuracy`.

    It may have `directions`, which maps its metrics to "lower" or "higher", whichever is better. A
    metric without a direction gets no verdict. A probe with state has a `state_dict`.
    """

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Return the metrics by name.

        Args:
            describe: The frozen backbone.
            images: The learner's own unlabelled images, for probes without images of their own.
        """
        ...


class SideEffects:
    """All metrics of several probes. No two probes may share the name of a metric.

    Args:
        probes: Probes by name.
    """

    def __init__(self, probes: Mapping[str, Probe] | None = None) -> None:
        self.probes = dict(probes or {})

    def __call__(self, describe: Describe, images: Dataset[Tensor]) -> dict[str, float]:
        """Return the metrics of all probes.

        Raises:
            MetaVPTError: Two probes share the name of a metric.
        """
        metrics: dict[str, float] = {}
        for name, probe in self.probes.items():
            measured = probe(describe, images)
            if twice := sorted(metrics.keys() & measured.keys()):
                raise MetaVPTError(
                    f"problem.probes.{name}: {twice[0]} is measured by another probe too; give "
                    "its head another name"
                )
            metrics |= measured
        return metrics

    @property
    def directions(self) -> dict[str, Direction]:
        """Return the better direction of each metric, for the probes that state one."""
        stated: dict[str, Direction] = {}
        for probe in self.probes.values():
            stated |= getattr(probe, "directions", {})
        return stated

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the probes that have one."""
        return {
            name: probe.state_dict()  # type: ignore[attr-defined]
            for name, probe in self.probes.items()
            if hasattr(probe, "state_dict")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            self.probes[name].load_state_dict(value)  # type: ignore[attr-defined]


def check_pool(pool: str) -> None:
    """Raise MetaVPTError unless `pool` is known."""
    if pool not in ("mean", "cls"):
        raise MetaVPTError(f"pool={pool!r}: known are mean (of the patches), cls")


@torch.no_grad()
def summarise(describe: Describe, batches: Iterable[Tensor], pool: Pool = "mean") -> Tensor:
    """Compute one vector per image, (N, D) float32. Ranks share the batches.

    Args:
        describe: The frozen backbone.
        batches: Images, uint8 (B, 3, H, W) each.
        pool: "mean" of the patches, or the "cls" token.

    Raises:
        NonFiniteError: A feature is NaN or infinite.
    """

    def summary(images: Tensor) -> Tensor:
        features = describe(images)
        return (features.cls if pool == "cls" else features.patches.mean(dim=(2, 3))).float()

    summaries = torch.cat(list(collectives.share_out(summary, batches)))
    if not torch.isfinite(summaries).all():
        raise NonFiniteError(
            "probe: the features of the learner are not finite; look at the losses before this step"
        )
    return summaries


def stack(images: Dataset[Tensor], indices: list[int], batch_size: int) -> Iterable[Tensor]:
    """Return the images at `indices` in batches, uint8 (B, 3, H, W)."""
    return Lazy(lambda which: torch.stack([images[i] for i in which]), runs(indices, batch_size))
