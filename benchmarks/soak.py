"""Growth of a long steered run in memory, open files, threads and child processes.

    python benchmarks/soak.py --seconds 7200 [--workers 2]

Trains DINO on generated rooms with designer updates, probes, first-order measurements and
checkpoints. It samples the process every --every seconds and fits a line to each figure after the
first fifth of the steps, in which caches fill and loaders start. Writes
benchmarks/results/soak.json and its section of docs/benchmarks.md at every tenth sample, so that a
run cut short keeps its results.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rounds import cpu_name, publish

from metavpt.training.build import build
from metavpt.training.trainer import Trainer

OPTIONS = [
    "problem=dino_masks", "strategy=one_step", "strategy.burn_in=0", "strategy.every=4",
    "trainer.probe_every=200",
    "trainer.checkpoint_every=50", "trainer.first_order_every=40", "backbone.tail_blocks=1",
    "backbone.embed_dim=24", "backbone.depth=2",
    "backbone.num_heads=2", "recipe.global_size=32", "recipe.local_size=16",
    "problem.batch_size=16", "problem.meta_batch_size=8",
    "problem.feedback_batch_size=8", "problem.first_head_steps=10", "problem.feature_size=[32,32]",
    "data.rooms.num_frames=200",
    "data.num_train=100", "data.num_meta=40", "budget.steps=null",
]  # fmt: skip
WARM_UP = 0.2  # the share of the samples that caches, allocators and lazy imports may grow in
LIMITS = {
    "memory": 1.0,
    "files": 0.1,
    "threads": 0.1,
    "children": 0.1,
}  # in 1,000 steps: MB, and how many
TITLES = {
    "memory": "memory with its loading processes, MB",
    "files": "open files",
    "threads": "threads",
    "children": "child processes",
}


class Sample(NamedTuple):
    """The process after `step` steps: memory in MB with that of its children, and counts."""

    step: int
    memory: float
    files: int
    threads: int
    children: int


def sample(step: int) -> Sample:
    """Of this process, from /proc."""
    children = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    memory = sum(map(_memory, [os.getpid(), *children]))
    return Sample(
        step,
        memory,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(children),
    )


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Fit the growth of each figure per 1,000 steps by least squares, after the warm-up."""
    settled = samples[int(WARM_UP * len(samples)) :]
    if len({one.step for one in settled}) < 2:
        raise ValueError("too few samples for a slope; raise --seconds or lower --every")
    steps = [one.step / 1000 for one in settled]
    names = Sample._fields[1:]
    return {
        name: float(np.polyfit(steps, [getattr(one, name) for one in settled], 1)[0])
        for name in names
    }


def soak(trainer: Trainer, every: float, seen: Callable[[list[Sample]], None]) -> None:
    """Run the trainer, and sample every `every` seconds between two steps for `seen`."""
    samples: list[Sample] = []
    step, due = trainer.step, [time.monotonic()]

    def watched() -> None:
        step()
        if time.monotonic() >= due[0]:
            samples.append(sample(trainer.budget.steps))
            seen(samples)
            due[0] = time.monotonic() + every

    trainer.step = watched  # type: ignore[method-assign]
    trainer.run()


def section(report: dict[str, Any]) -> list[str]:
    """Return the figures at both ends of the fitted line, and their growth."""
    samples = [Sample(*one) for one in report["samples"]]
    first, last = samples[int(WARM_UP * len(samples))], samples[-1]
    lines = [
        "## Soak: does a long run stay as small as it began?",
        "",
        "DINO on generated rooms with a designer update every 4 steps, probes, first-order "
        "measurements, a checkpoint every 50 steps and "
        f"{report['workers']} loading processes a stream: {last.step:,} steps in "
        f"{report['seconds']:,.0f} seconds, {len(samples)} samples. "
        "The slope is that of the least-squares line after the first fifth of the samples, "
        f"at step {first.step:,}.",
        "",
        f"{report['cpu']}, {report['threads']} thread, torch {report['torch']}; "
        f"{report['date']}: `{report['command']}`.",
        "",
        "| | after the first fifth | at the end | in 1,000 steps | limit | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, slope in report["per_1000_steps"].items():
        begun, ended = getattr(first, name), getattr(last, name)
        verdict = "met" if slope < LIMITS[name] else "**not met**"
        growth = f"{round(slope, 3) + 0.0:+.3f} | {LIMITS[name]:g}"
        lines.append(f"| {TITLES[name]} | {begun:,.0f} | {ended:,.0f} | {growth} | {verdict} |")
    return lines


def _memory(pid: int) -> float:
    """MB, a page that forked processes share counted once among them; 0 where it has ended.

    Mapped files are left out: their share changes with the other programs that map them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(
        int(line.split()[1]) * 1024 / 1e6
        for line in lines
        if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, began = Console(), time.monotonic()
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(),
        "torch": torch.__version__, "threads": options.threads, "workers": options.workers,
        "options": OPTIONS,
    }  # fmt: skip

    def seen(samples: list[Sample]) -> None:
        console.print(samples[-1])
        if len(samples) % 10 == 0:
            report.update(
                seconds=time.monotonic() - began, per_1000_steps=slopes(samples), samples=samples
            )
            console.print(
                {name: round(slope, 4) for name, slope in report["per_1000_steps"].items()}
            )
            if not options.print:
                publish("soak", report, section(report))

    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_module("metavpt.configs", version_base="1.3"),
    ):
        limits = [
            f"budget.seconds={options.seconds}",
            f"problem.num_workers={options.workers}",
            f"data.rooms.folder={folder}",
        ]
        soak(
            build(compose("run", [*OPTIONS, *limits]), Path(folder) / "run", Console(quiet=True)),
            options.every,
            seen,
        )


if __name__ == "__main__":
    main()
