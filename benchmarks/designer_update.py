"""Time and peak memory of one designer update, ours beside a plain step and beside other packages: `make bench`, part 1.

    python benchmarks/designer_update.py [--rounds 5] [--threads 2] [--rows plain one_step_difference ...]

Every measurement is a process of its own; rounds go through all rows in turn, so that a slow minute of the machine hits all alike.
Writes benchmarks/results/designer_update.json and the table in docs/benchmarks.md.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt import params
from metavpt.budget import Budget
from metavpt.designers.masks import MaskDesigner, UNet
from metavpt.designers.views import Views
from metavpt.errors import MetaVPTError
from metavpt.feedback import DenseFeedback
from metavpt.greedy import Greedy
from metavpt.hypergradient import Estimator, Hypergradient, Implicit, InnerLoss, OneStep, OuterLoss, Unrolled
from metavpt.interop import backpropagated, betty
from metavpt.interop.learn2learn import MAMLUnroll
from metavpt.interop.torchopt import TorchOptUnroll
from metavpt.learners.vit import create_backbone
from metavpt.linear_solve import ConjugateGradient
from metavpt.optimizers import Update
from metavpt.params import Params
from metavpt.problems.dino_dense import DinoDense
from metavpt.products import ExactProduct, Loss
from metavpt.strategies import Learned
from metavpt.stream import Streams

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "designer_update.json"
TABLE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- designer_update: begin -->", "<!-- designer_update: end -->"
MIB = 2**20

SIZE, BATCH, NUM_CLASSES, MAX_STEPS = 64, 16, 13, 32
SETTING = {
    "vit": "12 blocks, width 192, 3 heads, patch 8 (DINOv3's architecture); S = last 2 blocks and final norm",
    "task": f"DINO, 2 global crops of {SIZE}x{SIZE}, no local crops, batch {BATCH}; head 512-512-128, 1024 prototypes; "
    "U-Net mask designer (base 8, depth 2: designer=unet)",
    "feedback": f"depth and {NUM_CLASSES} classes on {BATCH} frames of {SIZE}x{SIZE}",
}


class Batch(NamedTuple):
    """Unlabelled: both global crops of every image, (2, B, 3, H, W) uint8."""

    images: torch.Tensor
    seed: int


class Vision(DinoDense):
    """The shipped problem on random pixels: crops are made and heads are fitted beforehand, so that neither is part of what is measured."""

    def __init__(self) -> None:
        backbone = create_backbone("vit_tiny_dinov3", tail_blocks=2, depth=12, embed_dim=192, num_heads=3)
        data = SimpleNamespace(frames=SimpleNamespace(size=(SIZE, SIZE), num_classes=NUM_CLASSES), unlabelled=[], train=[], meta=[], val=[])
        super().__init__(
            backbone,
            recipe=lambda mean, std: lambda crops, seed: Views(crops / 255, crops.new_zeros(0, BATCH, 3, SIZE, SIZE)),
            designer=lambda recipe: MaskDesigner(recipe, UNet(base=8, depth=2), initial_keep=0.6),
            data=data,
            feedback=DenseFeedback,
            num_prototypes=1024,
            head_hidden=512,
            head_bottleneck=128,
        )
        # at its start either is zero, and so would be every derivative through it
        for layer in (self.feedback.depth, self.feedback.segmentation, self.designer.network.out):
            torch.nn.init.normal_(layer.weight, std=0.02)

    def fit_heads(self) -> None:
        pass


class WholeNetwork(Vision):
    """S = all parameters of the learner: no trunk that could run once."""

    def aligned_parameters(self) -> list[str]:
        return list(params.named(self.learner))

    def pretrain_tail(self, theta: Params, task: Views) -> Loss:
        return lambda theta_s: Vision.pretrain_tail(self, {**theta, **theta_s}, task)({})


@dataclass(frozen=True)
class Backprop:
    """The reference: backprop through the graph of all steps of the learner's optimizer."""

    num_batches: int
    needs_update = True

    def __call__(
        self, inner_losses: Sequence[InnerLoss], outer_loss: OuterLoss, theta: Params, phi: Params, *, update: Update, start: Any = None
    ) -> Hypergradient:
        phi, after, state = params.leaves(phi), params.leaves(theta), update.state
        with sdpa_kernel(SDPBackend.MATH):
            for inner in inner_losses:
                gradients = torch.autograd.grad(inner(phi)(after), list(after.values()), create_graph=True)
                after, state = update.rule.step(after, state, dict(zip(after, gradients, strict=True)))
            return backpropagated(outer_loss, theta, after, phi, self.num_batches)


