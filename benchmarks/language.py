"""Throughput and memory of next-token pretraining, plain and steered: `make bench`, part 2.

    python benchmarks/language.py [--rounds 2] [--threads 2] [--rows 5m/plain 5m/v ...]
    python benchmarks/language.py --print --rounds 1 --rows tiny/plain    a quick look

Writes benchmarks/results/language.json and its section of docs/benchmarks.md. Rows of a GPU are
measured where there is one. Part of it is the cost of the linear value update.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rounds import Part, Row, Target, cells, machine, on_gpu, verdicts

from metavpt.data.tokens import TokenBatch
from metavpt.designers.states import StateDesigner
from metavpt.designers.targets import TargetDesigner
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import OneStep, downstream
from metavpt.hypergradients.linear_targets import CentralDifference, ForwardMode, LinearProduct
from metavpt.hypergradients.mixed_products import ExactProduct, Product
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.learners.tokenized import TokenizedModel
from metavpt.objectives.next_token import NextTokenLoss, score
from metavpt.objectives.prediction import Prediction
from metavpt.problems.lm_gsm8k import LMGSM8K, state_designer, target_designer
from metavpt.strategies.fixed import Fixed
from metavpt.strategies.learned import Learned, feedback_on, inner_loss
from metavpt.training.budget import Budget
from metavpt.training.strategy import Strategy, TrainState
from metavpt.training.streams import Streams

META_EVERY, DOCUMENTS = 8, 2


class Size(NamedTuple):
    """A learner, its batches and its designer. Meta and feedback batches are a quarter as large."""

    title: str
    vocab_size: int
    width: int
    mlp: int
    num_layers: int
    heads: tuple[int, int]  # of queries, of keys and values
    batch_size: int
    length: int
    designer: tuple[int, int, int] | None = (
        128,
        2,
        4,
    )  # width, layers, heads of designer=targets; None: designer=states
    num_candidates: int = 64
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def linear(self) -> Product:
        """As strategy=one_step_linear has it; in half precision a difference has too few digits."""
        return LinearProduct(
            CentralDifference() if self.dtype == torch.float32 else ForwardMode(), absolute=False
        )


SIZES = {
    "tiny": Size("0.2 M, CPU", 256, 64, 160, 3, (2, 2), 4, 32),
    "5m": Size("5 M, CPU", 4096, 192, 512, 10, (3, 3), 4, 256),
    "20m": Size("20 M, CPU", 4096, 384, 1024, 12, (6, 6), 4, 256),
    "135m": Size(
        "135 M, GPU, bf16",
        49152,
        576,
        1536,
        30,
        (9, 3),
        16,
        512,
        (256, 6, 4),
        64,
        "cuda",
        torch.bfloat16,
    ),
}
SHAPES = [
    f"{s.title}: {s.num_layers} layers, width {s.width}, vocabulary {s.vocab_size}, "
    f"batch {s.batch_size} x {s.length}"
    for s in SIZES.values()
]
SETTING = {
    "learner": "Llama with random weights and tied embeddings, deep and thin as SmolLM2: "
    + "; ".join(SHAPES[1:]),
    "v": f"V: every {META_EVERY}, S = last 2 layers and final norm, "
    f"K = {SIZES['20m'].num_candidates}, meta batch and feedback "
    "a quarter of a batch each; designer 2 layers of width 128 (GPU: 6 of 256)",
    "tokens": f"Random tokens, {DOCUMENTS} documents a row, all predicted but their first",
}


class Language(LMGSM8K):
    """The shipped problem on random tokens, without reading and tokenising text."""

    def __init__(self, size: Size) -> None:
        if size.device == "cuda" and not torch.cuda.is_available():
            raise MetaVPTError("there is no GPU here")
        data = SimpleNamespace(
            problems={}, general={}, feedback={"answers": None}, encoder=None, domains=[]
        )
        super().__init__(
            lambda learner: _designer(learner, size),
            learner=lambda texts: TokenizedModel(_learner(size), None),
            data=SimpleNamespace(texts=lambda: (), encode=lambda tokenizer, length: data),
            generator=lambda encoder: None,
            length=size.length,
            batch_size=size.batch_size,
        )
        self.learner.to(size.device, size.dtype)
        self.designer.to(size.device)


def _designer(learner: LanguageModel, size: Size) -> StateDesigner | TargetDesigner:
    """Return a designer as after some training, with open gates and different scores."""
    if size.designer is None:
        designer = state_designer(learner, num_candidates=size.num_candidates)
        torch.nn.init.normal_(designer.moves.weight, std=0.02)
        return designer
    designer = target_designer(learner, *size.designer, num_candidates=size.num_candidates)
    torch.nn.init.normal_(designer.vectors.weight, std=0.02)
    torch.nn.init.constant_(designer.gate.bias, 0.5)
    return designer


def _learner(size: Size) -> Any:
    return random_language_model(
        "llama",
        tail_layers=2,
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.heads[0],
        num_key_value_heads=size.heads[1],
        max_position_embeddings=2 * size.length,
        tie_word_embeddings=True,
    )


def tokens(size: Size, num_rows: int, seed: int) -> TokenBatch:
    shape, length = (num_rows, size.length), size.length // DOCUMENTS
    drawn = torch.randint(size.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    positions, documents = (
        (of(torch.arange(size.length), length)).expand(shape).clone()
        for of in (torch.remainder, torch.floor_divide)
    )
    return TokenBatch(
        drawn, positions, documents, positions > 0, seed, torch.zeros(num_rows, dtype=torch.int64)
    ).to(size.device)


class Bench:
    """A training loop, a step a call: what `Trainer.step` does, short of the log."""

    def __init__(self, size: Size, strategy: Strategy) -> None:
        self.problem, self.strategy, self.budget = Language(size), strategy, Budget(steps=10**9)
        quarter = max(size.batch_size // 4, 1)
        self.batch = tokens(size, size.batch_size, 0)
        self.streams = Streams(
            *(
                itertools.cycle([batch])
                for batch in (
                    self.batch,
                    tokens(size, quarter, 1),
                    {"answers": tokens(size, quarter, 2)},
                )
            )
        )
        self.optimizer = torch.optim.AdamW(self.problem.learner.parameters(), lr=1e-4)
        strategy.start(self.problem)

    @property
    def state(self) -> TrainState:
        return TrainState(self.problem, self.streams, self.optimizer, self.budget)

    def step(self) -> None:
        proposal = self.strategy.next_task(self.state)
        theta = params.named(self.problem.learner)
        self.problem.pretrain_loss(theta, proposal.task).backward()
        torch.nn.utils.clip_grad_norm_(theta.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.budget.charge(steps=1)


def training(size: Size, product: Product | None) -> Callable[[], Callable[[], None]]:
    """`product` None: plain."""
    return lambda: (
        Bench(
            size,
            Fixed() if product is None else Learned(OneStep(product=product), every=META_EVERY),
        ).step
    )


def feedback_gradient(size: Size) -> Callable[[], Any]:
    """g_down, on as much feedback as V takes."""
    bench = Bench(size, Fixed())
    feedback = feedback_on(bench.problem, next(bench.streams.feedback))
    return lambda: downstream(feedback.loss, feedback.aligned)


def value_update(size: Size) -> Callable[[], Any]:
    """The designer's gradient for a given w on a whole plain batch, with the forward pass."""
    bench = Bench(size, Fixed())
    feedback = feedback_on(bench.problem, next(bench.streams.feedback))
    w, phi = downstream(feedback.loss, feedback.aligned)[1], params.named(bench.problem.designer)
    inner = inner_loss(bench.problem, feedback.theta, bench.batch)
    return lambda: size.linear(inner(phi), feedback.aligned, w, (phi,))


