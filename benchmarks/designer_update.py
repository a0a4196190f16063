"""Time and memory of a designer update, beside a plain step and other packages: part 1.

    python benchmarks/designer_update.py [--rounds 5] [--threads 2] [--rows plain ...]

Writes benchmarks/results/designer_update.json and the table in docs/benchmarks.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rounds import Part, Row, Target, cells, machine, verdicts
from torch.nn.attention import SDPBackend, sdpa_kernel
from vision import NUM_CLASSES, Bench, Shape, Vision, WholeNetwork, tiny

from metavpt.bench import flops
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import GaussNewton
from metavpt.hypergradients.estimators import (
    Estimator,
    Hypergradient,
    Implicit,
    InnerLoss,
    OneStep,
    OuterLoss,
    Unrolled,
)
from metavpt.hypergradients.linear_solvers import DampedLanczos
from metavpt.hypergradients.mixed_products import ExactProduct
from metavpt.hypergradients.optimizer_updates import Update
from metavpt.hypergradients.params import Params
from metavpt.interop import backpropagated, betty
from metavpt.interop.learn2learn import MAMLUnroll
from metavpt.interop.torchopt import TorchOptUnroll
from metavpt.strategies.learned import Learned

SHAPE = tiny(16)
# FLOPs alone: two images take seconds on a CPU, and a larger batch takes as many FLOPs an image.
PAPER = Shape(
    "ViT-B/16, 224x224, batch 2",
    "vit_base_patch16_dinov3",
    {},
    224,
    2,
    tail_blocks=3,
    num_prototypes=8192,
    hidden=2048,
    bottleneck=256,
    labelled=0.5,  # 32 frames for a meta batch of 64
    unet=(16, 3),
)
SETTING = {
    "vit": "12 blocks, width 192, 3 heads, patch 8 (DINOv3's architecture); "
    "S = last 2 blocks and final norm",
    "task": f"DINO, 2 global crops of {SHAPE.size}x{SHAPE.size}, no local crops, "
    f"batch {SHAPE.batch_size}; head 512-512-128, "
    "1024 prototypes; U-Net mask designer (base 8, depth 2: designer=unet)",
    "feedback": f"depth and {NUM_CLASSES} classes on {SHAPE.batch_size} frames of "
    f"{SHAPE.size}x{SHAPE.size}",
}


@dataclass(frozen=True)
class Backprop:
    """The reference: backprop through the graph of all steps of the learner's optimizer."""

    num_batches: int
    needs_update = True

    def __call__(
        self,
        inner_losses: Sequence[InnerLoss],
        outer_loss: OuterLoss,
        theta: Params,
        phi: Params,
        *,
        update: Update,
        start: Any = None,
    ) -> Hypergradient:
        phi, after, state = params.leaves(phi), params.leaves(theta), update.state
        with sdpa_kernel(SDPBackend.MATH):
            for inner in inner_losses:
                gradients = torch.autograd.grad(
                    inner(phi)(after), list(after.values()), create_graph=True
                )
                after, state = update.rule.step(
                    after, state, dict(zip(after, gradients, strict=True))
                )
            return backpropagated(outer_loss, theta, after, phi, self.num_batches)


@dataclass(frozen=True)
class Call:
    """What a row times, and its floating-point operations."""

    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def figures(self) -> dict[str, float]:
        return {"flops": flops.count(self.run)}


def plain_step(shape: Shape) -> Callable[[], Callable[[], None]]:
    return lambda: Call(Bench(Vision(shape)).plain_step)


def estimator(
    make: Callable[[], Estimator], problem: type[Vision] = Vision, shape: Shape = SHAPE
) -> Callable[[], Callable[[], None]]:
    def prepare() -> Call:
        bench, strategy = Bench(problem(shape)), Learned(make())
        return Call(lambda: bench.update(strategy))

    return prepare


def with_step(shape: Shape) -> Callable[[], Callable[[], None]]:
    def prepare() -> Call:
        bench, strategy = Bench(Vision(shape)), Learned(OneStep(), own_batch=True)
        return Call(lambda: bench.update_and_step(strategy))

    return prepare