class Bench:
    """What a training loop holds at a designer update: learner, teacher, designer, the optimizer with its moments, batches."""

    def __init__(self, problem: Vision) -> None:
        self.problem = problem
        rng = torch.Generator().manual_seed(0)
        shape = (2, BATCH, 3, SIZE, SIZE)
        batches = [Batch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng), seed) for seed in range(MAX_STEPS)]
        labelled = SimpleNamespace(
            image=torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng),
            depth=1 + torch.rand(BATCH, SIZE, SIZE, generator=rng),
            label=torch.randint(0, NUM_CLASSES, (BATCH, SIZE, SIZE), generator=rng),
        )
        self.streams = Streams(itertools.cycle(batches), itertools.cycle(batches), itertools.cycle([labelled]))
        theta = params.named(problem.learner)
        self.optimizer = torch.optim.AdamW(theta.values(), lr=1e-4)
        for p in theta.values():
            p.grad = 1e-3 * torch.randn(p.shape, generator=rng)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def plain_step(self) -> None:
        """What Trainer.step does under `strategy=fixed`, short of data, EMA and log."""
        task = self.problem.recipe(next(self.streams.pretrain))
        self.problem.pretrain_loss(params.named(self.problem.learner), task).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, estimator: Estimator) -> None:
        """What Learned does for one hypergradient: tasks by the designer, g_down, the estimator."""
        Learned(estimator).hypergradient(self.problem, self.streams, self.optimizer, Budget(steps=1))

    def score(self, num_candidates: int) -> None:
        """A greedy choice, its feedback direction refreshed."""
        Greedy(num_candidates).next_task(self.problem, self.streams, self.optimizer, Budget(steps=1))


def estimator(make: Callable[[], Estimator], problem: type[Vision] = Vision) -> Callable[[], Callable[[], None]]:
    def prepare() -> Callable[[], None]:
        bench, made = Bench(problem()), make()
        return lambda: bench.update(made)

    return prepare


# name -> (title, what builds the thing to time)
ROWS: dict[str, tuple[str, Callable[[], Callable[[], None]]]] = {
    "plain": ("plain SSL step", lambda: Bench(Vision()).plain_step),
    "one_step_difference": ("OneStep, difference", estimator(OneStep)),
    "one_step_exact": ("OneStep, exact", estimator(lambda: OneStep(product=ExactProduct()))),
    "unrolled_1": ("Unrolled(1)", estimator(lambda: Unrolled(1))),
    "unrolled_4": ("Unrolled(4)", estimator(lambda: Unrolled(4))),
    "unrolled_4_kept": ("Unrolled(4), all graphs kept", estimator(lambda: Unrolled(4, kept_graphs=4))),
    "unrolled_16": ("Unrolled(16)", estimator(lambda: Unrolled(16))),
    "unrolled_32": ("Unrolled(32)", estimator(lambda: Unrolled(32))),
    "implicit_cg_5": ("Implicit(CG 5)", estimator(lambda: Implicit(ConjugateGradient(5, 1e-12), damping=1e-2))),
    "greedy_8": ("Greedy(8), one batch", lambda: (lambda bench: lambda: bench.score(8))(Bench(Vision()))),
    "naive_double_backward": ("double backward, all parameters", estimator(lambda: OneStep(product=ExactProduct()), WholeNetwork)),
    "backprop_4": ("backprop through the unroll, K = 4", estimator(lambda: Backprop(4))),
    "betty_darts": ("Betty darts", estimator(betty.Darts)),
    "betty_cg_5": ("Betty cg, 5 iterations", estimator(lambda: betty.ConjugateGradient(cg_iterations=5))),
    "torchopt_1": ("TorchOpt AdamW unroll, K = 1", estimator(lambda: TorchOptUnroll(1))),
    "torchopt_4": ("TorchOpt AdamW unroll, K = 4", estimator(lambda: TorchOptUnroll(4))),
    "torchopt_16": ("TorchOpt AdamW unroll, K = 16", estimator(lambda: TorchOptUnroll(16))),
    "learn2learn_4": ("learn2learn SGD unroll, K = 4", estimator(lambda: MAMLUnroll(4, 1e-4))),
}