def linear_update(size: Size) -> Callable[[], None]:
    """The same after the trunk has run: designer forward, slopes through the tail, backward."""
    bench = Bench(size, Fixed())
    designer, feedback = (
        bench.problem.designer,
        feedback_on(bench.problem, next(bench.streams.feedback)),
    )
    w, phi = downstream(feedback.loss, feedback.aligned)[1], params.named(designer)
    prediction = Prediction.of(bench.problem.learner, feedback.theta, bench.batch)
    scores = score(
        prediction.states, prediction.unembedding, prediction.tokens, size.num_candidates
    )

    def call() -> None:
        rule = designer(bench.batch).targets.rule(prediction)
        targets = rule(scores.log_probs, scores.candidates, slice(None))
        loss = NextTokenLoss(prediction.at, prediction.unembedding, scores.candidates, targets)
        size.linear(loss, feedback.aligned, w, (phi,))

    return call


def rows_of(name: str, size: Size) -> dict[str, Row]:
    steps = {"cycle": META_EVERY, "least": 1}
    rows = {
        "plain": Row("plain step", training(size, None), **steps),
        "v": Row("step of V, linear product", training(size, size.linear), **steps),
        "v_exact": Row("step of V, double backward", training(size, ExactProduct()), **steps),
        "linear_update": Row("linear value update alone, same tokens", lambda: linear_update(size)),
        "value_update": Row(
            "the same with the learner's forward pass and candidates", lambda: value_update(size)
        ),
        "g_down": Row(
            "feedback gradient, a quarter of the tokens", lambda: feedback_gradient(size)
        ),
    }
    return {
        f"{name}/{row}": value._replace(title=f"{size.title}: {value.title}")
        for row, value in rows.items()
    }


