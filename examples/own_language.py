# %% [markdown]
# # A language problem of one's own: which tokens are worth predicting
#
# A character model reads a stream in which one word in ten is a sum, `3+4=2;`, and the rest is
# babble. The downstream task is the last digit of sums. The designer weighs the tokens of the
# pretraining loss. (For soft targets on real text see `problem=lm_gsm8k`.)

# %%
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metavpt import Budget, Fixed, Learned, Problem, RunLog, Trainer

ALPHABET = "01234+=;abcdefghij "
CONTEXT = 4

# %% [markdown]
# ## Data
# A batch holds contexts of four characters and the next character. Sums are modulo five. Feedback
# and test contain different sums.


# %%
def words(rng: random.Random) -> Iterator[str]:
    while True:
        if rng.random() < 0.1:
            yield sum_of(rng.randrange(5), rng.randrange(5))
        else:
            yield "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(2, 8))) + " "


def sum_of(a: int, b: int) -> str:
    return f"{a}+{b}={(a + b) % 5};"


def encode(text: str) -> Tensor:
    return torch.tensor([ALPHABET.index(character) for character in text])


def answers(even: bool) -> tuple[Tensor, Tensor]:
    """`3+4=` -> `2` for the sums whose first digit is even, or for the others: (N, 4), (N,)."""
    sums = [sum_of(a, b) for a in range(1 - even, 5, 2) for b in range(5)]
    return torch.stack([encode(text[:CONTEXT]) for text in sums]), encode(
        "".join(text[CONTEXT] for text in sums)
    )


# %% [markdown]
# ## The problem


# %%
class Reader(nn.Module):
    """The learner: the next character from the last four."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.hidden = nn.Linear(CONTEXT * width, 64)
        self.out = nn.Linear(64, len(ALPHABET))

    def forward(self, context: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(context).flatten(1))))  # (B, V)


class TokenWeights(nn.Module):
    """The designer: a weight for each character to predict, 1 on average and at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(ALPHABET)))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        context, following = batch
        return context, following, self.logits[following].softmax(0) * len(following)


class Sums(Problem):
    designer: TokenWeights
    metric_directions = {"answer_nll": "lower"}

    def __init__(self) -> None:
        self.learner, self.designer = Reader(), TokenWeights()

    def pretrain_batches(self, seed):
        stream = words(random.Random(seed))
        while True:
            text = ""
            while len(text) < 256 + CONTEXT:
                text += next(stream)
            tokens = encode(text[: 256 + CONTEXT]).unfold(0, CONTEXT + 1, 1)
            yield tokens[:, :CONTEXT], tokens[:, CONTEXT]

    def feedback_batches(self, seed):
        context, following = answers(even=True)
        rng = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randperm(len(context), generator=rng)[:12]
            yield context[chosen], following[chosen]

    def pretrain_loss(self, theta, task):
        context, following, weights = task
        return (
            weights
            * nn.functional.cross_entropy(self.logits(theta, context), following, reduction="none")
        ).mean()

    def feedback_loss(self, theta, batch):
        context, following = batch
        return nn.functional.cross_entropy(self.logits(theta, context), following)

    @torch.no_grad()
    def evaluate(self):
        context, following = answers(even=False)
        return {"answer_nll": nn.functional.cross_entropy(self.learner(context), following).item()}

    def logits(self, theta, context):
        return functional_call(self.learner, theta, (context,))


# %% [markdown]
# ## With and without steering
# The same weights, data and number of steps. The measured answers are not those of the feedback.


# %%
def train(strategy: Fixed | Learned) -> tuple[float, Sums]:
    torch.manual_seed(0)
    problem = Sums()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            problem,
            strategy,
            Budget(steps=600),
            RunLog(Path(folder)),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
            first_order_every=0,
        )
        trainer.run()
        trainer.measure()
    return trainer.metrics["answer_nll"], problem


plain, _ = train(Fixed())
steered, problem = train(
    Learned(optimizer=lambda phi: torch.optim.Adam(phi, lr=0.1), every=4, burn_in=20)
)
print(f"NLL of an answer (a guess has 1.609): plain {plain:.3f}, steered {steered:.3f}")

# %% [markdown]
# What the designer weighs: digits, and what stands around them.

# %%
log_weight = {
    character: round(float(z), 2)
    for character, z in zip(ALPHABET, problem.designer.logits.detach(), strict=True)
}
print(log_weight)
