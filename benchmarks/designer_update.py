"""Time and peak memory of one designer update, ours beside a plain step and beside other packages: `make bench`, part 1.

    python benchmarks/designer_update.py [--rounds 5] [--threads 2] [--rows plain one_step_difference ...]

Writes benchmarks/results/designer_update.json and the table in docs/benchmarks.md.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rounds import Part, Row, Target, cells, machine, verdicts
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt import params
from metavpt.budget import Budget
from metavpt.designers.masks import MaskDesigner, UNet
from metavpt.designers.views import Views
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


ROWS = {
    "plain": Row("plain SSL step", lambda: Bench(Vision()).plain_step),
    "one_step_difference": Row("OneStep, difference", estimator(OneStep)),
    "one_step_exact": Row("OneStep, exact", estimator(lambda: OneStep(product=ExactProduct()))),
    "unrolled_1": Row("Unrolled(1)", estimator(lambda: Unrolled(1))),
    "unrolled_4": Row("Unrolled(4)", estimator(lambda: Unrolled(4))),
    "unrolled_4_kept": Row("Unrolled(4), all graphs kept", estimator(lambda: Unrolled(4, kept_graphs=4))),
    "unrolled_16": Row("Unrolled(16)", estimator(lambda: Unrolled(16))),
    "unrolled_32": Row("Unrolled(32)", estimator(lambda: Unrolled(32))),
    "implicit_cg_5": Row("Implicit(CG 5)", estimator(lambda: Implicit(ConjugateGradient(5, 1e-12), damping=1e-2))),
    "greedy_8": Row("Greedy(8), one batch", lambda: (lambda bench: lambda: bench.score(8))(Bench(Vision()))),
    "naive_double_backward": Row("double backward, all parameters", estimator(lambda: OneStep(product=ExactProduct()), WholeNetwork)),
    "backprop_4": Row("backprop through the unroll, K = 4", estimator(lambda: Backprop(4))),
    "betty_darts": Row("Betty darts", estimator(betty.Darts)),
    "betty_cg_5": Row("Betty cg, 5 iterations", estimator(lambda: betty.ConjugateGradient(cg_iterations=5))),
    "torchopt_1": Row("TorchOpt AdamW unroll, K = 1", estimator(lambda: TorchOptUnroll(1))),
    "torchopt_4": Row("TorchOpt AdamW unroll, K = 4", estimator(lambda: TorchOptUnroll(4))),
    "torchopt_16": Row("TorchOpt AdamW unroll, K = 16", estimator(lambda: TorchOptUnroll(16))),
    "learn2learn_4": Row("learn2learn SGD unroll, K = 4", estimator(lambda: MAMLUnroll(4, 1e-4))),
}

TARGETS = [
    Target("seconds", "one_step_difference", "plain", 0.9),
    Target("seconds", "one_step_difference", "betty_darts", 0.65),
    Target("peak_mib", "one_step_difference", "plain", 1.1),
    Target("peak_mib", "unrolled_32", "unrolled_1", 1.5),
    Target("seconds", "unrolled_4", "backprop_4", 1.1),
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
        "Memory is the peak resident size of the whole process, Python and PyTorch included. All estimators take the same closures over S. "
        "Betty sees one loss and runs the trunk with every evaluation; all others run it once a batch.",
        "",
        "| | seconds | x plain | peak MiB | x plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in measured.items():
        found = [f"did not run: {row['error']}", "", "", ""] if "error" in row else cells(row, plain)
        lines.append(f"| {ROWS[name].title} | {' | '.join(found)} |")
    return [*lines, "", *verdicts(TARGETS, measured, ROWS)]


PART = Part(
    "designer_update",
    ROWS,
    default=list(ROWS),
    rounds=5,
    packages=("torch", "timm", "numpy", "torchopt", "betty-ml", "learn2learn"),
    setting=SETTING,
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
