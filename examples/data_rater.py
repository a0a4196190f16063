"""Rate the samples of a noisy stream by meta-gradients, and train on the best (DataRater).

    OMP_NUM_THREADS=1 python examples/data_rater.py OUT
    OMP_NUM_THREADS=1 python examples/data_rater.py OUT --text wikitext2_valid.txt

A rater weighs the samples of a batch, B * softmax(rating): the rule of `designer=selection` and of
`designer=token_weights` with per=row. Its hypergradient goes through four Adam steps of a learner
to the loss on a few clean samples (arXiv 2505.17895). Each learner starts anew after some steps.
Then a fresh learner trains on the samples with the highest ratings, beside one that takes all
(`uniform`), the samples of lowest loss under a reference model (`perplexity`: trained on the
stream; `reference`: on the clean samples), those of highest first-order value (`greedy`),
and those that are truly clean (`oracle`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metavpt import Unrolled, hypergradient, named
from metavpt.designers.encoder import ImageEncoder, zero_linear
from metavpt.designers.selection import balanced
from metavpt.hypergradients.mixed_products import central_difference, value_and_gradient

BATCH, POOL_SEED = 32, 1000


@dataclass(frozen=True)
class Stream:
    """Samples, some of them corrupted, with what learns from them.

    Args:
        samples: Of the stream, (N, ...).
        is_clean: Which of them are, bool (N,).
        feedback: A few clean samples that the rater may see.
        test: Clean samples to measure the loss on.
        learner: Makes a fresh learner: samples -> loss of each, (B,).
        rater: Makes a fresh rater: samples -> rating of each, (B,).
    """

    samples: Tensor
    is_clean: Tensor
    feedback: Tensor
    test: Tensor
    learner: Callable[[], nn.Module]
    rater: Callable[[], nn.Module]

    def draw(self, num: int, rng: torch.Generator) -> Tensor:
        """Return the places of `num` samples."""
        return torch.randint(len(self.samples), (num,), generator=rng)


class CharacterModel(nn.Module):
    """The next character from the last eight: rows (B, T) -> mean loss of each (B,)."""

    def __init__(self, num_characters: int, width: int = 24, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, width)
        self.hidden = nn.Conv1d(width, hidden, kernel_size=8)
        self.out = nn.Linear(hidden, num_characters)

    def forward(self, rows: Tensor) -> Tensor:
        read = F.pad(self.embed(rows[:, :-1]).transpose(1, 2), (7, 0))
        logits = self.out(F.gelu(self.hidden(read)).transpose(1, 2))  # (B, T - 1, V)
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


class RowRater(nn.Module):
    """Rates rows by their characters and the pairs and triples among them; all alike at first."""

    def __init__(self, num_characters: int, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, width)
        self.read = nn.Conv1d(width, hidden, kernel_size=3)
        self.head = zero_linear(hidden, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        features = F.gelu(self.read(self.embed(rows).transpose(1, 2))).mean(2)
        return self.head(features)[:, 0]


class MaskedAutoencoder(nn.Module):
    """Fills in the half of the pixels that a pattern hides: images (B, 8, 8) -> losses (B,)."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 64),
        )  # fmt: skip
        hidden_pixels = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
        self.register_buffer("mask", torch.zeros(64).index_fill(0, hidden_pixels, 1.0))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        return ((self.layers(pixels * (1 - self.mask)) - pixels) ** 2 * self.mask).sum(1) / 32


