"""The profile of a run's steps: seconds of each phase, their lower bound, FLOPs and memory."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from rich.progress import track
from rich.table import Table
from rich.text import Text

from metavpt.bench import cost_model, flops
from metavpt.errors import MetaVPTError
from metavpt.profiling import Clock, PeakMemory
from metavpt.training.schedule import Period
from metavpt.training.trainer import Trainer

STEP, UPDATE = "step", "designer"
TITLES = {
    "data": "data",
    "augment": "augmentation",
    "task": "task construction",
    "teacher": "teacher",
    "heads": "heads",
    "g_down": "g_down",
    "solve": "linear solve",
    "product": "product",
    "phi": "phi step",
    "forward": "student forward",
    "backward": "student backward",
    "optimizer": "optimizer",
    "learner": "clipping, checks",
    "ema": "EMA, centre",
    UPDATE: "other",
    STEP: "other",
}


class Spent(NamedTuple):
    """Seconds of a phase in a step in which it occurs, and the share of steps in which it does."""

    part: str  # of the step itself, STEP, or of what the strategy does for the designer, UPDATE
    phase: str
    seconds: float
    frequency: float

    @property
    def per_step(self) -> float:
        """Return the mean seconds per step."""
        return self.seconds * self.frequency


def spent(steps: Sequence[dict[str, float]]) -> list[Spent]:
    """Summarise the seconds by path: medians over the steps in which a phase occurs."""
    found: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        own: dict[tuple[str, str], float] = {}
        for path, seconds in step.items():
            names = path.split("/")
            key = UPDATE if UPDATE in names else STEP, names[-1]
            own[key] = own.get(key, 0.0) + seconds
        for key, seconds in own.items():
            found.setdefault(key, []).append(seconds)
    known = list(TITLES)
    order = sorted(
        found,
        key=lambda key: (
            key[0] == UPDATE,
            known.index(key[1]) if key[1] in TITLES else len(known),
            key[1],
        ),
    )
    return [
        Spent(*key, statistics.median(found[key]), len(found[key]) / len(steps)) for key in order
    ]


@dataclass
class Measured:
    """Measurements of some steps of a run.

    Attributes:
        seconds: Of each step by path, see `Clock`.
        peak_bytes, flops: By kind of step, "plain" and "update".
        samples: Of one step.
    """

    seconds: list[dict[str, float]] = field(default_factory=list)  # by path, of each step
    peak_bytes: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    samples: int = 0  # of a step

    @property
    def phases(self) -> list[Spent]:
        """Summarise the seconds by phase."""
        return spent(self.seconds)

    @property
    def per_step(self) -> float:
        """Seconds per step, with a share of the updates."""
        return sum(phase.per_step for phase in self.phases)

    def per_step_without(self, names: frozenset[str]) -> float:
        """Return the mean seconds per step, without the phases in `names`."""
        return sum(phase.per_step for phase in self.phases if phase.phase not in names)


def period(strategy: Any) -> int:
    """Return the number of steps after which a strategy repeats itself."""
    update = getattr(strategy, "period", None)
    return update.every if update else 1


def num_steps(asked: int, strategy: Any) -> int:
    """Round `asked` up to whole periods of the strategy."""
    if asked < 1:
        raise MetaVPTError(f"measure.steps={asked} must be at least 1")
    return math.ceil(asked / period(strategy)) * period(strategy)


def measure(
    trainer: Trainer, warmup: int, steps: int, now: Callable[[], float], count_flops: bool = True
) -> Measured:
    """Measure `steps` steps of `trainer` after `warmup` ones.

    One more period runs under a FLOP counter. The steps train the learner; probes are left out.
    """
    _skip_burn_in(trainer.strategy)
    trainer.first_order_every = 0
    measured, memory = Measured(), PeakMemory()
    for number in track(
        range(warmup + steps), "measuring", console=trainer.log.console, transient=True
    ):
        before, clock = trainer.budget.samples, Clock(now, by_path=True)
        memory.restart()
        with clock.listen(STEP):
            trainer.step()
        if number >= warmup:
            measured.seconds.append(clock.seconds)
            kind = _kind(clock)
            measured.peak_bytes[kind] = max(measured.peak_bytes.get(kind, 0), memory.peak)
            measured.samples = trainer.budget.samples - before
    for _ in range(period(trainer.strategy) if count_flops else 0):
        clock = Clock(by_path=True)
        with clock.listen(STEP):
            counted = flops.count(trainer.step)
        measured.flops.setdefault(_kind(clock), counted)
    return measured


def _skip_burn_in(strategy: Any) -> None:
    """Start updates at once, in the strategy and in the feedback direction that it keeps."""
    for owner in (strategy, getattr(strategy, "feedback", None)):
        if isinstance(period := getattr(owner, "period", None), Period):
            start: Any = replace(period, burn_in=0, start=None)
            owner.period = start  # pyright: ignore[reportOptionalMemberAccess]


def _kind(clock: Clock) -> str:
    """Return "update" if the step computed a feedback gradient, otherwise "plain"."""
    return "update" if any("g_down" in path for path in clock.seconds) else "plain"


class LowerBound(NamedTuple):
    """The lower bound of a step: the seconds of its passes alone, see `cost_model`.

    `each` and `passes` are by name.
    """

    seconds: float
    passes: dict[str, float]
    each: dict[str, float]


def lower_bound(trainer: Trainer, now: Callable[[], float]) -> LowerBound | None:
    """Return the lower bound, or None for a strategy or estimator without a cost model.

    Linear solves count as in the steps so far.
    """
    records = trainer.log.records() if trainer.log.path.exists() else []
    products = [
        record["curvature_products"] for record in records if "curvature_products" in record
    ]
    counts = cost_model.of_step(trainer.strategy, statistics.mean(products) if products else 0.0)
    if counts is None:
        return None
    stopwatch = cost_model.Stopwatch(trainer.problem, trainer.strategy, trainer.streams, now)
    each = {name: stopwatch(name) for name in counts}
    return LowerBound(cost_model.seconds(counts, each.__getitem__), dict(counts), each)


def report(measured: Measured, bound: LowerBound | None, card: str | None) -> dict[str, Any]:
    """Collect all measurements, for JSON."""
    busy = measured.per_step_without(cost_model.OUTSIDE)
    plain = sum(phase.per_step for phase in measured.phases if phase.part == STEP)
    return {
        "phases": [{**phase._asdict(), "per_step": phase.per_step} for phase in measured.phases],
        "seconds_per_step": measured.per_step,
        "samples_per_second": measured.samples / measured.per_step,
        "lower_bound": bound._asdict() if bound else None,
        "over_lower_bound": measured.per_step / bound.seconds if bound else None,
        "over_lower_bound_without_data_and_augmentation": busy / bound.seconds if bound else None,
        "flops": measured.flops,
        "model_flops_utilisation": flops.utilisation(measured.flops["plain"], plain, card)
        if "plain" in measured.flops
        else None,
        "peak_bytes": measured.peak_bytes,
        "steps": asdict(measured)["seconds"],
    }


def table(measured: Measured) -> Table:
    """Make a table with one row per phase: seconds, frequency, seconds per step, share."""
    titles = ("", "seconds", "in steps", "seconds a step", "share")
    rows = Table(*titles, box=None, header_style="dim")
    for column in rows.columns[1:]:
        column.justify = "right"
    for part, title in ((STEP, "step"), (UPDATE, "designer update")):
        own = [phase for phase in measured.phases if phase.part == part]
        if own:
            rows.add_row(
                Text(title, "bold"),
                "",
                "",
                *_shown(sum(phase.per_step for phase in own), measured.per_step),
            )
        for phase in own:
            shown = _shown(phase.per_step, measured.per_step)
            rows.add_row(
                f"  {TITLES.get(phase.phase, phase.phase)}",
                f"{phase.seconds:.4f}",
                f"{phase.frequency:.0%}",
                *shown,
            )
    return rows


def _shown(per_step: float, whole: float) -> tuple[str, str]:
    return f"{per_step:.4f}", f"{per_step / whole:.1%}"


def lines(found: dict[str, Any]) -> list[str]:
    """Format the numbers of a report that are not phases, one per line."""
    said = [
        f"{found['seconds_per_step']:.4f} s a step, {found['samples_per_second']:.4g} samples/s"
    ]
    if bound := found["lower_bound"]:
        counted = " + ".join(
            f"{count:.4g} {name} x {bound['each'][name]:.4f}"
            for name, count in bound["passes"].items()
        )
        over, busy = (
            found["over_lower_bound"],
            found["over_lower_bound_without_data_and_augmentation"],
        )
        said.append(f"lower bound {bound['seconds']:.4f} s a step = {counted}")
        said.append(f"measured / lower bound {over:.2f}; without data and augmentation {busy:.2f}")
    else:
        said.append(
            "lower bound unknown: the passes of this strategy or estimator are not counted in "
            "metavpt.bench.cost_model"
        )
    said += [f"FLOPs of a step, {kind}: {number:.3e}" for kind, number in found["flops"].items()]
    share = found["model_flops_utilisation"]
    said.append(
        "model FLOPs utilisation of a plain step: "
        f"{'unknown' if share is None else f'{share:.1%} of the peak in bfloat16'}"
    )
    said += [
        f"peak memory of a step, {kind}: {size / 2**20:,.0f} MiB"
        for kind, size in found["peak_bytes"].items()
    ]
    return said


def synchronized() -> float:
    """Return seconds after the GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
