"""The budget of a run, in steps, samples, gradient evaluations and seconds."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.profiling import Clock, PeakMemory, phase

UNITS = ("steps", "samples", "grad_evals", "seconds")
UNCOUNTED = frozenset({"probe"})  # purposes that are timed but are no training


class Budget:
    """Limits in any of the four units. The run ends with the step that reaches the first one.

    Time is counted by purpose; `timed("designer")` inside `timed("learner")` stops the outer clock.
    The peak memory is that of training.

    Args:
        steps: Updates of the learner.
        samples: Unlabelled samples (images, tokens) that the learner trains on.
        grad_evals: Passes through the learner: its own steps and what designing tasks takes. The
            unit is a forward and a backward pass of a step's batch, so a forward pass counts as a
            third.
        seconds: Training time: data, task design and learner. Probes, figures, checkpoints and
            reports do not count.
    """

    def __init__(
        self,
        steps: float | None = None,
        samples: float | None = None,
        grad_evals: float | None = None,
        seconds: float | None = None,
    ) -> None:
        limits = {"steps": steps, "samples": samples, "grad_evals": grad_evals, "seconds": seconds}
        self.limits = {unit: limit for unit, limit in limits.items() if limit is not None}
        if not self.limits:
            raise MetaVPTError(
                "budget: no limit is set; set at least one of "
                + ", ".join(f"budget.{unit}" for unit in UNITS)
            )
        for unit, limit in self.limits.items():
            if limit <= 0:
                raise MetaVPTError(f"budget.{unit}={limit}: a budget must be positive")
        self.steps = 0
        self.samples = 0
        self.grad_evals = 0.0
        self.clock = Clock()
        self.memory = PeakMemory()

    @property
    def times(self) -> dict[str, float]:
        """Seconds by purpose."""
        return self.clock.seconds

    @property
    def seconds(self) -> float:
        """Return the training time."""
        return sum(spent for purpose, spent in self.times.items() if purpose not in UNCOUNTED)

    @property
    def progress(self) -> float:
        """The share of the tightest limit that is spent, in [0, 1]."""
        return min(1.0, max(getattr(self, unit) / limit for unit, limit in self.limits.items()))

    @property
    def exhausted(self) -> bool:
        """Return whether a limit is reached."""
        return self.progress >= 1.0

    def check_first_step(self) -> None:
        """After the first step: a limit that even this one overran is an error."""
        for unit, limit in self.limits.items():
            if (spent := getattr(self, unit)) > limit:
                raise MetaVPTError(
                    f"budget.{unit}={limit}: no step fits, the first one took {spent:.4g} {unit}"
                )

    def agree(self) -> None:
        """Use the first process's clock for limits in seconds, so that all end with one step."""
        if "seconds" in self.limits:
            self.clock.seconds = collectives.first(self.times)

    def charge(self, *, steps: int = 0, samples: int = 0, grad_evals: float = 0.0) -> None:
        """Count what a step has used."""
        self.steps += steps
        self.samples += samples
        self.grad_evals += grad_evals

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Count the seconds of the block as `purpose`. "probe" counts apart from training."""
        with (
            self.clock.timed(purpose),
            phase(purpose),
            self.memory.paused() if purpose in UNCOUNTED else nullcontext(),
        ):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the limits."""
        counters = {"steps": self.steps, "samples": self.samples, "grad_evals": self.grad_evals}
        return {
            **counters,
            "times": dict(self.times),
            "peak_memory": self.memory.peak,
            "limits": dict(self.limits),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.steps, self.samples, self.grad_evals = (
            state["steps"],
            state["samples"],
            state["grad_evals"],
        )
        self.clock.seconds, self.memory.earlier = dict(state["times"]), state["peak_memory"]
