"""Throughput and memory of whole training beside a hand-written loop: `make bench`, part 3.

    python benchmarks/steady.py [--rounds 2] [--threads 2] [--rows vit/plain vit/one_step_8 ...]
    python benchmarks/steady.py --print --rounds 1 --rows tiny_vit/plain    a quick look

Writes benchmarks/results/steady.json and its section of docs/benchmarks.md. Rows of a GPU are
measured where there is one.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from language import SIZES, Language, Size, tokens
from rounds import Part, Row, Target, cells, machine, on_gpu, verdicts
from vision import Shape, Vision, tiny

from metavpt.bench import flops, step_profile
from metavpt.errors import MetaVPTError
from metavpt.hypergradients.estimators import Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import ConjugateGradient
from metavpt.problem import Problem
from metavpt.strategies.fixed import Fixed
from metavpt.strategies.learned import Learned
from metavpt.strategies.selection import Greedy, GreedySelection
from metavpt.training.budget import Budget
from metavpt.training.run_log import RunLog
from metavpt.training.strategy import Strategy
from metavpt.training.trainer import Trainer

CYCLE = 8  # steps; every strategy comes round within them
USES = 4  # updates that use one g_down, in the row that keeps it
STEERED = (
    "one_step_8",
    "states",
    "states_kept",
)  # rows that are held to the targets of steering; not all settings have all
MAX_OVER_BOUND, MIN_UTILISATION = 1.2, 0.4


SMALLEST = Shape(
    "ViT, 3 blocks, batch 4",
    "vit_tiny_dinov3",
    {"depth": 3, "embed_dim": 48, "num_heads": 3},
    size=16,
    batch_size=4,
    num_prototypes=64,
    hidden=32,
    bottleneck=16,
)


class Setting(NamedTuple):
    """A learner with its batches: a `Shape` of images, or a `Size` of tokens."""

    of: Shape | Size
    device: str = "cpu"

    @property
    def unit(self) -> str:
        return "images/s" if isinstance(self.of, Shape) else "tokens/s"

    @property
    def samples(self) -> int:
        return self.of.batch_size * (1 if isinstance(self.of, Shape) else self.of.length)

    def problem(self) -> Problem:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MetaVPTError("there is no GPU here")
        return (
            Vision(self.of, self.device, targets="centering")
            if isinstance(self.of, Shape)
            else Tokens(self.of)
        )

    def around(self) -> AbstractContextManager[Any]:
        """Images on a GPU in bfloat16 by autocast; the language model is bfloat16 itself."""
        mixed = self.device == "cuda" and isinstance(self.of, Shape)
        return torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()


def gpu_vit(name: str, batch_size: int) -> Setting:
    head = {"num_prototypes": 8192, "hidden": 2048, "bottleneck": 256}
    title = f"DINOv3 ViT-{name[0].upper()}, batch {batch_size} of 224x224, GPU, bf16"
    return Setting(Shape(title, f"vit_{name}_patch16_dinov3", {}, 224, batch_size, **head), "cuda")


SETTINGS = {
    "tiny_vit": Setting(SMALLEST),
    "tiny_lm": Setting(SIZES["tiny"]),
    "vit": Setting(tiny(16)),
    "lm": Setting(SIZES["5m"]),
    **{
        f"vit_{name[0]}_{size}": gpu_vit(name, size)
        for name in ("small", "base")
        for size in (64, 128, 256)
    },
    "lm_135m": Setting(SIZES["135m"], "cuda"),
}
ON_GPU = [name for name, setting in SETTINGS.items() if setting.device == "cuda"]


class Tokens(Language):
    """Endless random tokens; meta batch and feedback a quarter of a batch each."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.size = size

    def pretrain_batches(self, seed: int) -> Iterator[Any]:
        return itertools.cycle([tokens(self.size, self.size.batch_size, seed)])

    def meta_batches(self, seed: int) -> Iterator[Any]:
        return itertools.cycle([tokens(self.size, max(self.size.batch_size // 4, 1), seed)])

    def feedback_batches(self, seed: int) -> Iterator[Any]:
        return itertools.cycle(
            [{"answers": tokens(self.size, max(self.size.batch_size // 4, 1), seed)}]
        )


def adamw(setting: Setting) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=1e-4, weight_decay=0.04, fused=setting.device == "cuda"
    )


def compiled(problem: Any) -> None:
    """Trunk and tail, of the teacher too; FLOPs are counted before."""
    learner = problem.learner
    parts = [getattr(learner, "backbone", learner)]
    parts += [problem.teacher.learner.backbone] if hasattr(problem, "teacher") else []
    for part in parts:
        part.trunk.compile()
        part.tail.compile()


class Training:
    """The shipped trainer, a step a call."""

    def __init__(self, setting: Setting, strategy: Strategy) -> None:
        self.setting = setting
        folder = tempfile.TemporaryDirectory(prefix="metavpt-bench-")
        self.folder = folder  # as long as this lives
        self.trainer = Trainer(
            setting.problem(),
            strategy,
            Budget(steps=10**9),
            RunLog(Path(folder.name)),
            optimizer=adamw(setting),
        )
        self.flops = None
        if setting.device == "cuda":
            with setting.around():
                self.flops = flops.count(self.trainer.step)
            self.trainer.budget.steps = 0  # the next step is the first again
            compiled(self.trainer.problem)
            torch.cuda.reset_peak_memory_stats()  # the counted step was not compiled

    def __call__(self) -> None:
        with self.setting.around():
            self.trainer.step()

    def figures(self) -> dict[str, float]:
        with self.setting.around():
            bound = step_profile.lower_bound(self.trainer, step_profile.synchronized)
        found = {} if bound is None else {"lower_bound": bound.seconds}
        return found if self.flops is None else {**found, "flops": self.flops}


class HandWrittenDINO:
    """A minimal loop for this model and data: forward, backward, clip, AdamW, EMA, centre."""

    def __init__(self, setting: Setting) -> None:
        problem: Any = setting.problem()
        self.around, self.batches = setting.around, problem.pretrain_batches(0)
        self.student, self.teacher = (
            problem.learner,
            copy.deepcopy(problem.learner).requires_grad_(False),
        )
        self.optimizer = adamw(setting)(self.student.parameters())
        self.center = torch.zeros(problem.num_prototypes, device=setting.device)
        self.weights = list(self.teacher.parameters()), list(self.student.parameters())
        if setting.device == "cuda":
            for model in (self.student, self.teacher):
                model.backbone.compile()

    def __call__(self) -> None:
        with self.around():
            crops = (next(self.batches).images / 255).flatten(0, 1)
            with torch.no_grad():
                answers = self.teacher(crops)
            first, second = ((answers - self.center) / 0.04).softmax(dim=-1).chunk(2)
            own_first, own_second = (self.student(crops) / 0.1).log_softmax(dim=-1).chunk(2)
            loss = (
                -((first * own_second).sum(dim=-1).mean() + (second * own_first).sum(dim=-1).mean())
                / 2
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights[1], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.center.lerp_(answers.float().mean(dim=0), 0.1)
            torch._foreach_lerp_(*self.weights, 0.004)


class HandWrittenLM:
    """Forward, cross-entropy, backward, clip, AdamW."""

    def __init__(self, setting: Setting) -> None:
        problem: Any = setting.problem()
        self.model, self.batches = problem.learner, problem.pretrain_batches(0)
        self.optimizer = adamw(setting)(self.model.parameters())
        if setting.device == "cuda":
            compiled(problem)

    def __call__(self) -> None:
        batch = next(self.batches)
        asked = batch.loss_mask[:, 1:]
        logits = self.model(batch)[:, :-1][asked] @ self.model.unembedding({}).T
        F.cross_entropy(logits.float(), batch.tokens[:, 1:][asked]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rows_of(name: str, setting: Setting) -> dict[str, Row]:
    text = isinstance(setting.of, Size)
    one_step = OneStep(product=setting.of.linear) if isinstance(setting.of, Size) else OneStep()
    strategies: dict[str, tuple[str, Callable[[], Strategy]]] = {
        "plain": ("plain", Fixed),
        "one_step_8": ("one_step, meta every 8", lambda: Learned(one_step, every=8)),
        "one_step_4": ("one_step, meta every 4", lambda: Learned(one_step, every=4)),
        "unrolled": ("unrolled(4) every 8", lambda: Learned(Unrolled(4), every=8)),
        "implicit": (
            "implicit(CG 5) every 8",
            lambda: Learned(Implicit(ConjugateGradient(5, 1e-12), damping=1e-2), every=8),
        ),
        "greedy": ("greedy, the best rows of 4 batches", lambda: GreedySelection(4))
        if text
        else ("greedy(4)", lambda: Greedy(4)),
    }
    steps = {"cycle": CYCLE, "least": 1, "most": 1 if setting.device == "cpu" else 5}
    hand = HandWrittenLM if text else HandWrittenDINO
    rows = {"hand": Row("hand-written loop", lambda: hand(setting), **steps)}
    for kind, (title, make) in strategies.items():
        rows[kind] = Row(title, lambda make=make: Training(setting, make()), **steps)
    if isinstance(
        setting.of, Size
    ):  # the designer that costs least, with few candidates to find and to score
        light, (title, make) = (
            setting._replace(of=setting.of._replace(designer=None, num_candidates=8)),
            strategies["one_step_8"],
        )
        title = f"{title}, designer=states, K = 8"
        rows["states"] = Row(title, lambda: Training(light, make()), **steps)
        rows["states_kept"] = Row(
            f"{title}, a g_down for {USES} updates",
            lambda: Training(light, Learned(one_step, every=8, feedback_every=USES)),
            **{**steps, "cycle": USES * CYCLE},
        )
    return {
        f"{name}/{kind}": row._replace(title=f"{setting.of.title}: {row.title}")
        for kind, row in rows.items()
    }


ROWS = {
    row: value
    for name, setting in SETTINGS.items()
    for row, value in rows_of(name, setting).items()
}
TARGETS = [
    target
    for name in SETTINGS
    for target in (
        *(
            Target("seconds", f"{name}/{kind}", f"{name}/plain", round(1 / 0.95, 3))
            for kind in STEERED
        ),  # 5 % of the throughput
        *(Target("peak_mib", f"{name}/{kind}", f"{name}/plain", 1.05) for kind in STEERED),
        Target("seconds", f"{name}/plain", f"{name}/hand", round(1 / 0.9, 3)),
    )
]


def line(name: str, measured: dict[str, Any], gpu: str | None) -> str:
    """Format a row: throughput, seconds, memory, lower bound and, on a GPU, FLOPs utilisation."""
    size, kind = name.split("/")
    row, setting = measured[name], SETTINGS[size]
    if "error" in row:
        return f"| {ROWS[name].title} | did not run: {row['error']} |" + " |" * 6
    speed = f"{setting.samples / row['seconds']:,.4g} {setting.unit}"
    over = (
        f"{row['lower_bound']:.3f} | {row['seconds'] / row['lower_bound']:.2f}"
        if "lower_bound" in row
        else " | "
    )
    share = (
        flops.utilisation(row["flops"], row["seconds"], gpu)
        if "flops" in row and kind == "plain"
        else None
    )
    busy = "" if share is None else f"{share:.1%}"
    ratios = " | ".join(cells(row, measured.get(f"{size}/plain", {})))
    return f"| {ROWS[name].title} | {speed} | {ratios} | {over} | {busy} |"


def over_bound(measured: dict[str, Any], gpu: str | None) -> list[str]:
    """Verdicts that are no ratio of two rows."""
    found = []
    for name, row in measured.items():
        if "lower_bound" in row and name.split("/")[1] in ("plain", *STEERED):
            ratio = row["seconds"] / row["lower_bound"]
            verdict = "met" if ratio <= MAX_OVER_BOUND else "**not met**"
            bound = f"measured / lower bound of {ROWS[name].title} <= {MAX_OVER_BOUND}"
            found.append(f"| {bound} | {ratio:.2f} | {verdict} |")
        share = flops.utilisation(row["flops"], row["seconds"], gpu) if "flops" in row else None
        if share is not None and name.startswith("vit_b_") and name.endswith("/plain"):
            verdict = "met" if share >= MIN_UTILISATION else "**not met**"
            title = f"model FLOPs utilisation of {ROWS[name].title}"
            found.append(f"| {title} >= {MIN_UTILISATION:.0%} | {share:.1%} | {verdict} |")
    return found


def section(report: dict[str, Any]) -> list[str]:
    environment, other = report["environment"], on_gpu("steady")
    measured, gpu = {**report["rows"], **other.rows}, environment["gpu"] or other.card
    lines = [
        "## Steady state: plain and steered training",
        "",
        ". ".join(environment["setting"].values()) + ".",
        "",
    ]
    lines += [
        machine(environment) + (f" GPU: {environment['gpu']}." if environment["gpu"] else ""),
        *([other.sentence] if other.sentence else []),
        "",
        "Every row but the hand-written loop is the shipped trainer. "
        f"Steps are means over {CYCLE}, or {USES * CYCLE} where a g_down is kept. "
        "Memory on a CPU is the peak resident size of the whole process, Python and PyTorch "
        "included; on a GPU that of its allocations. "
        "The lower bound is what the forward and "
        "backward passes that the method cannot avoid take alone, each timed by itself in the "
        "process (`metavpt/bench/cost_model.py` counts them); "
        "optimizer, EMA, clipping and arithmetic on parameters are above it.",
        "",
        "| | throughput | seconds | x plain | peak MiB | x plain | lower bound, s "
        "| measured / lower bound | FLOPs utilisation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [line(name, measured, gpu) for name in measured]
    missing = [name for name in ON_GPU if not any(row.startswith(f"{name}/") for row in measured)]
    lines += [
        f"| {SETTINGS[name].of.title} | not measured: there was no GPU |" + " |" * 7
        for name in missing
    ]
    return [
        *lines,
        "",
        *verdicts(TARGETS, measured, ROWS),
        *over_bound(measured, gpu),
    ]


PART = Part(
    "steady",
    ROWS,
    default=[
        row
        for row in ROWS
        if row.split("/")[0] in ("vit", "lm", *(ON_GPU if torch.cuda.is_available() else []))
    ],
    rounds=2,
    packages=("torch", "timm", "transformers"),
    setting={
        "vision": "DINO with centring, 2 global crops, no local crops; ViT-Ti: 12 blocks of "
        "width 192, patch 8, 64x64, head 512-512-128, "
        "1024 prototypes; S = last 2 blocks and final norm; U-Net mask designer (base 8, depth 2)",
        "language": "Llama with random weights, S = last 2 layers and final norm; "
        "one_step takes the linear product",
        "batches": "Random pixels and tokens, made beforehand; "
        "meta batch and feedback a quarter of a batch each",
    },
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