class ImageRater(nn.Module):
    """The network of `designer=selection` on images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoder(width=32, depth=2, size=8)
        self.head = zero_linear(32, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images[:, None].expand(-1, 3, -1, -1)))[:, 0]


def text_stream(text: str, rate: float, seed: int, length: int = 48) -> Stream:
    """Rows of characters; in a corrupted one every second character is drawn from the text."""
    rng = torch.Generator().manual_seed(seed)
    common = [c for c, _ in sorted(count_of(text).items(), key=lambda each: -each[1])][:63]
    index = {character: k for k, character in enumerate(common)}
    encoded = torch.tensor([index.get(character, 63) for character in text])
    rows = encoded[: len(encoded) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=rng)]
    feedback, test, samples = rows[:128], rows[128:640], rows[640:].clone()
    is_clean = torch.rand(len(samples), generator=rng) >= rate
    noise = encoded[torch.randint(len(encoded), samples.shape, generator=rng)]
    replaced = (torch.rand(samples.shape, generator=rng) < 0.5) & ~is_clean[:, None]
    samples = torch.where(replaced, noise, samples)
    return Stream(
        samples, is_clean, feedback, test, lambda: CharacterModel(64), lambda: RowRater(64)
    )


def count_of(text: str) -> dict[str, int]:
    characters, counts = np.unique(list(text), return_counts=True)
    return dict(zip(characters.tolist(), counts.tolist(), strict=True))


def image_stream(rate: float, seed: int) -> Stream:
    """scikit-learn's digits; in a corrupted one the pixels are shuffled."""
    from sklearn.datasets import load_digits

    rng = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(load_digits().images).float() / 16
    images = images[torch.randperm(len(images), generator=rng)]
    feedback, test, samples = images[:128], images[128:528], images[528:]
    is_clean = torch.rand(len(samples), generator=rng) >= rate
    order = torch.rand(len(samples), 64, generator=rng).argsort(1)
    shuffled = samples.flatten(1).gather(1, order).view_as(samples)
    samples = torch.where(is_clean[:, None, None], samples, shuffled)
    return Stream(samples, is_clean, feedback, test, MaskedAutoencoder, ImageRater)


