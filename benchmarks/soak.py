"""Whether a long run stays as small as it began: memory, open files, threads and child processes of steered training.

    python benchmarks/soak.py --seconds 7200 [--workers 1]

Trains DINO on generated rooms with designer updates, probes, first-order measurements and checkpoints, samples the process every --every
seconds, and fits a line to each figure over the steps after the first fifth, in which caches fill and loaders start.
Writes benchmarks/results/soak.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_module
from rich.console import Console

from metavpt.run import build
from metavpt.trainer import Trainer

OPTIONS = [
    "problem=dino_nyuv2", "strategy=one_step", "strategy.burn_in=0", "strategy.meta_every=4", "trainer.probe_every=200",
    "trainer.checkpoint_every=50", "trainer.first_order_every=40", "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2",
    "backbone.num_heads=2", "recipe.global_size=32", "recipe.local_size=16", "problem.batch_size=16", "problem.meta_batch_size=8",
    "problem.feedback_batch_size=8", "problem.first_head_steps=10", "problem.feature_size=[32,32]", "data.rooms.num_frames=200",
    "data.num_train=100", "data.num_meta=40", "budget.steps=null",
]  # fmt: skip
WARM_UP = 0.2  # the share of the samples that caches, allocators and lazy imports may grow in
LIMIT = 1.0  # MB of memory in 1,000 steps


class Sample(NamedTuple):
    """The process after `step` steps: memory in MB with that of its children, and how many of each else."""

    step: int
    memory: float
    files: int
    threads: int
    children: int


def sample(step: int) -> Sample:
    """Of this process, from /proc."""
    children = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    memory = sum(map(_memory, [os.getpid(), *children]))
    return Sample(step, memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children))


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Growth of each figure in 1,000 steps: the least-squares line through the samples after the warm-up."""
    settled = samples[int(WARM_UP * len(samples)) :]
    if len({one.step for one in settled}) < 2:
        raise ValueError("too few samples for a slope; raise --seconds or lower --every")
    steps = [one.step / 1000 for one in settled]
    names = Sample._fields[1:]
    return {name: float(np.polyfit(steps, [getattr(one, name) for one in settled], 1)[0]) for name in names}


def soak(trainer: Trainer, every: float, console: Console) -> list[Sample]:
    """Run the trainer to the end of its budget, with a sample now and then, taken between two steps."""
    samples: list[Sample] = []
    step, due = trainer.step, [time.monotonic()]

    def watched() -> None:
        step()
        if time.monotonic() >= due[0]:
            samples.append(sample(trainer.budget.steps))
            console.print(samples[-1])
            due[0] = time.monotonic() + every

    trainer.step = watched  # type: ignore[method-assign]
    trainer.run()
    return samples


def _memory(pid: int) -> float:
    """The proportional set size in MB, in which a page that forked processes share is counted once among them; 0 where one has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, initialize_config_module("metavpt.configs", version_base="1.3"):
        limits = [f"budget.seconds={options.seconds}", f"problem.num_workers={options.workers}", f"data.rooms.folder={folder}"]
        trainer = build(compose("run", [*OPTIONS, *limits]), Path(folder) / "run", Console(quiet=True))
        samples = soak(trainer, options.every, console)
    grown = slopes(samples)
    console.print({name: round(slope, 4) for name, slope in grown.items()}, f"in 1,000 of {trainer.budget.steps} steps")
    if not options.print:
        result = {
            "options": OPTIONS, "workers": options.workers, "torch": torch.__version__, "steps": trainer.budget.steps,
            "seconds": trainer.budget.seconds, "per_1000_steps": grown, "is_flat": grown["memory"] < LIMIT, "samples": samples,
        }  # fmt: skip
        file = Path(__file__).parent / "results" / "soak.json"
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
