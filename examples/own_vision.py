# %% [markdown]
# # A vision problem of one's own: which patches are worth reconstructing
#
# Images of 16 x 16 pixels hold a faint bar of one of four directions in the top left quarter, and
# loud clutter everywhere else. An autoencoder with a narrow code spends the code on the clutter.
# The downstream task is the direction of the bar. The designer weighs the 16 patches of the
# reconstruction loss.

# %%
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metavpt import Budget, Fixed, Learned, Problem, RunLog, Trainer

SIZE, PATCH, CODE, CLASSES = 16, 4, 6, 4

# %% [markdown]
# ## Data
# A batch carries all its randomness: a step evaluates losses several times, always with the same
# result.


# %%
def draw(batch_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 256) and the direction of their bar (B,) int64."""
    label = torch.randint(CLASSES, (batch_size,), generator=rng)
    bars = torch.zeros(CLASSES, SIZE, SIZE)
    ends = torch.arange(1, 7)
    for k, (rows, columns) in enumerate(
        [(torch.full((6,), 3), ends), (ends, torch.full((6,), 3)), (ends, ends), (ends, 7 - ends)]
    ):
        bars[k, rows, columns] = 1.0
    coarse = torch.randn(batch_size, 1, 4, 4, generator=rng)
    coarse[:, :, :2, :2] = 0
    clutter = nn.functional.interpolate(coarse, size=SIZE, mode="nearest")[:, 0]
    noise = 0.1 * torch.randn(batch_size, SIZE, SIZE, generator=rng)
    return (bars[label] + clutter + noise).flatten(1), label


# %% [markdown]
# ## The problem
# Feedback reads the learner through a linear head. `fit_heads` fits it in closed form on one
# labelled batch, with the learner frozen. The feedback loss is its error on another batch.


# %%
class PatchWeights(nn.Module):
    """The designer: a weight for each of the 4 x 4 patches, 1 on average and at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(SIZE // PATCH, SIZE // PATCH))

    def weights(self) -> Tensor:
        return self.logits.flatten().softmax(0).view_as(self.logits) * self.logits.numel()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, self.weights().repeat_interleave(PATCH, 0).repeat_interleave(
            PATCH, 1
        ).flatten()


class Bars(Problem):
    designer: PatchWeights
    metric_directions = {"accuracy": "higher"}

    def __init__(self) -> None:
        self.learner = nn.ModuleDict(
            {"encode": nn.Linear(SIZE**2, CODE), "decode": nn.Linear(CODE, SIZE**2)}
        )
        self.designer = PatchWeights()
        self.head = torch.zeros(CODE + 1, CLASSES)

    def pretrain_batches(self, seed):
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield draw(64, rng)[0]

    def feedback_batches(self, seed):
        rng = torch.Generator().manual_seed(seed + 1_000_000)
        while True:
            yield draw(128, rng)

    def encode(self, theta, images):
        return functional_call(
            self.learner["encode"],
            {n.removeprefix("encode."): p for n, p in theta.items() if "encode" in n},
            (images,),
        )

    def pretrain_loss(self, theta, task):
        images, weights = task
        decoder = {name.removeprefix("decode."): p for name, p in theta.items() if "decode" in name}
        restored = functional_call(self.learner["decode"], decoder, (self.encode(theta, images),))
        return (weights * (restored - images) ** 2).mean()

    def fit_heads(self):
        self.head = fit(*self.codes(*draw(256, torch.Generator().manual_seed(7))))

    def feedback_loss(self, theta, batch):
        images, label = batch
        return ((with_one(self.encode(theta, images)) @ self.head - one_hot(label)) ** 2).mean()

    def evaluate(self):
        """Accuracy of a linear head on images that neither loop sees."""
        head = fit(*self.codes(*draw(1000, torch.Generator().manual_seed(8))))
        codes, label = self.codes(*draw(1000, torch.Generator().manual_seed(9)))
        return {"accuracy": ((with_one(codes) @ head).argmax(1) == label).float().mean().item()}

    @torch.no_grad()
    def codes(self, images, label):
        return self.learner["encode"](images), label


def one_hot(label: Tensor) -> Tensor:
    return nn.functional.one_hot(label, CLASSES).float()


def with_one(codes: Tensor) -> Tensor:
    return torch.cat([codes, torch.ones(len(codes), 1)], dim=1)


def fit(codes: Tensor, label: Tensor) -> Tensor:
    """A ridge head (CODE + 1, CLASSES)."""
    x = with_one(codes)
    return torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(CODE + 1), x.T @ one_hot(label))


# %% [markdown]
# ## With and without steering
# The same weights, data and number of steps.


# %%
def train(strategy: Fixed | Learned) -> tuple[float, Bars]:
    torch.manual_seed(0)
    problem = Bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            problem,
            strategy,
            Budget(steps=400),
            RunLog(Path(folder)),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
            first_order_every=0,
        )
        trainer.run()
        trainer.measure()
    return trainer.metrics["accuracy"], problem


plain, _ = train(Fixed())
steered, problem = train(
    Learned(optimizer=lambda phi: torch.optim.Adam(phi, lr=0.1), every=2, burn_in=20)
)
print(f"accuracy of a linear head: plain {plain:.3f}, steered {steered:.3f}")

# %% [markdown]
# Where the designer looks: the weights of the 4 x 4 patches, one on average.

# %%
patch_weights = problem.designer.weights().detach()
print(patch_weights.round(decimals=2))