def adam(learner: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(learner.parameters(), lr=3e-3)


def train_rater(
    stream: Stream, seed: int, num_updates: int, lifetime: int = 20, num_steps: int = 4
) -> tuple[nn.Module, int]:
    """Train a rater by unrolled hypergradients.

    Args:
        stream: The stream; its `is_clean` is not used.
        seed: Of the batches.
        num_updates: Of the rater.
        lifetime: Updates after which the learner starts anew.
        num_steps: Steps of the learner that an update looks through, and that it takes.

    Returns:
        The rater, and how many gradients of a batch its training took.
    """
    rng = torch.Generator().manual_seed(seed)
    rater = stream.rater()
    optimizer = torch.optim.Adam(rater.parameters(), lr=1e-2)
    method = Unrolled(num_steps)
    num_gradients = 0
    for update in range(num_updates):
        if update % lifetime == 0:
            learner = stream.learner()
            steps = adam(learner)
        batches = [stream.samples[stream.draw(BATCH, rng)] for _ in range(num_steps)]
        chosen = torch.randint(len(stream.feedback), (BATCH,), generator=rng)
        clean = stream.feedback[chosen]

        def weighted(theta: Any, phi: Any, rows: Tensor, learner: nn.Module = learner) -> Tensor:
            weights = balanced(functional_call(rater, phi, (rows,)))
            return (weights * functional_call(learner, theta, (rows,))).mean()

        found = hypergradient(
            [lambda theta, phi, rows=rows: weighted(theta, phi, rows) for rows in batches],
            lambda theta, phi, learner=learner, clean=clean: functional_call(
                learner, theta, (clean,)
            ).mean(),
            learner, rater, method, optimizer=steps,
        )  # fmt: skip
        num_gradients += found.grad_evals + num_steps
        for name, parameter in rater.named_parameters():
            parameter.grad = found.by_phi[name]
        optimizer.step()
        for rows in batches:
            steps.zero_grad()
            with torch.no_grad():
                weights = balanced(rater(rows))
            (weights * learner(rows)).mean().backward()
            steps.step()
    return rater, num_gradients


Choice = Callable[[nn.Module, int, torch.Generator], Tensor]  # learner, step -> samples


def best_by(stream: Stream, keep: float, score: Callable[[Tensor], Tensor]) -> Choice:
    """Keep the share `keep` of a pool with the highest scores."""

    def choose(learner: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        pool = stream.samples[stream.draw(round(BATCH / keep), rng)]
        with torch.no_grad():
            return pool[score(pool).topk(BATCH).indices]

    return choose


def greedy(stream: Stream, keep: float, every: int = 8) -> Choice:
    """Keep those that lower the loss on the clean samples most, to first order (GREATS)."""
    direction: dict[str, Tensor] = {}

    def choose(learner: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        theta = {name: p.detach() for name, p in named(learner).items()}

        def of(rows: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
            return lambda at: functional_call(learner, at, (rows,))

        if step % every == 0:
            direction.update(
                value_and_gradient(lambda at: of(stream.feedback)(at).mean(), theta)[1]
            )
        pool = stream.samples[stream.draw(round(BATCH / keep), rng)]
        with torch.no_grad():
            slope, scale = central_difference(of(pool), theta, direction)
        return pool[(slope * scale).topk(BATCH).indices]

    return choose


def train(
    stream: Stream, choose: Choice, seed: int, num_steps: int, every: int = 5
) -> tuple[list[float], nn.Module]:
    """Train a fresh learner; return its test loss every few steps, from step 0 on."""
    rng = torch.Generator().manual_seed(seed + POOL_SEED)
    torch.manual_seed(seed)
    learner = stream.learner()
    steps, losses = adam(learner), list[float]()
    for step in range(num_steps + 1):
        if step % every == 0:
            with torch.no_grad():
                losses.append(float(learner(stream.test).mean()))
        if step < num_steps:
            rows = choose(learner, step, rng)
            steps.zero_grad()
            learner(rows).mean().backward()
            steps.step()
    return losses, learner


def saved(losses: list[float], goal: float) -> float:
    """Return the share of steps left when `losses` first reaches `goal`; 0 if never."""
    for k in range(1, len(losses)):
        if losses[k] <= goal:
            within = (losses[k - 1] - goal) / max(losses[k - 1] - losses[k], 1e-12)
            return 1 - (k - 1 + min(max(within, 0.0), 1.0)) / (len(losses) - 1)
    return 0.0


def auc(scores: Tensor, is_clean: Tensor) -> float:
    """Return the chance that a clean sample has a higher score than a corrupted one."""
    ranks = scores.argsort().argsort().double()
    num_clean, num_other = int(is_clean.sum()), int((~is_clean).sum())
    low = num_clean * (num_clean - 1) / 2
    return (float(ranks[is_clean].sum()) - low) / (num_clean * num_other)


def compare(stream: Stream, keep: float, seed: int, num_steps: int, num_updates: int) -> list[Any]:
    """Train by each choice; return a row for each."""

    def uniform(learner: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        return stream.samples[stream.draw(BATCH, rng)]

    def clean(learner: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        return good[torch.randint(len(good), (BATCH,), generator=rng)]

    def feedback(learner: nn.Module, step: int, rng: torch.Generator) -> Tensor:
        return stream.feedback[torch.randint(len(stream.feedback), (BATCH,), generator=rng)]

    good = stream.samples[stream.is_clean]
    torch.manual_seed(seed)
    rater, num_gradients = train_rater(stream, seed, num_updates)
    plain, from_stream = train(stream, uniform, seed, num_steps)
    _, from_feedback = train(stream, feedback, seed + 1, num_steps // 4)
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "rater": rater,
        "perplexity": lambda rows: -from_stream(rows),
        "reference": lambda rows: -from_feedback(rows),
    }
    choices = {name: best_by(stream, keep, score) for name, score in scores.items()}
    choices |= {"greedy": greedy(stream, keep), "oracle": clean}
    rows: list[Any] = [{"choice": "uniform", "loss": plain[-1], "saved": 0.0}]
    for name, choose in choices.items():
        losses, _ = train(stream, choose, seed, num_steps)
        row: Any = {"choice": name, "loss": losses[-1], "saved": saved(losses, plain[-1])}
        if name in scores:
            some = slice(0, 1024)
            with torch.no_grad():
                rated = scores[name](stream.samples[some])
            truth = stream.is_clean[some]
            row["auc"] = auc(rated, truth)
            row["correlation"] = float(torch.corrcoef(torch.stack([rated, truth.float()]))[0, 1])
        if name == "rater":
            row["gradients_to_train"] = num_gradients
        rows.append(row)
    return rows


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def table(rows: list[Any]) -> str:
    """Return a Markdown table: a line for each stream, rate and choice, over the seeds."""
    lines = [
        "| stream | corrupted | choice | test loss | compute saved | AUC | correlation | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["rate"], row["choice"]), []).append(row)
    for (stream, rate, choice), of in groups.items():
        cells = [stream, f"{rate:.0%}", choice]
        for key in ("loss", "saved", "auc", "correlation"):
            cells.append(interval([row[key] for row in of]) if key in of[0] else "")
        lines.append(f"| {' | '.join(cells)} | {len(of)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of rows.jsonl and table.md")
    parser.add_argument("--text", type=Path, help="a text file: rows of it instead of digits")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--updates", type=int, default=80)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "rows.jsonl"
    for seed in given.seeds:
        for rate in given.rates:
            if given.text:
                name, stream = "text", text_stream(given.text.read_text(), rate, seed)
            else:
                name, stream = "images", image_stream(rate, seed)
            found = compare(stream, 1 - rate, seed, given.steps, given.updates)
            with path.open("a") as file:
                for row in found:
                    row = {"stream": name, "rate": rate, "seed": seed, **row}
                    file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (given.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
