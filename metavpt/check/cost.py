"""Time and peak memory of each estimator beside a plain gradient of the pretraining loss."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from metavpt.check.finding import Finding
from metavpt.check.scene import Scene
from metavpt.errors import brief
from metavpt.hypergradients.curvature import GaussNewton, Hessian
from metavpt.hypergradients.estimators import Estimator, Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import DampedLanczos
from metavpt.hypergradients.mixed_products import ExactProduct, value_and_gradient
from metavpt.hypergradients.optimizer_updates import AdamW

REPEATS = 3
ESTIMATORS: dict[str, Estimator] = {
    "OneStep exact": OneStep(product=ExactProduct()),
    "OneStep difference": OneStep(),
    "Unrolled(4)": Unrolled(4, AdamW(lr=1e-4)),
    "Implicit": Implicit(  # as strategy=implicit
        DampedLanczos(max_iterations=5, tolerance=0.3), curvature=GaussNewton(otherwise=Hessian())
    ),
}


class Cost(NamedTuple):
    """Time and peak memory of one estimate; the peak is None where it cannot be measured."""

    seconds: float
    peak_bytes: int | None


def costs(scene: Scene, deadline: float, started: Callable[[str], None]) -> list[Finding]:
    """Return a finding for each estimator.

    Args:
        scene: Where.
        deadline: On the clock of `time.monotonic`. After it each is measured only once.
        started: Called with the name of each measurement before it runs.
    """
    started("cost plain gradient")
    with torch.no_grad():
        task = scene.task()
    plain = measure(
        lambda: value_and_gradient(lambda theta: scene.pretrain(theta, task), scene.theta),
        scene.device,
        deadline,
    )
    how = "max_memory_allocated" if scene.device.type == "cuda" else "torch.profiler's allocations"
    findings = [
        Finding(
            "cost plain gradient",
            "ok",
            f"{_described(plain)}; memory by {how}, above what was held before",
        )
    ]
    for name, estimator in ESTIMATORS.items():
        started(f"cost {name}")
        try:
            cost = measure(
                lambda estimator=estimator: scene.estimate(estimator), scene.device, deadline
            )
        except Exception as error:
            findings.append(
                Finding(
                    f"cost {name}",
                    "warning",
                    f"does not run: {brief(error, named=True)}",
                    "choose another estimator",
                )
            )
            continue
        ratios = f"{cost.seconds / plain.seconds:.1f} x the time"
        if cost.peak_bytes and plain.peak_bytes:
            ratios += f", {cost.peak_bytes / plain.peak_bytes:.1f} x the memory"
        findings.append(
            Finding(f"cost {name}", "ok", f"{_described(cost)}: {ratios} of a plain gradient")
        )
    return findings


def measure(call: Callable[[], Any], device: torch.device, deadline: float = float("inf")) -> Cost:
    """The median time of three calls, after one that warms up and is measured for memory."""
    peak = _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)
    seconds = []
    while len(seconds) < REPEATS and not (seconds and time.monotonic() > deadline):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Cost(statistics.median(seconds), peak)


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _cpu_peak(call: Callable[[], Any]) -> int | None:
    """The highest running sum of allocations and releases that the profiler saw.

    The process's own high-water mark never falls again.
    """
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    events = getattr(getattr(profiler.profiler, "kineto_results", None), "events", list)()
    held = peak = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak or None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the profiler's notes on stderr, which no setting turns off once torch is imported."""
    held, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(held, 2)
        os.close(held)
        os.close(nowhere)


def _described(cost: Cost) -> str:
    memory = "" if cost.peak_bytes is None else f", peak {cost.peak_bytes / 2**20:.3g} MiB"
    return (
        f"{cost.seconds:.2f} s" if cost.seconds >= 1 else f"{cost.seconds * 1e3:.3g} ms"
    ) + memory