ROWS = {row: value for name, size in SIZES.items() for row, value in rows_of(name, size).items()}
TARGETS = [
    target
    for name in SIZES
    for target in (
        Target(
            "seconds", f"{name}/v", f"{name}/plain", round(1 / 0.95, 3)
        ),  # 5 % of the throughput
        Target("peak_mib", f"{name}/v", f"{name}/plain", 1.05),
        Target("seconds", f"{name}/linear_update", f"{name}/plain", 0.35),
    )
]


def section(report: dict[str, Any]) -> list[str]:
    environment, other = report["environment"], on_gpu("language")
    measured = {**report["rows"], **other.rows}
    lines = [
        "## Language: plain and steered",
        "",
        ". ".join(environment["setting"].values()) + ".",
        "",
    ]
    lines += [
        machine(environment),
        *([other.sentence] if other.sentence else []),
        "",
        f"Steps are means over {META_EVERY}, one of them with a designer update. Memory on a CPU "
        "is the peak resident size of the whole "
        "process, Python and PyTorch included; on a GPU that of its allocations. The linear value "
        "update alone is, given the feedback "
        "gradient and the learner's candidates, all that makes the designer's gradient: "
        "the derivative of the candidates' "
        "log-probabilities along it, through the tail, and the designer forward and backward.",
        "",
        "| | tokens/s | seconds | x plain | peak MiB | x plain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in measured.items():
        size, kind = name.split("/")
        found = (
            [f"did not run: {row['error']}", "", "", ""]
            if "error" in row
            else cells(row, measured.get(f"{size}/plain", {}))
        )
        speed = (
            SIZES[size].batch_size * SIZES[size].length / row["seconds"]
            if "seconds" in row and kind in ("plain", "v", "v_exact")
            else None
        )
        shown = "" if speed is None else f"{speed:,.0f}"
        lines.append(f"| {ROWS[name].title} | {shown} | {' | '.join(found)} |")
    if not any(name.startswith("135m/") for name in measured):
        lines.append(f"| {SIZES['135m'].title} | not measured: there was no GPU | | | | |")
    return [*lines, "", *verdicts(TARGETS, measured, ROWS)]


PART = Part(
    "language",
    ROWS,
    default=[
        row
        for row in ROWS
        if row.split("/")[0] in ("5m", "20m", *(["135m"] if torch.cuda.is_available() else []))
    ],
    rounds=2,
    packages=("torch", "transformers"),
    setting=SETTING,
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