# what, row, over, limit
TARGETS = [
    ("seconds", "one_step_difference", "plain", 0.9),
    ("seconds", "one_step_difference", "betty_darts", 0.65),
    ("peak_mib", "one_step_difference", "plain", 1.1),
    ("peak_mib", "unrolled_32", "unrolled_1", 1.5),
    ("seconds", "unrolled_4", "backprop_4", 1.1),
    ("seconds", "unrolled_4_kept", "backprop_4", 1.1),
    ("seconds", "greedy_8", "plain", 8 * 0.6),
]


def measure(row: str, threads: int) -> dict[str, Any]:
    """In a process of its own: one call to warm up, then the median of those that 10 seconds hold, at least 2 and at most 5."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = ROWS[row][1]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    call()
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < 10 and len(seconds) < 5):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return {"seconds": statistics.median(seconds), "peak_mib": peak, "mib_before": before, "calls": seconds}


def run(row: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", row, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {"error": errors[0], "runs": runs}
    values = {key: [run[key] for run in runs] for key in ("seconds", "peak_mib")}
    spread = {key: [min(numbers), max(numbers)] for key, numbers in values.items()}
    return {**{key: statistics.median(numbers) for key, numbers in values.items()}, "spread": spread, "runs": runs}


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "timm", "numpy", "torchopt", "betty-ml", "learn2learn")
    return {
        "command": " ".join(["python", "benchmarks/designer_update.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if "model name" in line), platform.processor()),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
        "setting": SETTING,
    }


def table(report: dict[str, Any]) -> str:
    env, rows = report["environment"], report["rows"]
    plain = rows.get("plain", {})
    lines = [
        "## One designer update",
        "",
        f"{env['setting']['vit']}. {env['setting']['task']}. Feedback: {env['setting']['feedback']}.",
        "",
        f"{env['cpus']} CPU cores ({env['cpu']}), {env['threads']} threads, "
        + ", ".join(f"{name} {number or 'absent'}" for name, number in env["versions"].items())
        + f"; medians of {env['rounds']} interleaved rounds, one process each, with the least and the greatest; "
        f"{env['date']}: `{env['command']}`.",
        "",
        "Memory is the peak resident size of the whole process, Python and PyTorch included. All estimators take the same closures over S. "
        "Betty sees one loss and runs the trunk with every evaluation; all others run it once a batch.",
        "",
        "| | seconds | x plain | peak MiB | x plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {ROWS[name][0]} | did not run: {row['error']} | | | |")
            continue
        cells = []
        for key, digits in (("seconds", 3), ("peak_mib", 0)):
            low, high = row["spread"][key]
            ratio = f"{row[key] / plain[key]:.2f}" if key in plain else ""
            cells += [f"{row[key]:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})", ratio]
        lines.append(f"| {ROWS[name][0]} | {' | '.join(cells)} |")
    lines += ["", "| target | measured | |", "| --- | --- | --- |"]
    for key, name, over, limit in TARGETS:
        if key in rows.get(name, {}) and key in rows.get(over, {}):
            ratio = rows[name][key] / rows[over][key]
            what = "time" if key == "seconds" else "memory"
            verdict = "met" if ratio <= limit else "**not met**"
            lines.append(f"| {what} of {ROWS[name][0]} <= {limit:g} x {ROWS[over][0]} | {ratio:.2f} | {verdict} |")
    return "\n".join(lines)


def write(report: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    text = TABLE.read_text() if TABLE.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    TABLE.write_text(f"{head}{BEGIN}\n{table(report)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        try:
            print(json.dumps(measure(arguments.measure, arguments.threads)))
        except MetaVPTError as error:
            sys.exit(str(error))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.rows}
    for number in range(arguments.rounds):
        for name in arguments.rows:
            runs[name].append(run(name, arguments.threads))
            print(f"round {number + 1}/{arguments.rounds}  {name}  {runs[name][-1]}", flush=True)
        rows = {name: summary(runs[name]) for name in arguments.rows}
        write({"environment": {**environment(arguments), "rounds": number + 1}, "rows": rows})  # a run cut short keeps its whole rounds


if __name__ == "__main__":
    main()