ROWS = {
    "plain": Row("plain SSL step", plain_step(SHAPE)),
    "one_step_difference": Row("OneStep, difference", estimator(OneStep)),
    "one_step_own": Row("OneStep, difference, own batch + plain SSL step", with_step(SHAPE)),
    "one_step_exact": Row("OneStep, exact", estimator(lambda: OneStep(product=ExactProduct()))),
    "unrolled_1": Row("Unrolled(1)", estimator(lambda: Unrolled(1))),
    "unrolled_4": Row("Unrolled(4)", estimator(lambda: Unrolled(4))),
    "unrolled_4_two_kept": Row(
        "Unrolled(4), two graphs kept", estimator(lambda: Unrolled(4, kept_graphs=2))
    ),
    "unrolled_4_kept": Row(
        "Unrolled(4), all graphs kept", estimator(lambda: Unrolled(4, kept_graphs=4))
    ),
    "unrolled_16": Row("Unrolled(16)", estimator(lambda: Unrolled(16))),
    "unrolled_32": Row("Unrolled(32)", estimator(lambda: Unrolled(32))),
    "implicit": Row(
        "Implicit, as shipped",
        estimator(lambda: Implicit(DampedLanczos(5, 0.3), damping=0.0, curvature=GaussNewton())),
    ),
    "greedy_8": Row(
        "Greedy(8), one batch", lambda: (lambda bench: lambda: bench.score(8))(Bench(Vision(SHAPE)))
    ),
    "naive_double_backward": Row(
        "double backward, all parameters",
        estimator(lambda: OneStep(product=ExactProduct()), WholeNetwork),
    ),
    "backprop_4": Row("backprop through the unroll, K = 4", estimator(lambda: Backprop(4))),
    "betty_darts": Row("Betty darts", estimator(betty.Darts)),
    "betty_cg_5": Row(
        "Betty cg, 5 iterations", estimator(lambda: betty.ConjugateGradient(cg_iterations=5))
    ),
    "torchopt_1": Row("TorchOpt AdamW unroll, K = 1", estimator(lambda: TorchOptUnroll(1))),
    "torchopt_4": Row("TorchOpt AdamW unroll, K = 4", estimator(lambda: TorchOptUnroll(4))),
    "torchopt_16": Row("TorchOpt AdamW unroll, K = 16", estimator(lambda: TorchOptUnroll(16))),
    "plain_paper": Row(f"{PAPER.title}: plain SSL step", plain_step(PAPER)),
    "one_step_paper": Row(f"{PAPER.title}: OneStep, difference", estimator(OneStep, shape=PAPER)),
    "one_step_own_paper": Row(
        f"{PAPER.title}: OneStep, difference, own batch + plain SSL step", with_step(PAPER)
    ),
    "learn2learn_4": Row("learn2learn SGD unroll, K = 4", estimator(lambda: MAMLUnroll(4, 1e-4))),
}

TARGETS = [
    Target("seconds", "one_step_difference", "plain", 0.9),
    Target("seconds", "one_step_own", "plain", 1.9),
    Target("seconds", "one_step_difference", "betty_darts", 0.65),
    Target("peak_mib", "one_step_difference", "plain", 1.1),
    Target("peak_mib", "unrolled_32", "unrolled_1", 1.5),
    Target("seconds", "unrolled_4", "backprop_4", 1.1),
    Target("peak_mib", "unrolled_4", "backprop_4", 0.5),
    Target("seconds", "unrolled_4_two_kept", "backprop_4", 1.15),
    Target("grown_mib", "unrolled_4_two_kept", "backprop_4", 0.5),
    Target("seconds", "unrolled_4_kept", "backprop_4", 1.1),
    Target("seconds", "greedy_8", "plain", 8 * 0.6),
]


def section(report: dict[str, Any]) -> list[str]:
    environment, measured = report["environment"], report["rows"]
    setting, plain = environment["setting"], measured.get("plain", {})
    lines = [
        "## One designer update",
        "",
        f"{setting['vit']}. {setting['task']}. Feedback: {setting['feedback']}.",
        "",
        machine(environment),
        "",
        "Memory is the peak resident size of the whole process, Python and PyTorch included. "
        "All estimators take the same closures over S. "
        "Betty sees one loss and runs the trunk with every evaluation; all others run it once a "
        "batch. "
        "FLOPs are those of matrix products, convolutions and attention in one call; on one "
        "machine they do not vary.",
        "",
        "| | seconds | x plain | peak MiB | x plain | GFLOPs | x plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in measured.items():
        found = (
            [f"did not run: {row['error']}", "", "", ""] if "error" in row else cells(row, plain)
        )
        counted = ["", ""]
        if "flops" in row and "flops" in plain:
            counted = [f"{row['flops'] / 1e9:.0f}", f"{row['flops'] / plain['flops']:.2f}"]
        lines.append(f"| {ROWS[name].title} | {' | '.join([*found, *counted])} |")
    return [*lines, "", *verdicts(TARGETS, measured, ROWS)]


PART = Part(
    "designer_update",
    ROWS,
    default=[name for name in ROWS if not name.endswith("_paper")],
    rounds=5,
    packages=("torch", "timm", "numpy", "torchopt", "betty-ml", "learn2learn"),
    setting=SETTING,
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
