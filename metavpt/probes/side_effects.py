"""Several probes of one learner, for side effects that the feedback does not measure."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from metavpt.errors import MetaVPTError
from metavpt.probes.summaries import Describe, Probe
from metavpt.problem import Direction


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
